"""One question about one video, as a newcomer asks it."""

import doctest
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ALONE, ASKING, ROOT
from made_samples import says

from data import VIDEO_PAD, prepare, read_video
from eval import answer_all
from lib import kernels
from lib.answers import SamplingSettings
from model import decoder_layer
from rewards import score
from tools import ask
from tools.ask import complete, what_is_read
from tools.evaluate import run


def flags(model_folder, video, *more):
    return ["--model", str(model_folder), "--video", str(video), "--device", "cpu", "--min_pixels", "3136",
            "--max_new_tokens", "6", *more]


TRACKING = ("--num_workers", "0", "--task", "tracking", "--question", "white square", "--box", "0.1", "0.1", "0.3", "0.4")


def test_one_question_is_answered_and_read(clips, model_folder, capsys):
    """What everybody tries first: no data file, no output folder, no truth."""
    run(flags(model_folder, clips / "videos" / "eval-0000.mp4", *TRACKING, "--num_samples", "2"))
    printed = capsys.readouterr().out
    assert printed.count("read as: ") == 2 and "(cut at --max_new_tokens 6)" in printed


def test_a_video_that_cannot_be_read_is_one_line_and_status_1(model_folder, tmp_path):
    """As a user starts it, with a process that decodes."""
    (tmp_path / "a.mp4").write_bytes(b"no video")
    command = [sys.executable, str(ROOT / "eval.py"),
               *flags(model_folder, tmp_path / "a.mp4", "--task", "grounding", "--question", "a man falls")]
    result = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "error: " in result.stderr.splitlines()[-1] and "a.mp4" in result.stderr.splitlines()[-1]


def test_one_question_is_asked_with_a_compiled_layer_on_request(clips, model_folder, monkeypatch, capsys):
    """A flag that is accepted and forgotten is believed to make it faster."""
    asked = []
    monkeypatch.setattr(kernels, "compiled", lambda layer: asked.append(layer) or layer)
    video = clips / "videos" / "eval-0000.mp4"
    run(flags(model_folder, video, *TRACKING))
    assert not asked
    plain = capsys.readouterr().out
    run(flags(model_folder, video, *TRACKING, "--compile"))
    assert set(asked) == {decoder_layer} and capsys.readouterr().out == plain


def test_running_out_of_memory_names_the_sample_and_the_flags(clips, model_folder, monkeypatch):
    """A traceback of the library says neither how long the prompt was nor what to lower."""
    def fail(*arguments, **named):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(ask.VideoLM, "generate", fail)
    with pytest.raises(SystemExit) as end:
        run(flags(model_folder, clips / "videos" / "eval-0000.mp4", *TRACKING))
    assert "in sampling eval-0000.mp4 (prompt of " in end.value.code and "--total_pixels" in end.value.code
    assert "Tried to allocate 2.00 GiB" in end.value.code and "answered" not in end.value.code


def test_each_task_is_asked_with_its_flags_and_read_from_its_tags(clips, model_folder, monkeypatch, capsys):
    """The model is real; only its completion is replaced, by one that can be read."""
    base = ["--model", str(model_folder), "--video", str(clips / "videos" / "eval-0000.mp4"), "--device", "cpu",
            "--min_pixels", "3136", "--num_workers", "0", "--question", "the screen is red"]
    for more, said, words in [
        (["--task", "grounding"], says("3 to 6"), "read as: 3.00 s to 6.00 s"),
        (["--task", "qa", "--options", "red", "blue"], says("B"), "read as: (B) blue"),
        (["--task", "gqa", "--options", "red", "blue"], says("A", "[(3, 6)]"),
         "read as: (A) red, seen in 3.00 s to 6.00 s"),
        (["--task", "moments"], says("[]"), "read as: not in this video"),
        (["--task", "classification", "--options", "low quality", "high quality"], says("low quality"),
         "read as: low quality"),
        (["--task", "captioning"], says("The screen turns red."), "read as: The screen turns red."),
        (["--task", "grounding"], "I do not know", "read as: nothing: there is no closed <answer>"),
    ]:
        monkeypatch.setattr(ask, "complete", lambda model, prompt, asking: [(said, True)])
        run([*base, *more])
        assert words in capsys.readouterr().out


def test_one_question_gets_the_completions_that_a_data_set_would(model, loader, samples):
    """Asked alone, without a truth, a model must say what it says in an evaluation."""
    for asking in (ASKING, SamplingSettings("think", 6)):
        expected = answer_all(model, loader, samples, ALONE, asking, score, "")
        for sample, prediction in zip(samples, expected):
            prompt = prepare(sample, loader.load(sample), model.tokenizer, geometry=model.geometry)
            said = complete(model, prompt, asking)
            assert [text for text, _ in said] == prediction["completions"]
            assert [end for _, end in said] == [reason != "truncated" for reason in prediction["reasons"]]


# ---- what is shown in the terminal -----------------------------------------------------------------------------------

EVIL = "\x1b]0;owned\x07</script><script>document.title='owned'</script>"


def asked_by_hand(monkeypatch, model_folder, video, question, said, *more) -> None:
    """As `python -m tools.ask` is typed; the model is real, and what it says is given."""
    monkeypatch.setattr(ask, "complete", lambda model, prompt, sampling: [(text, True) for text in said])
    run([question, "--model", str(model_folder), "--video", str(video), "--device", "cpu", "--min_pixels", "3136", "--num_workers",
         "0", *more])


def test_the_terminal_shows_what_was_seen_thought_and_answered(clips, model_folder, monkeypatch, capsys, tmp_path):
    """An answer that surprises is often one about other frames than one thinks, or about fewer. And neither the file's name
    nor the completion may act on the terminal."""
    monkeypatch.setenv("COLUMNS", "60")
    video = tmp_path / "a\x1b[2Jb.mp4"
    shutil.copy(clips / "videos" / "eval-0000.mp4", video)
    said = f"<think>It is red\nfrom 3.{EVIL}</think> <answer>3 to 6</answer>"
    asked_by_hand(monkeypatch, model_folder, video, "when is it red?", [said])
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert lines[0].startswith("a\\x1b[2Jb.mp4: 24 frames of 56 x 56 pixels, which cost 48 of the prompt's ")
    begins = [float(word) for word in " ".join(lines[1:4]).split() if word[0].isdigit()]
    assert begins == [round(float(s), 2) for s in read_video(video, min_pixels=3136).seconds]
    assert "asked as grounding: when is it red?" in lines and "\x1b" not in printed and "\x07" not in printed
    at = lines.index("thought: It is red")
    assert lines[at + 1].startswith("from 3.\\x1b]0;owned\\x07") and lines[at + 2] == "answer: <answer>3 to 6</answer>"
    assert lines[at + 3] == "read as: 3.00 s to 6.00 s"
    drawn = lines[at + 4]
    assert len(drawn) == 60 and drawn.endswith("| 12.00 s")
    assert drawn.count("#") / len(drawn[3:-9]) == pytest.approx(0.3, abs=0.05)


def test_several_answers_are_numbered_and_each_window_has_its_bar(clips, model_folder, monkeypatch, capsys):
    asked_by_hand(monkeypatch, model_folder, clips / "videos" / "eval-0000.mp4", "what is it?", [says("A", "[(1, 2), (4, 6)]"), "no"],
                  "--task", "gqa", "--options", "red", "blue", "--num_samples", "2")
    first, second = capsys.readouterr().out.split("--- answer ")[1:]
    assert first.startswith("1 of 2") and first.count("0 |-") == 2 and second.startswith("2 of 2")
    assert "0 |" not in second and "answer: no" in second


def test_video_tokens_are_counted_as_the_prompt_has_them(model, loader, samples):
    sample = samples[0]
    clip = loader.load(sample)
    prompt = prepare(sample, clip, model.tokenizer)
    pads = int((prompt.ids == model.tokenizer.convert_tokens_to_ids(VIDEO_PAD)).sum())
    assert ask.what_was_seen(prompt, clip).endswith(f"which cost {pads} of the prompt's {len(prompt.ids)} tokens")


@pytest.mark.parametrize("start, end, drawn", [(0, 10, "#" * 40), (0, 5, "#" * 20 + "-" * 20), (2.5, 7.5, "-" * 10 + "#" * 20 + "-" * 10),
                                               (3, 3, "-" * 12 + "#" + "-" * 27), (10, 10, "-" * 39 + "#"), (-5, 20, "#" * 40),
                                               (7.5, 1e300, "-" * 30 + "#" * 10)])
def test_a_bar_lies_where_the_span_does(start, end, drawn):
    """A span of no length, or beyond the clip, is still seen, and no answer makes a line longer than the terminal."""
    line, labels = ask.bar(start, end, 10, 52).splitlines()
    assert line == f"0 |{drawn}| 10.00 s" and len(labels) <= 52
    assert labels.split() == [*ask.in_seconds(start).split(), *ask.in_seconds(end).split()]


def test_a_span_outside_of_the_clip_is_said_and_not_drawn():
    for start, end in ((12, 15), (-3, -1)):
        line, labels = ask.bar(start, end, 10, 52).splitlines()
        assert "outside of the clip" in line and "#" not in line and len(line) == 52 and len(labels) <= 52


def test_long_lists_of_seconds_show_both_ends():
    words = ask.moments([k / 2 for k in range(768)]).split()
    assert len(words) == ask.MOST_MOMENTS + 1 and (words[0], words[-1]) == ("0.00", "383.50")


# ---- the page --------------------------------------------------------------------------------------------------------


def data_of(page) -> dict:
    return json.loads(re.search(r'id="data">(.*?)</script>', page.read_text(), re.DOTALL)[1])


def test_the_page_has_the_frames_that_the_model_saw_and_no_truth(clips, model_folder, monkeypatch, tmp_path):
    """Nobody knows the truth of a question asked by hand: a green bar, or a reward of 0, would be made up."""
    video, page = clips / "videos" / "eval-0000.mp4", tmp_path / "new" / "page.html"
    asked_by_hand(monkeypatch, model_folder, video, "when?", [says("3 to 6"), EVIL], "--num_samples", "2", "--html", str(page))
    data = data_of(page)
    asked, (strip,) = data["asked"], data["clips"]
    assert strip["of"] == 24 and strip["shown"] == list(range(24)) and strip["times"][-1] == pytest.approx(11.875)
    assert [answer.get("spans") for answer in asked["completions"]] == [[[3, 6]], None] and asked["length"] == 12
    assert not {"truth", "spans"} & asked.keys() and not any("reward" in answer for answer in asked["completions"])
    assert "<script>document.title" not in page.read_text()


def test_a_browser_shows_one_question_and_nothing_of_a_run(clips, model_folder, monkeypatch, tmp_path):
    """Boxes on all eight frames, the given one on the first; no empty chapter about curves."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("NO BROWSER: the page's scripts were not run; apt-get install chromium")
    page = tmp_path / "page.html"
    asked_by_hand(monkeypatch, model_folder, clips / "videos" / "eval-0000.mp4", "white square", [f"{EVIL}{says(str(BOXES))}"],
                  "--box", "0.1", "0.2", "0.3", "0.4", "--html", str(page))
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile",
               "--enable-logging=stderr", "--virtual-time-budget=2000", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    shown = done.stdout.split("<script")[0]
    assert "<title>eval-0000.mp4</title>" in shown and shown.count('class="box"') == 9 and 'class="frame"' in shown
    assert "<h2>" not in shown and "reward" not in shown and 'data-ready="yes"' in shown


# ---- what is read ----------------------------------------------------------------------------------------------------

CHOICE = {"options": ["red", "green light", "blue"]}
BOXES = [[0.1, 0.2, 0.3, round(0.4 + k / 100, 2)] for k in range(8)]


@pytest.mark.parametrize("task, completion, words", [
    ("grounding", "<answer>3 to 6.5</answer>", "3.00 s to 6.50 s"),
    ("grounding", '<answer>{"start_time": "3", "end_time": "6"}</answer>', "3.00 s to 6.00 s"),
    ("grounding", "<answer>6 to 3</answer>", "nothing: an interval ends before it starts"),
    ("grounding", "3 to 6", "nothing: there is no closed <answer> ... </answer>"),
    ("qa", "<answer>b</answer>", "(B) green light"),
    ("qa", "<answer>A or C</answer>", "nothing: the answer names two letters"),
    ("gqa", "<answer>C</answer><glue>[(1, 2), (4, 5.5)]</glue>",
     "(C) blue, seen in 1.00 s to 2.00 s and 4.00 s to 5.50 s"),
    ("gqa", "<answer>C</answer><glue>[]</glue>", "(C) blue, seen in no part of the video"),
    ("gqa", "<answer>C</answer>", "(C) blue, seen in nothing: there is no closed <glue> ... </glue>"),
    ("moments", "<answer>[(1, 2), (4, 5.5)]</answer>", "1.00 s to 2.00 s and 4.00 s to 5.50 s"),
    ("moments", "<answer>[]</answer>", "not in this video"),
    ("moments", "<answer>4 to 5.5</answer>", "nothing: the answer is no list of (start, end)"),
    ("classification", "<answer> Green light\n</answer>", "Green light"),
    ("classification", "<answer>pink</answer>", "'pink', which is none of the options"),
    ("captioning", "<answer> A dog barks. </answer>", "A dog barks."),
    ("captioning", "<answer> </answer>", "nothing: the answer is empty"),
    ("tracking", "<answer>[1, 2]</answer>", "nothing: the answer is no list of 8 lists of 4 numbers"),
])
def test_what_is_read_in_words(task, completion, words):
    """What a newcomer sees first must be what scoring would see."""
    assert what_is_read({"task": task, **CHOICE}, completion) == words


def test_boxes_are_read_with_the_seconds_of_their_frames():
    said = what_is_read({"task": "tracking"}, f"<answer>{BOXES}</answer>", [k / 2 for k in range(8)])
    assert len(said.splitlines()) == 8
    assert said.splitlines()[3].split("s") == ["  1.50 ", "  [0.1, 0.2, 0.3, 0.43]"]


def test_the_examples_in_the_docstrings_are_true():
    results = doctest.testmod(ask)
    assert results.failed == 0 and results.attempted >= 4
