"""What comes from outside is shown and does not act; an error stands on a line of its own."""

import doctest
import subprocess
import sys

import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

import lib.terminal
from lib.terminal import errors_in_one_sentence, printable


@pytest.mark.parametrize("text, shown", [
    ("\x1b]0;owned\x07", "\\x1b]0;owned\\x07"), ("\x1b[31mred", "\\x1b[31mred"), ("\x9b31m", "\\x9b31m"),
    ("a.mp4\nstep 1/1 reward 2.000", "a.mp4\\nstep 1/1 reward 2.000"), ("over\rwritten", "over\\rwritten"),
    ("one\u2028two", "one\\u2028two"), ("half \ud83d", "half \\ud83d"), ("\u202egpj.exe", "\\u202egpj.exe"),
    ("der Mann öffnet 门 👩‍🚀", "der Mann öffnet 门 👩‍🚀"), ("it's \"so\" \\ 5 %", "it's \"so\" \\ 5 %"), (7, "7"),
])
def test_what_acts_is_escaped_and_the_rest_stays(text, shown):
    """A completion that changed the window's title, and a video's name that forged a line of the log."""
    assert printable(text) == shown


@given(st.text(st.characters()))
def test_no_text_has_a_second_line_or_cannot_be_written(text):
    assert len(printable(text).splitlines()) <= 1
    printable(text).encode("utf-8")
    assert "\x1b" not in printable(text, keep="\n")


def test_the_examples_in_the_docstrings():
    assert doctest.testmod(lib.terminal).failed == 0


@pytest.mark.parametrize("error, said", [("ValueError('a\\x1b[2Jb')", "error: a\\x1b[2Jb"), ("SystemExit('stop \\x07')", "stop \\x07"),
                                         ("OSError(2, 'No such file', 'x')", "error: [Errno 2] No such file: 'x'")])
def test_an_error_begins_its_own_line_while_a_bar_is_open(error, said):
    """"bad file" behind "37%|###" is read by nobody, and by no program that looks for lines."""
    script = ("from tqdm import tqdm\nfrom lib.terminal import errors_in_one_sentence\nbar = tqdm(total=3)\nbar.update(1)\n"
              f"with errors_in_one_sentence():\n    raise {error}")
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and said in done.stderr.split("\n")


def test_a_status_passes_and_a_mistake_of_the_program_keeps_its_trace():
    for status in (0, 2, None):
        with pytest.raises(SystemExit) as end, errors_in_one_sentence():
            raise SystemExit(status)
        assert end.value.code == status
    with pytest.raises(KeyError), errors_in_one_sentence():
        raise KeyError("x")
