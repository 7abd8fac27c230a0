"""What others report on the same benchmarks, in one place, to stand beside a result of our own (`eval.py --benchmark`).

A number is comparable only where the metric, the data and the prompt are the same. They rarely are: `note` says what is
known to differ. Rows of the model "blind" are not published but computed, on the official annotation files, for answers
that never look at the video: a model that does not beat them has shown nothing.

Values lie in [0, 1], under our names for the metrics. Only what the papers print is here, and nothing is interpolated.
`source` names paper and table; the column is the metric. Tables 1 to 8 are VideoChat-R1's (arXiv 2504.06958); it took its
numbers with its own scripts, which drop samples that raise from the denominator, where ours count them 0.
"""

from typing import NamedTuple


class Row(NamedTuple):
    """One model's numbers on one benchmark."""

    benchmark: str
    model: str
    values: dict[str, float]
    source: str
    note: str = ""


BASE, R1, R1_THINKING = "Qwen2.5-VL-7B", "VideoChat-R1", "VideoChat-R1-thinking"
T1, T2, T3, T4, T5, T6, T7, T8 = (f"VideoChat-R1, Table {number}" for number in range(1, 9))
R1_5 = "VideoChat-R1.5"
TEMPORAL_R1 = "Temporal-R1, README"
QUOTED = "Temporal-RLT as quoted by "
OURS = "computed on the official annotations"
GQA_NOTE = "mIoU over sets of windows, as here; not the official mIoP and Acc@GQA"
JUDGED = "events extracted and judged by a model"
SHORT = "short videos only, without subtitles"
CLIPPED = "32 frames; said to use the clipped videos, which scores higher"


def grounding(miou: float, *recalls: float | None) -> dict[str, float]:
    """mIoU, R@0.3, R@0.5 and R@0.7 in per cent, as papers print them; None or left out where one is not reported."""
    names = ("grounding/mIoU", "grounding/R@0.3", "grounding/R@0.5", "grounding/R@0.7")
    return {name: value / 100 for name, value in zip(names, (miou, *recalls)) if value is not None}


def grounded(miou: float | None, accuracy: float | None) -> dict[str, float]:
    values = {"gqa/accuracy": accuracy, "gqa/mIoU": miou}
    return {name: value / 100 for name, value in values.items() if value is not None}


def tracking(overlap: float, recall: float, high: float | None = None, unseen: float | None = None) -> dict[str, float]:
    values = {"tracking/AO": overlap, "tracking/AO@2-7": unseen, "tracking/R@0.5": recall, "tracking/R@0.7": high}
    return {name: value / 100 for name, value in values.items() if value is not None}


def accuracy(value: float, task: str = "qa") -> dict[str, float]:
    return {f"{task}/accuracy": value / 100}


def caption(f1: float, precision: float, recall: float) -> dict[str, float]:
    values = {"captioning/F1": f1, "captioning/recall": recall, "captioning/precision": precision}
    return {name: value / 100 for name, value in values.items()}


ROWS = [
    Row("charades_sta", "blind: whole video", grounding(26.99, 34.3, 0.4, 0.0), OURS),
    Row("charades_sta", "blind: best constant span", grounding(30.6, 48.5, 27.9, 12.5), OURS,
        "above the base model's row in all four columns"),
    Row("charades_sta", BASE, grounding(29.0, 44.7, 24.2, 11.1), T3, "answer prompt; others get 43.6 to 52.9, below"),
    Row("charades_sta", f"{BASE}, think prompt", grounding(28.1, 41.8, 23.4, 11.1), T3),
    Row("charades_sta", f"{BASE}, better prompt", grounding(43.6), "Qwen report, by an issue of VideoChat-R1"),
    Row("charades_sta", f"{BASE}, best prompt", grounding(52.9, 77.7, 59.6, 34.8), "VideoAuto-R1"),
    Row("charades_sta", "SFT, 1 epoch", grounding(46.3, 63.9, 45.0, 25.3), T3, "the prompt is trained too"),
    Row("charades_sta", "SFT, 3 epochs", grounding(34.6, 51.7, 36.3, 20.6), T3, "the prompt is trained too"),
    Row("charades_sta", "SFT, tuned", grounding(56.3), "VideoAuto-R1"),
    Row("charades_sta", "GRPO on Charades, answer prompt", grounding(58.7, 80.9, 67.7, 45.4), T3),
    Row("charades_sta", "GRPO on Charades", grounding(59.3, 81.7, 70.4, 46.0), T3),
    Row("charades_sta", "GRPO on Charades, 3 epochs", grounding(61.3, 83.1, 72.8, 51.5), T3),
    Row("charades_sta", "GRPO on Charades and NExT-GQA", grounding(59.8, None, 69.7, 47.0), T2),
    Row("charades_sta", R1, grounding(60.8, None, 71.7, 50.2), T1, "a user of the released model measured mIoU 0.582"),
    Row("charades_sta", R1_THINKING, grounding(59.9, None, 70.6, 47.2), T1),
    Row("charades_sta", R1_5, grounding(60.6), R1_5, "several looks"),
    Row("charades_sta", "Qwen2.5-VL-3B", grounding(37.22), TEMPORAL_R1, "free-form answers are often unparsable there"),
    Row("charades_sta", "Temporal-R1-3B, SFT", grounding(45.95), TEMPORAL_R1),
    Row("charades_sta", "Temporal-R1-3B, answer only", grounding(51.10), TEMPORAL_R1),
    Row("charades_sta", "Temporal-R1-3B", grounding(53.93), TEMPORAL_R1),
    Row("charades_sta", "Temporal-RLT-7B", grounding(57.0, 79.6, 67.9, 44.1), QUOTED + "VideoAuto-R1, Table 4"),
    Row("charades_sta", "Temporal-RLT-7B ", grounding(57.9, 80.2, 68.3, 44.5), QUOTED + "OneThinker, Table 4"),

    Row("activitynet", "blind: whole video", grounding(34.57, 48.0, 21.2, 12.4), OURS),
    Row("activitynet", BASE, grounding(21.1, 28.3, 15.8, 7.4), T3, "R@0.7 is 0.075 in Table 1"),
    Row("activitynet", f"{BASE}, best prompt", grounding(26.9, 37.9, 22.6, 10.6), "VideoAuto-R1, Table 4"),
    Row("activitynet", f"{BASE}, think prompt", grounding(17.7, 22.7, 13.4, 7.7), T3),
    Row("activitynet", "SFT on Charades, 1 epoch", grounding(20.6, 30.2, 16.7, 7.9), T3),
    Row("activitynet", "SFT on Charades, 3 epochs", grounding(17.3, 26.1, 10.0, 3.9), T3),
    Row("activitynet", "GRPO on Charades, answer prompt", grounding(31.9, 46.3, 28.8, 14.1), T3),
    Row("activitynet", "GRPO on Charades", grounding(30.7, 45.0, 27.5, 12.9), T3),
    Row("activitynet", "GRPO on Charades, 3 epochs", grounding(34.3, 50.4, 32.2, 16.2), T3),
    Row("activitynet", R1, grounding(36.6, None, 33.4, 17.7), T1, "not trained on it"),
    Row("activitynet", R1_THINKING, grounding(35.5, None, 33.3, 16.7), T1, "not trained on it"),
    Row("activitynet", R1_5, grounding(35.3), R1_5, "several looks"),
    Row("activitynet", "Qwen2.5-VL-3B", grounding(18.92), TEMPORAL_R1),
    Row("activitynet", "Temporal-R1-3B, SFT", grounding(20.86), TEMPORAL_R1, "not trained on it"),
    Row("activitynet", "Temporal-R1-3B", grounding(23.07), TEMPORAL_R1, "not trained on it"),
    Row("activitynet", "Temporal-RLT-7B", grounding(39.0, 56.9, 38.4, 20.2), QUOTED + "VideoAuto-R1, Table 4"),
    Row("activitynet", "Temporal-RLT-7B ", grounding(39.1), QUOTED + "OneThinker, Table 4"),
    Row("activitynet_rtl", "Temporal-RLT-7B", grounding(26.3, 40.2, 22.7, 10.9), QUOTED + "OneThinker, Table 4"),
    Row("rextime", "Temporal-RLT-7B", grounding(39.0), QUOTED + "VITAL"),

    Row("nextgqa", "blind: whole video", grounded(22.65, None), OURS, GQA_NOTE),
    Row("nextgqa", BASE, grounded(15.4, 59.5), T5, GQA_NOTE),
    Row("nextgqa", f"{BASE}, think prompt", grounded(20.2, 53.3), T5, GQA_NOTE),
    Row("nextgqa", "SFT", grounded(28.2, 64.8), T5, GQA_NOTE),
    Row("nextgqa", "GRPO on NExT-GQA", grounded(35.1, 68.7), T5, GQA_NOTE),
    Row("nextgqa", "GRPO on NExT-GQA, think prompt", grounded(32.9, 66.9), T5, GQA_NOTE),
    Row("nextgqa", "GRPO on answers only", grounded(16.2, 70.2), T5, GQA_NOTE),
    Row("nextgqa", R1, grounded(32.4, 70.6), T1, GQA_NOTE),
    Row("nextgqa", R1_THINKING, grounded(36.1, 69.2), T1, GQA_NOTE),
    Row("nextgqa", "Temporal-RLT-7B", grounded(37.3, 78.7), QUOTED + "VideoAuto-R1, Table 4",
        "the base model there: 0.202 and 0.533"),

    Row("got10k", "blind: start box copied", tracking(42.35, 32.2, 5.6, unseen=25.8), OURS),
    Row("got10k", "blind: start box, then 20 % to the centre", tracking(43.24, 36.1, 5.0), OURS),
    Row("got10k", BASE, tracking(12.6, 1.1, 0.0), T4, "answers in pixels, as that model was trained to"),
    Row("got10k", "SFT on GOT-10k", tracking(41.8, 29.5, 3.9), T4),
    Row("got10k", "GRPO on GOT-10k", tracking(42.5, 30.6, 3.9), T4),
    Row("got10k", R1, tracking(43.8, 38.2), T1),
    Row("got10k", R1_THINKING, tracking(43.3, 33.9), T1),

    Row("videomme", BASE, accuracy(71.3), T1, SHORT),
    Row("videomme", "SFT on GOT-10k", accuracy(59.2), T1, SHORT),
    Row("videomme", "SFT on NExT-GQA", accuracy(60.1), T1, SHORT),
    Row("videomme", R1, accuracy(72.2), T1, SHORT),
    Row("videomme", R1_THINKING, accuracy(74.2), T1, SHORT),
    Row("videomme", f"{BASE}, one look", accuracy(64.4), T8, "all lengths"),
    Row("videomme", f"{BASE}, second look", accuracy(63.3), T8, "all lengths"),
    Row("videomme", f"{R1_THINKING}, one look", accuracy(62.1), T8, "all lengths"),
    Row("videomme", f"{R1_THINKING}, second look", accuracy(63.6), T8, "all lengths"),
    Row("videomme", R1_5, accuracy(65.2), R1_5, "several looks"),
    Row("videomme", "Temporal-RLT-7B", accuracy(57.6), QUOTED + "VideoAuto-R1, Table 3", "all lengths; 32 frames"),
    Row("mvbench", BASE, accuracy(66.9), T1),
    Row("mvbench", "SFT on GOT-10k", accuracy(58.6), T1),
    Row("mvbench", "SFT on NExT-GQA", accuracy(59.2), T1),
    Row("mvbench", R1, accuracy(67.9), T1),
    Row("mvbench", R1_THINKING, accuracy(66.2), T1),
    Row("mvbench", R1_5, accuracy(70.6), R1_5, "several looks"),
    Row("mvbench", "Qwen2.5-VL-3B", accuracy(63.35), TEMPORAL_R1),
    Row("mvbench", "Temporal-R1-3B", accuracy(59.6), TEMPORAL_R1, "trained on Charades only"),
    Row("mvbench", "Temporal-RLT-7B", accuracy(68.1), QUOTED + "VideoAuto-R1, Table 3", CLIPPED),
    Row("perception_test", BASE, accuracy(69.1), T1),
    Row("perception_test", "SFT on GOT-10k", accuracy(58.5), T1),
    Row("perception_test", "SFT on NExT-GQA", accuracy(60.7), T1),
    Row("perception_test", R1, accuracy(70.0), T1),
    Row("perception_test", R1_THINKING, accuracy(69.6), T1),
    Row("mmvu", "Temporal-RLT-7B", accuracy(65.0), QUOTED + "VideoAuto-R1, Table 3", "multiple choice; 32 frames"),

    Row("longvideobench", f"{BASE}, one look", accuracy(56.0), T8),
    Row("longvideobench", f"{BASE}, second look", accuracy(55.2), T8),
    Row("longvideobench", f"{R1_THINKING}, one look", accuracy(51.9), T8),
    Row("longvideobench", f"{R1_THINKING}, second look", accuracy(58.2), T8),

    Row("vidtab_qa", BASE, accuracy(70.7, "classification"), T6),
    Row("vidtab_qa", "SFT", accuracy(71.7, "classification"), T6),
    Row("vidtab_qa", "GRPO", accuracy(72.6, "classification"), T6),
    Row("dream1k", "Qwen2-VL-7B", caption(30.6, 33.8, 27.9), T6, JUDGED),
    Row("dream1k", "SFT", caption(31.4, 32.6, 30.2), T6, JUDGED),
    Row("dream1k", "GRPO", caption(38.2, 45.4, 33.1), T6, JUDGED),
    Row("dream1k", "GRPO, GPT-3.5 as its judge in training", caption(37.9, 44.4, 33.0), T7, JUDGED),
]

BENCHMARKS = tuple(dict.fromkeys(row.benchmark for row in ROWS))


def rows_of(benchmark: str) -> list[Row]:
    return [row for row in ROWS if row.benchmark == benchmark]
