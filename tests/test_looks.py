"""The experiment behind the table of a second look: its clips hide what they are meant to hide, its labels are true, and the
table in docs/results.md is that of tests/results/looks.json."""

import json

import numpy as np
import pytest
from conftest import ROOT

import looks
import rewards
import train
from lib.samples import find_problem

CLIPS = [(name, rng, event) for name, rng, event in looks.clips(5)][:60]


def test_the_flash_is_in_the_dark_and_the_questions_are_about_it():
    """Were the flash outside its window, a closer look at the right place would see nothing."""
    for name, rng, (colour, dark, flash) in CLIPS:
        assert dark <= flash and flash + looks.FLASH <= dark + looks.DARK <= looks.DURATION
        samples = looks.make_samples(rng, name, (colour, dark, flash))
        assert [find_problem(sample) for sample in samples] == [None] * 5
        gqa, one, *closer, anywhere = samples
        assert {s["options"]["ABCD".index(s["answer"])] for s in samples} == {colour}
        assert gqa["spans"] == [[dark, dark + looks.DARK]] and "dense_windows" not in one
        assert [sample["density"] for sample in closer] == list(looks.DENSITIES)
        assert min(rewards.spans_iou(sample["dense_windows"], sample["spans"]) for sample in closer) > 0.4
        parts = [rewards.score(sample, sample["target"]).parts for sample in samples]
        assert parts[0]["temporal_iou"] == 1 and all(part["format"] == 1 for part in parts)


def test_a_thought_tells_what_its_frames_show_and_nothing_else():
    """A colour that no frame shows, in the text to imitate, teaches to make colours up."""
    told = {True: 0, False: 0}
    for name, rng, event in CLIPS:
        for sample in looks.make_samples(rng, name, event):
            times = looks.shown_times(sample.get("dense_windows") or [], sample.get("density", 1.0))
            is_seen = any(event[2] <= time < event[2] + looks.FLASH for time in times)
            assert (event[0] in sample["target"].split("</think>")[0]) == is_seen
            assert rewards.score(sample, sample["target"]).parts["accuracy"] or not is_seen
            told[is_seen] += 1
    assert min(told.values()) > 40


def test_what_is_drawn_is_what_is_asked():
    """A flash a frame early or late would be counted as seen where it is not."""
    for _, rng, event in CLIPS[:3]:
        frames = looks.render(rng, event).astype(float)
        colour, dark, flash = event
        seconds = np.arange(len(frames)) / looks.FPS
        red, green, blue = frames.mean(axis=(1, 2)).T
        coloured = np.ptp([red, green, blue], axis=0) > 30
        assert seconds[coloured].tolist() == seconds[(flash <= seconds) & (seconds < flash + looks.FLASH)].tolist()
        is_dark = ~coloured & (red < 70)
        assert (seconds[is_dark].min(), seconds[is_dark].max()) == (dark, dark + looks.DARK - 1 / looks.FPS)


def test_what_the_frames_allow_is_counted_right():
    """20 frames two seconds apart see a flash of a second every other time; frames in every half second see it always."""
    sample = {"flash": 0.0, "dense_windows": None}
    assert looks.allowed([sample], 1.0) == 1.0  # the first frame is shown
    flashes = [{"flash": k / 10} for k in range(20, 300)]
    assert looks.allowed(flashes, 1.0) == pytest.approx(0.5 + 0.5 / 4, abs=0.06)
    assert looks.allowed([{**s, "dense_windows": [[s["flash"] - 3, s["flash"] + 4]]} for s in flashes], 4.0) == 1.0


def test_the_training_command_is_one():
    config = train.parse_config(["--model", "m", "--train_data", "x.jsonl", "--out", "o", *looks.TRAINING.split()])
    assert config.fps * looks.DURATION == looks.SHOWN and config.steps == 0 and config.sft_steps > 0


def test_the_table_in_the_docs_is_that_of_the_results():
    results = json.loads((ROOT / "tests" / "results" / "looks.json").read_text())
    assert results["seeds"] and results["commit"] and results["command"]
    assert "\n".join(looks.table(results)) in (ROOT / "docs" / "results.md").read_text()
