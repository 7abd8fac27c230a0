"""Selection from files: of answers, and of what a training run has logged."""

import json
import sys

import pytest
from made_samples import CONTINUOUS, DISCRETE, LETTERS, SPAN
import torch

import data
import grpo
import rewards
from lib.run import records_of
from lib.samples import load_samples
from lib.selection import BINS, report_text
from tools.data_commands import main, parse_arguments, run_command
from tools.select import read_predictions, write_selection


def test_predictions_that_are_none_are_named_by_line(tmp_path):
    """Half a line is what a run that was killed leaves behind."""
    file = tmp_path / "predictions.jsonl"
    prediction = DISCRETE[0][1]
    for second, words in ((json.dumps(prediction)[:20], "not a prediction"), ('{"id": "x"}', "not a prediction"),
                          ('{"id": "x", "parts": [{"format": 1.0}]}', "not a prediction"),
                          ('{"id": "x", "parts": ["ok"]}', "not a prediction"),
                          ('{"id": ["x"], "parts": []}', "not a prediction"),
                          (json.dumps(prediction), "a second prediction for sample 'wrong'")):
        file.write_text(json.dumps(prediction) + "\n" + second)
        with pytest.raises(ValueError, match=f"{file}:2: {words}"):
            read_predictions(file)


def test_the_command_writes_the_kept_lines_as_they_were_and_the_report(tmp_path, capsys, monkeypatch):
    """The selection is training data: a field lost or reformatted here is lost for training."""
    samples = [{**sample, "video": "v.mp4", "note": "ü"} for sample, _ in DISCRETE + CONTINUOUS]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    predictions = tmp_path / "run" / "predictions.jsonl"
    predictions.parent.mkdir()
    predictions.write_text("".join(json.dumps(p) + "\n" for _, p in reversed(DISCRETE + CONTINUOUS)))
    command = ["data.py", "select", str(predictions), "--data", str(tmp_path / "x.jsonl"), "--out",
               str(tmp_path / "new" / "selected.jsonl"), "--min_mean", "0.03"]
    assert run_command(parse_arguments(command[1:])) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("selected 4 of 8 samples\n") and "4 of 8 samples kept in" in printed.splitlines()[-1]
    assert "high_variance_good 2" in printed and "grounding: 2 of 4, std at least 0.1, mean 0.03\n" in printed
    written = [json.loads(line) for line in open(tmp_path / "new" / "selected.jsonl", encoding="utf-8")]
    assert written == [sample for sample in samples if sample["id"] in ("one", "seven", "varied", "lucky")]
    report = json.loads((tmp_path / "new" / "selected.report.json").read_text())
    assert report["bins"]["mixed"] == 2 and report["tasks"]["grounding"]["min_mean"] == 0.03
    assert report["source"] == "predictions"
    predictions.write_text("")
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit, match="^error: no prediction for sample 'wrong'"):  # a line, and status 1
        main()


def logged(name, step, scores, part="accuracy", reason="ok"):
    """The lines that training writes for one group, by its own function."""
    scores = [rewards.Score(score + 1.0, {part: float(score), "format": 1.0}, reason) for score in scores]
    prompt = data.Prompt({"id": name}, *[None] * 4)
    group = grpo.Group(prompt, None, None, torch.zeros(len(scores)), texts=["<answer>A</answer>"] * len(scores),
                       scores=scores, reasons=[reason] * len(scores))
    return [json.dumps(record) + "\n" for record in records_of(group, step)]


@pytest.fixture
def trained(tmp_path):
    """Seven samples, and the log of three steps that saw five of them, some more than once."""
    tasks = {"moved": LETTERS, "steady": LETTERS, "early": LETTERS, "never": LETTERS, "span": SPAN, "unseen": SPAN,
             "poor": SPAN}
    samples = [{**sample, "id": name} for name, sample in tasks.items()]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    log = [*logged("moved", 1, [0, 1, 0, 1]), *logged("early", 1, [0, 1, 1, 1]), *logged("steady", 1, [0, 0, 0, 0]),
           *logged("moved", 2, [0, 0, 1, 1]), *logged("span", 2, [0.0, 0.2, 0.4, 0.6], "temporal_iou"),
           *logged("steady", 3, [1, 0, 0, 1]), *logged("moved", 3, [1, 1, 1, 1]),
           *logged("poor", 3, [0.0, 0.0, 0.0, 0.0], "temporal_iou")]
    (tmp_path / "completions.jsonl").write_text("".join(log))
    return tmp_path


def reselect(folder, **more):
    options = {name: more.pop(name) for name in ("control", "seed") if name in more}
    log, source = folder / "completions.jsonl", str(folder / "x.jsonl")
    report = write_selection(log, source, folder / "out.jsonl", options, **more)
    return [json.loads(line)["id"] for line in open(folder / "out.jsonl")], report


def test_the_latest_group_of_each_sample_decides(trained):
    """The policy has moved since the earlier ones: "moved" was worth a seat twice and now is always right."""
    kept, report = reselect(trained)
    assert kept == ["steady", "early", "span"]
    assert report["bins"] == {**dict.fromkeys(BINS, 0), "all_right": 1, "mixed": 2, "high_variance_good": 1,
                              "low_variance_poor": 1}
    assert report == json.loads((trained / "out.report.json").read_text())
    assert report["source"] == "training log" and report["log"] == {"since": 0, "steps": [1, 3], "notes": []}
    assert "from the training log, latest groups of steps 1 to 3" in report_text(report)


def test_order_in_the_file_is_not_order_in_time(trained):
    """Logs that were put together from several runs, or ranks, are not sorted by step."""
    lines = (trained / "completions.jsonl").read_text().splitlines(keepends=True)
    (trained / "completions.jsonl").write_text("".join(reversed(lines)))
    assert reselect(trained)[0] == ["steady", "early", "span"]


def test_early_steps_can_be_left_out(trained):
    """In the first steps the policy still learns the format; what it did not know then it may know by now."""
    kept, report = reselect(trained, since=2)
    assert kept == ["steady", "span"] and report["log"]["since"] == 2 and report["log"]["steps"] == [2, 3]
    assert report["unseen"] == {"kept": 0, "tasks": {"grounding": 1, "qa": 2}}
    with pytest.raises(ValueError, match="none of the 7 samples of .*x.jsonl occurs in it from step 4 on"):
        reselect(trained, since=4)


def test_samples_that_training_never_reached_are_reported_and_dropped_or_kept(trained):
    """Nothing is known of them: neither silently trained on nor silently lost."""
    dropped, report = reselect(trained)
    assert report["unseen"] == {"kept": 0, "tasks": {"grounding": 1, "qa": 1}}
    assert "never seen in training, and dropped (--unseen): grounding 1, qa 1" in report_text(report)
    assert report["total"] == 7 and report["kept"] == 3 and sum(report["bins"].values()) == 5
    kept, report = reselect(trained, unseen="keep")
    assert kept == ["steady", "early", "never", "span", "unseen"] and report["kept"] == 5  # in the order of the data
    assert report["unseen"]["kept"] == 2 and "and kept (--unseen)" in report_text(report)
    assert reselect(trained, control="easiest")[0] == ["moved", "early", "span"]


def test_a_killed_runs_last_line_and_group_are_left_out_and_said(trained):
    """Two of eight completions are no group, and half a line must not cost the other hundred thousand."""
    log = trained / "completions.jsonl"
    whole = log.read_text()
    half = logged("early", 4, [0, 0, 0, 0])
    line = "line {} is torn, as of a killed run: left out"
    group = "the last group, 'early' in step 4, has {} of 4 completions: left out"
    for torn, notes in ((half[0] + half[1][:30], [line.format(34), group.format(1)]),
                        (half[0][:30], [line.format(33)]),
                        ("".join(half[:3]), [group.format(3)])):
        log.write_text(whole + torn)
        kept, report = reselect(trained)
        assert kept == ["steady", "early", "span"] and report["log"]["notes"] == notes
        assert all(f"  {note}" in report_text(report).splitlines() for note in notes)
    log.write_text(whole + half[0][:30] + "\n" + half[0])
    with pytest.raises(ValueError, match="completions.jsonl:33: not a completion with 'id', 'step', 'parts' and"):
        reselect(trained)
    for wrong in ({"parts": {}}, {"step": None}, {"id": ["early"]}):
        log.write_text(whole + json.dumps({**json.loads(half[0]), **wrong}) + "\n")
        with pytest.raises(ValueError, match="completions.jsonl:33: not a completion"):
            reselect(trained)


def test_ids_that_a_joint_run_has_prefixed_are_found(trained):
    """Two data sets that number their samples alike get prefixes in training; their own files do not have them."""
    (trained / "y.jsonl").write_text((trained / "x.jsonl").read_text())
    ids = [sample["id"] for sample in load_samples([str(trained / "x.jsonl"), str(trained / "y.jsonl")])]
    assert ids[0] == "x/moved" and ids[7] == "y/moved"
    log = trained / "completions.jsonl"
    log.write_text(log.read_text().replace('"id": "', '"id": "x/') + "".join(logged("y/never", 3, [0, 1, 0, 1])))
    kept, report = reselect(trained)
    assert kept == ["steady", "early", "span"] and report["unseen"]["tasks"] == {"grounding": 1, "qa": 1}


def test_flags_of_a_training_log_are_refused_for_predictions(tmp_path):
    """A flag that does nothing is believed to do something."""
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample, _ in DISCRETE))
    file = tmp_path / "predictions.jsonl"
    file.write_text("".join(json.dumps(prediction) + "\n" for _, prediction in DISCRETE))
    for flags in ({"since": 3}, {"unseen": "drop"}):
        with pytest.raises(ValueError, match="predictions.jsonl: --since and --unseen are for the completions.jsonl"):
            write_selection(file, str(tmp_path / "x.jsonl"), tmp_path / "out.jsonl", {}, **flags)
    assert not (tmp_path / "out.jsonl").exists()


def test_an_unfinished_evaluation_says_how_to_go_on(tmp_path):
    """"No such file" sends the user to look for a misspelling."""
    (tmp_path / "x.jsonl").write_text(json.dumps(DISCRETE[0][0]) + "\n")
    file = tmp_path / "run" / "predictions.jsonl"
    with pytest.raises(FileNotFoundError, match="predictions.jsonl"):
        write_selection(file, str(tmp_path / "x.jsonl"), tmp_path / "out.jsonl", {})
    (tmp_path / "run" / "partial").mkdir(parents=True)
    with pytest.raises(ValueError, match="the evaluation is unfinished .*give the same eval.py command again"):
        write_selection(file, str(tmp_path / "x.jsonl"), tmp_path / "out.jsonl", {})
    file.write_text(json.dumps(DISCRETE[0][1]) + "\n")  # finished after all
    # ... and this question is always answered wrongly: an empty file would be blamed by the training it is given to.
    with pytest.raises(ValueError, match="nothing is worth keeping(?s:.*)all_wrong 1"):
        write_selection(file, str(tmp_path / "x.jsonl"), tmp_path / "out.jsonl", {})
    assert not (tmp_path / "out.jsonl").exists()


def test_the_data_is_not_overwritten_with_its_selection(trained):
    """`--data x.jsonl --out x.jsonl` would delete what was not selected."""
    before = (trained / "x.jsonl").read_text()
    with pytest.raises(ValueError, match="is the data itself"):
        write_selection(trained / "completions.jsonl", f"{trained / 'x.jsonl'}:5", trained / "y" / ".." / "x.jsonl", {})
    assert (trained / "x.jsonl").read_text() == before


def test_the_command_selects_from_a_log(trained, capsys):
    """Flags that do not arrive where they act are the easiest to overlook."""
    command = ["select", str(trained / "completions.jsonl"), "--data", str(trained / "x.jsonl"), "--out",
               str(trained / "out.jsonl"), "--since", "2", "--unseen", "keep"]
    assert run_command(parse_arguments(command)) == 0
    kept = [json.loads(line)["id"] for line in open(trained / "out.jsonl")]
    assert kept == ["steady", "early", "never", "span", "unseen"]
    assert run_command(parse_arguments(command[:-2])) == 0
    assert [json.loads(line)["id"] for line in open(trained / "out.jsonl")] == ["steady", "span"]
    assert capsys.readouterr().out.splitlines()[-1] == f"2 of 7 samples kept in {trained / 'out.jsonl'}"
