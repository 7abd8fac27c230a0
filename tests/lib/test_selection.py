"""Variance-aware selection against groups of scores whose bin a hand can tell."""

import json

import pytest
from made_samples import CONTINUOUS, DISCRETE, LETTERS, SPAN, group

from lib.selection import BINS, report_text, select


def chosen(groups, **options):
    return select([sample for sample, _ in groups], {p["id"]: p for _, p in groups}, **options)


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


def test_the_random_control_of_the_pool_has_the_mix_of_the_pool():
    """A selection that keeps mostly one task beats the pool by its mix alone; a control with the same mix cannot show it."""
    groups = [group(f"q{k}", LETTERS, [1, 1]) for k in range(60)]  # solved: none is selected
    groups += [group(f"s{k}", SPAN, [0.2, 0.8], "temporal_iou") for k in range(60)]
    kept, _ = chosen(groups)
    drawn, report = chosen(groups, control="random_pool", seed=1)
    assert len(drawn) == len(kept) == 60 and {i[0] for i in kept} == {"s"}
    assert 15 < sum(i[0] == "q" for i in drawn) < 45
    assert report["kept"] == sum(part["kept"] for part in report["tasks"].values()) == 60


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
    with pytest.raises(ValueError, match="unknown control 'easy'; there are random, random_pool, easiest, hardest"):
        chosen(DISCRETE, control="easy")


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


def test_a_task_that_is_dropped_as_a_whole_is_named():
    """Classification was solved after the warm start, so none of it was asked again, and one seed in three unlearned it."""
    told = "qa is not asked any more"
    solved = [(sample, prediction) for sample, prediction in DISCRETE if sample["id"] not in ("one", "seven")]
    assert told in report_text(chosen(solved + CONTINUOUS)[1])
    assert told not in report_text(chosen(DISCRETE + CONTINUOUS)[1])
    assert told not in report_text(chosen(solved)[1])  # nothing is asked: the run ends, and says that
