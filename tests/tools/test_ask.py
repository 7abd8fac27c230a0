"""One question about one video, as a newcomer asks it."""

import doctest
import os
import subprocess
import sys

import pytest
import torch
from conftest import ALONE, ASKING, ROOT
from made_samples import says

from data import prepare
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
    assert results.failed == 0 and results.attempted >= 2
