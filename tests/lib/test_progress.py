"""The bar over a whole run."""

import pytest

import train
from lib.progress import Progress, work_of_stages


def config_of(*arguments):
    return train.parse_config([*arguments])


def test_every_stage_that_runs_has_its_place():
    """A stage without work in the plan made "stage 4 of 3" of the last one."""
    assert list(work_of_stages(config_of(), 1800, 600)) == ["before", "sft", "after_sft", "selected", "grpo", "after"]
    assert list(work_of_stages(config_of("--sft_steps", "0", "--select_k", "0"), 1800, 600)) == ["before", "grpo", "after"]
    assert list(work_of_stages(config_of(), 1800, 0)) == ["sft", "selected", "grpo"]


def test_epochs_are_counted_in_samples():
    """-2 as a number of steps is twice through the data, not a negative amount of work."""
    twice = work_of_stages(config_of("--steps", "-2", "--questions", "8"), 80, 0)
    assert twice["grpo"] == work_of_stages(config_of("--steps", "20", "--questions", "8"), 80, 0)["grpo"]


def test_the_rest_is_foretold_from_the_pace_so_far(monkeypatch):
    """A stage's own bar says nothing of the stages behind it: 10 s for a tenth of the work leave 90 s."""
    now = [100.0]
    monkeypatch.setattr("lib.progress.time.time", lambda: now[0])
    progress = Progress({"before": 10, "grpo": 90}, show=False)
    assert progress.begin("before", total=4).time_left() == ""
    now[0] += 10
    progress.close()
    assert (progress.share(), progress.time_left()) == (pytest.approx(0.1), "about 90 s left")
    progress.begin("grpo", total=9)
    now[0] += 1190
    progress.update(1)
    assert progress.time_left() == "about 80 min left"
    progress.update(7)
    assert progress.share() == pytest.approx(0.9)


def test_a_resumed_run_measures_its_own_pace(monkeypatch):
    """What an earlier part of the run has done took no time in this one: counted, it would halve the time left."""
    now = [0.0]
    monkeypatch.setattr("lib.progress.time.time", lambda: now[0])
    progress = Progress({"sft": 50, "grpo": 50}, show=False).begin("grpo", total=10, initial=5)
    now[0] = 30.0
    progress.update(1)
    assert (progress.share(), progress.time_left()) == (pytest.approx(0.8), "about 2 min left")
