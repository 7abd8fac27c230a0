"""Answers survive a kill, and no file mixes those of two kinds."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ALONE, ROOT

from data import VideoSettings
from lib.answers import SamplingSettings, append_lines, claim, fingerprint, read_partial, weights_of


def line(name, said="no"):
    return {"id": name, "task": "qa", "completions": [said], "rewards": [0.0], "parts": [{}], "reasons": ["ok"]}


def test_no_beginning_of_a_line_is_taken_for_an_answer(tmp_path):
    text = json.dumps(line("a", "ä }"))
    for cut in range(len(text)):
        (tmp_path / "rank0.jsonl").write_text("\n" + text[:cut])
        assert read_partial(ALONE, tmp_path, [{"id": "a"}]) == {}
    append_lines(tmp_path / "rank0.jsonl", [line("a"), line("stranger")])
    assert read_partial(ALONE, tmp_path, [{"id": "a"}]) == {"a": line("a")}


def test_a_video_that_could_not_be_read_is_asked_about_again(tmp_path):
    """A disk that was away for an hour: its videos stayed unreadable in every run that went on from these answers."""
    lost = {**line("a"), "reasons": ["unreadable_video"] * 2, "problem": "a.mp4: no such file"}
    append_lines(tmp_path / "rank0.jsonl", [lost, line("b")])
    assert set(read_partial(ALONE, tmp_path, [{"id": "a"}, {"id": "b"}])) == {"b"}
    append_lines(tmp_path / "rank0.jsonl", [line("a", "now")])
    assert read_partial(ALONE, tmp_path, [{"id": "a"}])["a"]["completions"] == ["now"]


def test_a_model_on_the_hub_is_asked_as_its_own_folder_says(tmp_path):
    """The same model, by its hub name, was asked with another prompt and at another resolution."""
    snapshot = tmp_path / "hub" / "models--me--door" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("a" * 40)
    (snapshot / "config.json").write_text("{}")
    (snapshot / "asked.json").write_text('{"prompt": "answer", "fps": 4.0}')
    code = "from lib.answers import read_asked; print([read_asked(m)[k] for m in ('me/door', 'no/such', 'a/b/c') for k in ('prompt', 'fps')])"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True,
                          env={**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}).stdout
    assert said.strip() == "['answer', 4.0, 'think', 2.0, 'think', 2.0]"


def decided(samples=({"id": "a"},), model="m", judge="", **changed):
    asking = SamplingSettings("think", 64, 1000, 2, 1.0, "sum", 0, changed.pop("batch", 8))
    record = fingerprint(model, judge, asking, VideoSettings(), list(samples))
    return json.loads(json.dumps({**record, **changed}))


def test_answers_given_otherwise_are_refused_by_name_and_value(tmp_path):
    """Half a file of K = 2 and half of K = 4, or of two models, is a number about nothing."""
    claim(ALONE, tmp_path / "new", decided())
    claim(ALONE, tmp_path / "new", decided(batch=3))  # how many are asked at once decides nothing
    for changed in ({"model": "n"}, {"num_samples": 4}, {"temperature": 0.5}, {"fps": 1.0}, {"judge": "j"}, {"seed": 1},
                    {"max_prompt_tokens": None}, {"prompt": "answer"}, {"samples": ({"id": "b"},)}):
        (name,) = changed
        now, before = decided(**changed)[name], decided()[name]
        with pytest.raises(ValueError) as error:
            claim(ALONE, tmp_path / "new", decided(**changed))
        assert f"{name} {before!r}, not {now!r}" in str(error.value) and "--overwrite" in str(error.value)
    claim(ALONE, tmp_path / "more", decided(looks=2))
    with pytest.raises(ValueError, match="looks 2, not None"):  # of a setting that is no longer given
        claim(ALONE, tmp_path / "more", decided())


@pytest.mark.parametrize("name, value", [
    ("style", "answer"), ("max_new_tokens", 65), ("max_prompt_tokens", 9), ("num_samples", 3), ("temperature", 0.5),
    ("mix", "temporal_r1"), ("seed", 7), ("timestamps", True)])
def test_whatever_decides_an_answer_is_in_the_record(name, value):
    """A setting that is forgotten there is one that may change in the middle of a file."""
    asking = dict(style="think", max_new_tokens=64, max_prompt_tokens=10, num_samples=2, temperature=1.0, mix="sum",
                  seed=0)
    records = [fingerprint("m", "", SamplingSettings(**a), VideoSettings(), []) for a in (asking, asking | {name: value})]
    assert records[0] != records[1]
    for field in vars(VideoSettings()):
        other, samples = VideoSettings(**{**vars(VideoSettings()), field: (1, 2) if field == "picture_pixels" else 1}), [{"image": "a.jpg"}]
        one, two = (fingerprint("m", "", SamplingSettings(**asking), settings, samples) for settings in (VideoSettings(), other))
        assert one != two


def test_a_model_that_was_trained_anew_under_its_name_is_another(tmp_path):
    """runs/toy/final is another model after the next run."""
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(bytes(5 * 2**20))
    before = weights_of(str(tmp_path))
    os.utime(weights, (2000, 2000))  # saved or copied once more: an interrupted evaluation goes on
    assert before and weights_of(str(tmp_path)) == before
    weights.write_bytes(bytes(5 * 2**20 - 1) + b"x")
    assert weights_of(str(tmp_path)) != before
    weights.write_bytes(bytes(5 * 2**20 + 1))
    assert weights_of(str(tmp_path)) != before
    assert weights_of("Qwen/on-the-hub") == ""
