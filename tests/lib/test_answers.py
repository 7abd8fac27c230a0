"""Answers survive a kill, and no file mixes those of two kinds."""

import json
import os

import pytest
from conftest import ALONE

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
