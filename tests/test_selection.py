"""Variance-aware selection against groups of scores whose bin a hand can tell."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import data
import grpo
import rewards
import train
from lib.samples import load_samples
from lib.selection import BINS, report_text, select
from tools.data_commands import parse_arguments, run_command
from tools.select import read_predictions, write_selection

LETTERS = {"task": "qa", "question": "?", "options": ["a", "b"], "answer": "A"}
SPAN = {"task": "grounding", "question": "?", "spans": [[0, 1]]}


def group(name, sample, scores, part="accuracy", formats=None, reasons=None):
    """A sample, and the prediction of its K completions with these task scores."""
    formats = formats or [1.0] * len(scores)
    parts = [{part: float(score), "format": float(f)} for score, f in zip(scores, formats)]
    prediction = {"id": name, "task": sample["task"], "completions": [""] * len(scores), "parts": parts,
                  "rewards": [sum(p.values()) for p in parts], "reasons": reasons or ["ok"] * len(scores)}
    return {**sample, "id": name}, prediction


def chosen(groups, **options):
    return select([sample for sample, _ in groups], {p["id"]: p for _, p in groups}, **options)


DISCRETE = [group("wrong", LETTERS, [0] * 8), group("one", LETTERS, [0] * 7 + [1]), group("right", LETTERS, [1] * 8),
            group("seven", LETTERS, [1] * 7 + [0])]
CONTINUOUS = [group(name, SPAN, scores, "temporal_iou") for name, scores in [
    ("poor", [0.0] * 8),
    ("good", [0.95, 1.0] * 4),  # std 0.027
    ("varied", [0.2, 0.6] * 4),  # mean 0.4, std 0.214
    ("lucky", [0.0] * 7 + [0.3]),  # mean 0.0375, std 0.106
]]


def test_mixed_answers_are_kept_and_unanimous_ones_dropped():
    """A group that is all right or all wrong has advantage 0 everywhere: eight completions for no gradient."""
    kept, report = chosen(DISCRETE)
    assert kept == ["one", "seven"]
    assert report["bins"] == {**dict.fromkeys(BINS, 0), "all_wrong": 1, "all_right": 1, "mixed": 2}
    assert (report["total"], report["kept"]) == (4, 2)


def test_continuous_answers_need_spread_and_a_floor():
    """Spread alone keeps noise: a sample that is hit once in eight by luck teaches luck."""
    kept, report = chosen(CONTINUOUS, min_std=0.1, min_mean=0.1)
    assert kept == ["varied"]
    assert report["bins"] == {**dict.fromkeys(BINS, 0), "low_variance_poor": 1, "low_variance_good": 1,
                              "high_variance_good": 1, "high_variance_poor": 1}
    assert chosen(CONTINUOUS, min_std=0.1, min_mean=0.03)[0] == ["varied", "lucky"]
    assert chosen(CONTINUOUS, min_std=0.02, min_mean=0.1)[0] == ["good", "varied"]
    assert chosen(CONTINUOUS, min_std=0.0, min_mean=0.0)[0] == ["good", "varied", "lucky"]  # never without any spread


def test_the_spread_is_the_unbiased_one_and_thresholds_are_inclusive():
    """ddof 0 gives 0.2 for this group of two, ddof 1 0.2828."""
    pair = [group("pair", SPAN, [0.2, 0.6], "temporal_iou")]
    assert chosen(pair, min_std=0.2828, min_mean=0.4)[0] == ["pair"]
    assert chosen(pair, min_std=0.2829, min_mean=0.4)[0] == []


def test_format_does_not_count():
    """Format varies most in the beginning, and for every sample alike: it says nothing about the sample."""
    groups = [group("f", LETTERS, [1] * 4, formats=[0, 1, 0, 1]),
              group("g", SPAN, [0.5] * 4, "temporal_iou", [0, 1, 0, 1])]
    kept, report = chosen(groups)
    assert kept == [] and report["bins"]["all_right"] == 1 and report["bins"]["low_variance_good"] == 1


def test_a_grounded_question_is_judged_by_letter_and_window_together():
    """gqa has two parts beside the format; its task score is their mean."""
    sample = {**LETTERS, "id": "x", "task": "gqa", "spans": [[0, 1]]}
    parts = [{"temporal_iou": iou, "accuracy": right, "format": 1.0}
             for iou, right in ((0.4, 0.0), (0.0, 1.0), (0.6, 1.0))]
    prediction = {"id": "x", "parts": parts, "reasons": ["ok"] * 3}  # scores 0.2, 0.5, 0.8: mean 0.5, std 0.3
    for min_std, min_mean, name in ((0.29, 0.49, "high_variance_good"), (0.31, 0.49, "low_variance_good"),
                                    (0.29, 0.51, "high_variance_poor"), (0.31, 0.51, "low_variance_poor")):
        assert select([sample], {"x": prediction}, min_std=min_std, min_mean=min_mean)[1]["bins"][name] == 1


def test_quantiles_are_of_the_tasks_own_samples():
    """Boxes and spans spread differently: one number for both keeps one task and drops the other."""
    boxes = {"task": "tracking", "question": "?", "boxes": [[0, 0, 1, 1]] * 8}
    groups = [group(f"s{k}", SPAN, [0.5 - k / 20, 0.5 + k / 20], "temporal_iou") for k in range(5)]
    groups += [group(f"b{k}", boxes, [0.5 - k / 200, 0.5 + k / 200], "box_iou") for k in range(5)]
    kept, report = chosen(groups, std_quantile=0.6, min_mean=0.1)
    assert kept == ["s3", "s4", "b3", "b4"]
    thresholds = [report["tasks"][task]["min_std"] for task in ("grounding", "tracking")]
    # The quantile 0.6 of five values lies 0.4 of the way from the third to the fourth; std = 2 * (k / 20) / sqrt(2).
    assert thresholds == pytest.approx([2.4 / 20 * 2**0.5, 2.4 / 200 * 2**0.5])
    assert chosen(groups, min_std=0.01, mean_quantile=1.0)[1]["tasks"]["grounding"]["min_mean"] == 0.5


def test_a_video_that_could_not_be_read_falls_into_the_poor_bins():
    """Whatever stands in for its completions, it is no sample to train on."""
    unreadable = ["unreadable_video"]
    groups = [group("a", LETTERS, [0], reasons=unreadable),
              group("b", SPAN, [0] * 8, "temporal_iou", reasons=unreadable * 8)]
    groups[0][1]["parts"] = []
    kept, report = chosen(groups)
    assert kept == [] and report["bins"]["all_wrong"] == 1 and report["bins"]["low_variance_poor"] == 1


def test_the_histogram_and_the_counts_account_for_every_sample():
    """A report whose bins do not add up to the data hides what was dropped."""
    _, report = chosen(DISCRETE + CONTINUOUS)
    histogram = report["tasks"]["grounding"]["histogram"]
    assert sum(map(sum, histogram["counts"])) == 4 == report["tasks"]["grounding"]["total"]
    assert histogram["counts"][4][2] == 1  # "varied": mean 0.4, std 0.214
    assert len(histogram["mean_edges"]) == len(histogram["counts"]) + 1
    assert len(histogram["std_edges"]) == len(histogram["counts"][0]) + 1
    assert sum(report["bins"].values()) == 8 and report["tasks"]["qa"]["right_of_k"]["1/8"] == 1
    assert json.loads(json.dumps(report)) == report


def test_the_random_control_is_equally_large_in_every_task():
    """"Selected beats random" means nothing if random has more samples, or other tasks."""
    groups = [group(f"q{k}", LETTERS, [1, k % 2]) for k in range(40)]
    groups += [group(f"s{k}", SPAN, [0.5, k % 4 / 4], "temporal_iou") for k in range(40)]
    kept, report = chosen(groups)
    drawn, control = chosen(groups, control="random", seed=1)
    assert [sum(i[0] == task for i in drawn) for task in "qs"] == [sum(i[0] == task for i in kept) for task in "qs"]
    assert drawn != kept and drawn == chosen(groups, control="random", seed=1)[0]
    assert drawn != chosen(groups, control="random", seed=2)[0]
    assert drawn == sorted(drawn, key=[sample["id"] for sample, _ in groups].index)  # in the order of the data
    assert control["bins"] == report["bins"] and control["kept"] == report["kept"] and control["control"] == "random"


def test_easiest_and_hardest_are_as_many_of_the_highest_and_lowest_mean():
    """Without them, "variance" may be nothing but "not too easy"; in file order, a tie would always go to the first."""
    rows = {"a": [1, 1, 1, 1], "b": [1, 1, 1, 0], "c": [0, 0, 0, 1], "d": [0, 0, 0, 0]}
    groups = [group(name, LETTERS, scores) for name, scores in rows.items()]
    assert chosen(groups, control="easiest")[0] == ["a", "b"]
    assert chosen(groups, control="hardest")[0] == ["c", "d"]
    groups += [group(f"s{k}", SPAN, [0.1 * k, 0.1 * k + 0.2], "temporal_iou") for k in range(5)]  # means 0.1 to 0.5
    kept = chosen(groups, min_mean=0.35)[0]
    assert kept == ["b", "c", "s3", "s4"]  # as many of each task: two questions and two events
    assert chosen(groups, min_mean=0.35, control="hardest")[0] == ["c", "d", "s0", "s1"]
    ties = [group(f"t{k}", LETTERS, [1, int(k > 1)]) for k in range(8)]  # two mixed ones, six that are always right
    drawn = {tuple(chosen(ties, control="easiest", seed=seed)[0]) for seed in range(5)}
    assert len(drawn) > 1 and all(len(ids) == 2 and not {"t0", "t1"} & set(ids) for ids in drawn)
    assert chosen(ties, control="hardest")[0] == ["t0", "t1"]


@pytest.mark.parametrize("control", ["random", "easiest", "hardest"])
@pytest.mark.parametrize("reason", ["unreadable_video", "prompt_too_long"])
def test_no_control_takes_what_nobody_can_train_on(control, reason):
    """Unreadable videos score 0 and would fill the hardest half: the comparison then is with fewer samples."""
    groups = [group(f"u{k}", LETTERS, [0] * 4, reasons=[reason] * 4) for k in range(20)]
    groups += [group(f"m{k}", LETTERS, [0, 1, 0, 1]) for k in range(3)]
    assert chosen(groups, control=control)[0] == ["m0", "m1", "m2"]


def test_missing_and_single_predictions_are_named():
    """Treating them as 0 drops good samples; skipping them, without a word, does too."""
    (sample, prediction), *_ = DISCRETE
    with pytest.raises(ValueError, match=r"no prediction for sample 'wrong' \(1 of 1 are missing\)"):
        select([sample], {})
    with pytest.raises(ValueError, match="sample 'single' has 1 completions; a spread needs at least 2"):
        chosen([group("single", LETTERS, [1])])
    with pytest.raises(ValueError, match="unknown control 'easy'; there are random, easiest, hardest"):
        chosen(DISCRETE, control="easy")


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


def test_the_command_writes_the_kept_lines_as_they_were_and_the_report(tmp_path, capsys):
    """The selection is training data: a field lost or reformatted here is lost for training."""
    samples = [{**sample, "video": "v.mp4", "note": "ü"} for sample, _ in DISCRETE + CONTINUOUS]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    predictions = tmp_path / "run" / "predictions.jsonl"
    predictions.parent.mkdir()
    predictions.write_text("".join(json.dumps(p) + "\n" for _, p in reversed(DISCRETE + CONTINUOUS)))
    command = [sys.executable, str(Path(__file__).parent.parent / "data.py"), "select", str(predictions), "--data",
               str(tmp_path / "x.jsonl"), "--out", str(tmp_path / "new" / "selected.jsonl"),
               "--min_mean", "0.03"]
    assert run_command(parse_arguments(command[2:])) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("selected 4 of 8 samples\n") and "4 of 8 samples kept in" in printed.splitlines()[-1]
    assert "high_variance_good 2" in printed and "grounding: 2 of 4, std at least 0.1, mean 0.03\n" in printed
    written = [json.loads(line) for line in open(tmp_path / "new" / "selected.jsonl", encoding="utf-8")]
    assert written == [sample for sample in samples if sample["id"] in ("one", "seven", "varied", "lucky")]
    report = json.loads((tmp_path / "new" / "selected.report.json").read_text())
    assert report["bins"]["mixed"] == 2 and report["tasks"]["grounding"]["min_mean"] == 0.03
    assert report["source"] == "predictions"
    predictions.write_text("")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "no prediction for sample 'wrong'" in done.stderr and "Traceback" not in done.stderr


# ---- what is printed ------------------------------------------------------------------------------------------------


def test_the_printed_report_shows_every_sample_in_its_cell():
    """A histogram with its axes swapped, or upside down, still looks like one."""
    _, report = chosen(DISCRETE + CONTINUOUS, control="random")
    lines = report_text(report).splitlines()
    assert lines[:3] == ["selected 3 of 8 samples, chosen by the control 'random'",
                         "  grounding: 1 of 4, std at least 0.1, mean 0.1",
                         "    low_variance_poor 1, low_variance_good 1, high_variance_poor 1, high_variance_good 1"]
    table = [line.split() for line in lines[3:14]]
    assert table[0] == ["mean", "/", "std", *(f"{0.075 * k:.3f}" for k in range(10))]
    rows = {row[0]: row[1:] for row in table[1:]}
    assert list(rows) == [f"{k / 10:.1f}" for k in range(9, -1, -1)]
    # "good": mean 0.975, std 0.027; "varied": 0.4, 0.214; "poor": 0, 0; "lucky": 0.0375, 0.106
    full = {(mean, column): cell for mean, row in rows.items() for column, cell in enumerate(row) if cell != "."}
    assert full == {("0.9", 0): "1", ("0.4", 2): "1", ("0.0", 0): "1", ("0.0", 1): "1"}
    assert lines[14:] == ["  qa: 2 of 4", "    all_wrong 1, all_right 1, mixed 2",
                          "    right of K   0/8   1/8   7/8   8/8", "       samples     1     1     1     1"]


def test_columns_stay_below_each_other_however_large_the_counts():
    """A count of six digits pushes its neighbours to the right, and every cell is read one column off."""
    _, report = chosen(DISCRETE + CONTINUOUS)
    report["tasks"]["grounding"]["histogram"]["counts"][0][0] = 123456
    report["tasks"]["qa"]["right_of_k"] = {f"{k}/64": 10**k for k in range(12)}
    lines = report_text(report).splitlines()
    assert len({len(line) for line in lines[3:14]}) == 1 and lines[13].split()[:2] == ["0.0", "123456"]
    assert len(lines[16]) == len(lines[17]) and len(lines[18]) == len(lines[19])
    assert lines[18].split()[3:] == ["10/64", "11/64"] and lines[19].split()[1:] == ["1" + "0" * 10, "1" + "0" * 11]


# ---- from the log of training ---------------------------------------------------------------------------------------


def logged(name, step, scores, part="accuracy", reason="ok"):
    """The lines that training writes for one group, by its own function."""
    scores = [rewards.Score(score + 1.0, {part: float(score), "format": 1.0}, reason) for score in scores]
    prompt = data.Prompt({"id": name}, *[None] * 5)
    group = grpo.Group(prompt, *[None] * 3, ["<answer>A</answer>"] * len(scores), scores, [reason] * len(scores),
                       torch.zeros(len(scores)), None)
    return [json.dumps(record) + "\n" for record in train.records(group, step)]


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
