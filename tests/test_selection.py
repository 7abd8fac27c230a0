"""Variance-aware selection against groups of scores whose bin a hand can tell."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import data
from selection import BINS, read_predictions, select

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


def test_missing_and_single_predictions_are_named():
    """Treating them as 0 drops good samples; skipping them, without a word, does too."""
    (sample, prediction), *_ = DISCRETE
    with pytest.raises(ValueError, match=r"no prediction for sample 'wrong' \(1 of 1 are missing\)"):
        select([sample], {})
    with pytest.raises(ValueError, match="sample 'single' has 1 completions; a spread needs at least 2"):
        chosen([group("single", LETTERS, [1])])
    with pytest.raises(ValueError, match="unknown control"):
        chosen(DISCRETE, control="easy")


def test_predictions_that_are_none_are_named_by_line(tmp_path):
    """Half a line is what a run that was killed leaves behind."""
    file = tmp_path / "predictions.jsonl"
    prediction = DISCRETE[0][1]
    for second, words in ((json.dumps(prediction)[:20], "not a prediction"), ('{"id": "x"}', "not a prediction"),
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
    assert data.run_command(data.parse_arguments(command[2:])) == 0 and "4 of 8 samples kept" in capsys.readouterr().out
    written = [json.loads(line) for line in open(tmp_path / "new" / "selected.jsonl", encoding="utf-8")]
    assert written == [sample for sample in samples if sample["id"] in ("one", "seven", "varied", "lucky")]
    report = json.loads((tmp_path / "new" / "selected.report.json").read_text())
    assert report["bins"]["mixed"] == 2 and report["tasks"]["grounding"]["min_mean"] == 0.03
    predictions.write_text("")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "no prediction for sample 'wrong'" in done.stderr and "Traceback" not in done.stderr
