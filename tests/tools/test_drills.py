"""Failures on purpose: each shows in what its run leaves behind, the report names it, and says nothing of a healthy run."""

import contextlib
import json
import re
from pathlib import Path

import pytest
from conftest import ROOT, copy_start

from tools import drills

SHORT = [name for name, drill in drills.DRILLS.items() if drill.flags is drills.go_on]  # the others need a model that finds events


@pytest.fixture(scope="module")
def begin(whole_run, tmp_path_factory) -> drills.Begin:
    folder = copy_start(whole_run, tmp_path_factory.mktemp("drills"))
    return drills.Begin(folder / "start", folder / "toy", steps=drills.FIRST_NAN + 4, questions=3)


@pytest.fixture(scope="module")
def healthy(begin, tmp_path_factory) -> list[str]:
    """What is said of the run that the short drills break."""
    return drills.carry_out(SHORT[0], begin, tmp_path_factory.mktemp("healthy") / "run", healthy=True)[1]


@pytest.mark.parametrize("name", SHORT)
def test_the_report_names_what_is_broken_and_only_then(name, begin, healthy, tmp_path):
    """A failure that no sentence names looks like training; a sentence that is always there is not read."""
    shown, worries = drills.carry_out(name, begin, tmp_path / "run")
    assert shown and any(drills.DRILLS[name].worry in text for text in worries)
    assert not any(drills.DRILLS[name].worry in text for text in healthy)
    text = (tmp_path / "run" / "report.html").read_text()
    assert drills.DRILLS[name].worry in text  # the page, not only the list


@pytest.fixture(scope="module")
def long_begin(tmp_path_factory) -> drills.Begin:
    with contextlib.chdir(tmp_path_factory.mktemp("start")):
        begin = drills.begin_from(Path("start"))
        return begin._replace(model=begin.model.resolve(), clips=begin.clips.resolve(), steps=4)


@pytest.mark.slow  # two warm starts of half a minute each, and one more for the healthy twin
@pytest.mark.parametrize("name", [name for name in drills.DRILLS if name not in SHORT])
def test_what_only_a_model_that_finds_events_shows_is_named_too(name, long_begin, tmp_path):
    shown, worries = drills.carry_out(name, long_begin, tmp_path / "run")
    assert shown and any(drills.DRILLS[name].worry in text for text in worries)
    _, worries = drills.carry_out(name, long_begin, tmp_path / "healthy", healthy=True)
    assert not any(drill.worry in text for drill in drills.DRILLS.values() for text in worries)


def test_a_drill_leaves_the_code_as_it_was(begin, tmp_path):
    """A function that stays replaced breaks the next run of the process, which is nobody's drill."""
    for name, drill in drills.DRILLS.items():
        before = [drills.grpo.completion_mask, drills.rewards.score, drills.loader.read_video, drills.train.accumulate_gradients,
                  drills.train.imitation_group]
        with drill.break_it([], begin):
            pass
        assert before == [drills.grpo.completion_mask, drills.rewards.score, drills.loader.read_video,
                          drills.train.accumulate_gradients, drills.train.imitation_group], name


def test_no_line_of_a_drill_is_in_the_code_that_trains():
    for path in [*ROOT.glob("*.py"), *(ROOT / "lib").glob("*.py")]:
        assert "drill" not in path.read_text(encoding="utf-8"), path.name


def test_a_folder_that_holds_a_run_is_left_alone(tmp_path):
    """--out of a run of days, given by mistake."""
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds a run already"):
        drills.main(["nan", "--out", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_the_list_has_a_line_for_each(capsys):
    drills.main([])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(drills.DRILLS)


def test_the_end_of_a_drill_says_what_was_broken_and_what_named_it(tmp_path, capsys):
    drills.tell("nan", [f"line {k}" for k in range(9)], ["Not a number: 5 of 8", "another"], tmp_path)
    said = capsys.readouterr().out
    assert "broken: the loss is nan" in said and "-> Not a number: 5 of 8" in said and "   another" in said
    assert re.findall(r"line \d", said) == ["line 0", "line 1", "line 7", "line 8"]


def test_the_page_has_a_row_for_each_and_the_words_of_the_report():
    """A table that quotes sentences which nobody says any more."""
    rows = re.findall(r"^\| `(\w+)` \|.*$", (ROOT / "docs" / "drills.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert rows == list(drills.DRILLS)
    text = (ROOT / "docs" / "drills.md").read_text(encoding="utf-8")
    assert all(drill.worry in text for drill in drills.DRILLS.values())


def test_the_drill_of_the_rate_asks_only_for_what_it_shows(begin, tmp_path):
    """Of events after the last frame that is shown nothing can be said, on whatever scale; and a start that does not find what is
    asked for says nothing about the scale either: with colours among the questions the report was silent."""
    samples = [{"id": f"{end} {words}", "task": task, "video": "a.mp4", "question": words, "spans": [[1, end]]} for end in (3, 6, 7)
               for task in ("grounding", "gqa") for words in ("the screen has its first colour", "the screen is red")]
    for name in ("train", "eval"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    drills.ask_for_early_events(begin._replace(clips=tmp_path))
    for name in ("train", "eval"):
        asked = [json.loads(line) for line in (tmp_path / f"early.{name}.jsonl").read_text().splitlines()]
        assert [(sample["id"], sample["task"]) for sample in asked] == [
            (f"{end} the screen has its first colour", "grounding") for end in (3, 6)]
