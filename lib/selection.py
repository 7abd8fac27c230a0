"""Variance-aware selection: which samples teach the initial policy anything (Temporal-RLT, data selection).

The advantage of a completion is its distance from the mean of its group. A sample that the policy always gets wrong, or
always right, gives a group without distances and so without gradient. K completions of the initial policy show which:

    discrete   (qa, classification)       all_wrong, all_right dropped; mixed kept
    continuous (grounding, moments, gqa,  low_variance_poor, low_variance_good dropped; high_variance_good kept;
                tracking, captioning)     high_variance_poor, below the quality floor, dropped

Continuous is a task whose reward has a continuous part (`REWARDS` in rewards.py).

The paper publishes neither K nor its thresholds. Ours, K = 8 at temperature 1 and the two numbers below, are no more
than ours. The report therefore shows every count, and `control` selects as many samples by another rule (by chance,
the easiest, the hardest), so that "selected beats random" can be tested.
"""

import random
import statistics
from collections import Counter

import numpy as np

from rewards import reward_of, task_score

BINS = ("all_wrong", "all_right", "mixed",
        "low_variance_poor", "low_variance_good", "high_variance_poor", "high_variance_good")
KEPT_BINS = ("mixed", "high_variance_good")
MIN_STD, MIN_MEAN = 0.1, 0.1  # of the task score of K completions
CONTROLS = ("random", "random_pool", "easiest", "hardest")
UNANSWERED = {"unreadable_video", "prompt_too_long"}  # reasons of a sample that the model was never shown


# ---- choosing -------------------------------------------------------------------------------------------------------


def is_answered(prediction: dict) -> bool:
    return not prediction.get("reasons") or not set(prediction["reasons"]) <= UNANSWERED


def task_scores(prediction: dict) -> list[float]:
    """The K task scores: the mean of the parts without `format`, which every sample learns to satisfy alike."""
    scores = [task_score(parts) for parts in prediction["parts"]]
    # A video that could not be read has no completions to vary: as poor as can be, and not worth a seat.
    if not is_answered(prediction):
        scores = [0.0, 0.0]
    if len(scores) < 2:
        raise ValueError(f"sample {prediction['id']!r} has {len(scores)} completions; a spread needs at least 2, run "
                         "eval.py with --num_samples 8")
    return scores


def select(samples: list[dict], predictions: dict[str, dict], *, min_std: float = MIN_STD, min_mean: float = MIN_MEAN,
           std_quantile: float | None = None, mean_quantile: float | None = None, control: str | None = None,
           seed: int = 0) -> tuple[list[str], dict]:
    """Ids worth training on, in the order of `samples`, and the report (a dict for JSON).

    Continuous tasks keep std >= s and mean >= m; s and m are `min_std` and `min_mean`, or these quantiles of the task's
    own samples. `control` keeps as many of each task, but others: "random" draws them with `seed`, "easiest" and
    "hardest" take those of the highest and the lowest mean task score; the report's bins stay as measured. These
    inherit the selection's mix of tasks; "random_pool" draws as many in all, whatever their task. ValueError
    names a sample without a prediction, or with fewer than two completions.
    """
    missing = [sample["id"] for sample in samples if sample["id"] not in predictions]
    if missing:
        raise ValueError(f"no prediction for sample {missing[0]!r} ({len(missing)} of {len(samples)} are missing); run "
                         "eval.py on this very file, or name the part it was run on (x.jsonl:N; with eval.py --tasks, a file "
                         "of these tasks alone)")
    if control not in (None, *CONTROLS):
        raise ValueError(f"unknown control {control!r}; there are {', '.join(CONTROLS)}")
    kept, tasks = set(), {}
    for task in sorted({sample["task"] for sample in samples}):
        ids = [sample["id"] for sample in samples if sample["task"] == task]
        scores = [task_scores(predictions[i]) for i in ids]
        bins, report = (_continuous_bins(scores, min_std, min_mean, std_quantile, mean_quantile)
                        if reward_of(task).continuous else _discrete_bins(scores))
        chosen = [i for i, name in zip(ids, bins) if name in KEPT_BINS]
        if control and control != "random_pool":
            means = {i: statistics.fmean(row) for i, row in zip(ids, scores) if is_answered(predictions[i])}
            chosen = _control(control, means, len(chosen), random.Random(f"{seed} {task}"))
        kept.update(chosen)
        tasks[task] = {"total": len(ids), "kept": len(chosen),
                       "bins": {name: bins.count(name) for name in BINS}, **report}
    if control == "random_pool":
        answered = [sample["id"] for sample in samples if is_answered(predictions[sample["id"]])]
        kept = set(random.Random(f"{seed} pool").sample(answered, len(kept)))
        for task in tasks:
            tasks[task]["kept"] = sum(sample["task"] == task and sample["id"] in kept for sample in samples)
    report = {"source": "predictions", "total": len(samples), "kept": len(kept), "control": control, "seed": seed,
              "tasks": tasks, "bins": {name: sum(task["bins"][name] for task in tasks.values()) for name in BINS}}
    return [sample["id"] for sample in samples if sample["id"] in kept], report


def _control(control: str, means: dict[str, float], count: int, rng: random.Random) -> list[str]:
    """`count` ids of one task by another rule than spread. `means` has those that were answered: a video that cannot be
    read would be among the hardest, and nobody can train on it."""
    if control == "random":
        return rng.sample(list(means), count)
    by_chance = rng.sample(list(means), len(means))  # many have a mean of 0 or 1: among equals chance decides
    return sorted(by_chance, key=means.get, reverse=control == "easiest")[:count]


def _discrete_bins(scores: list[list[float]]) -> tuple[list[str], dict]:
    """One bin a sample, by how many of its K answers are right."""
    right = [sum(score > 0.5 for score in row) for row in scores]
    bins = ["all_wrong" if count == 0 else "all_right" if count == len(row) else "mixed"
            for count, row in zip(right, scores)]
    counts = Counter(zip(right, map(len, scores)))
    return bins, {"right_of_k": {f"{c}/{k}": n for (c, k), n in sorted(counts.items())}}


def _continuous_bins(scores: list[list[float]], min_std: float, min_mean: float, std_quantile: float | None,
                     mean_quantile: float | None) -> tuple[list[str], dict]:
    """One bin a sample, by mean and spread (ddof 1) of its K scores; and the thresholds and histogram behind them."""
    means, stds = [statistics.fmean(row) for row in scores], [statistics.stdev(row) for row in scores]
    if std_quantile is not None:
        min_std = float(np.quantile(stds, std_quantile))
    if mean_quantile is not None:
        min_mean = float(np.quantile(means, mean_quantile))
    # std > 0: a low quantile can be 0, and a group without any spread carries no gradient whatever the threshold.
    bins = [("high" if std >= min_std and std > 0 else "low") + "_variance_" + ("good" if mean >= min_mean else "poor")
            for mean, std in zip(means, stds)]
    # Scores lie in [0, 1], so their spread is at most 1 / sqrt(2), for two completions 0 and 1.
    counts, mean_edges, std_edges = np.histogram2d(means, stds, bins=[10, 10], range=[[0, 1], [0, 0.75]])
    histogram = {"mean_edges": mean_edges.round(6).tolist(), "std_edges": std_edges.round(6).tolist(),
                 "counts": counts.astype(int).tolist()}  # counts[mean bin][std bin]
    return bins, {"min_std": min_std, "min_mean": min_mean, "histogram": histogram}


# ---- saying what was chosen -----------------------------------------------------------------------------------------


def report_text(report: dict) -> str:
    """The report of `select` or `write_selection` for a reader: per task its thresholds, bins and histogram."""
    rule = f", chosen by the control {report['control']!r}" if report["control"] else ""
    lines = [f"selected {report['kept']} of {report['total']} samples{rule}"]
    if log := report.get("log"):
        lines += [f"  from the training log, latest groups of steps {log['steps'][0]} to {log['steps'][1]}",
                  *(f"  {note}" for note in log["notes"])]
    if (unseen := report.get("unseen")) and unseen["tasks"]:
        counts = ", ".join(f"{task} {count}" for task, count in unseen["tasks"].items())
        lines.append(f"  never seen in training, and {'kept' if unseen['kept'] else 'dropped'} (--unseen): {counts}")
    for task, part in report["tasks"].items():
        least = f", std at least {part['min_std']:.3g}, mean {part['min_mean']:.3g}" if "min_std" in part else ""
        lines += [f"  {task}: {part['kept']} of {part['total']}{least}",
                  "    " + ", ".join(f"{name} {count}" for name, count in part["bins"].items() if count),
                  *(_grid(**part["histogram"]) if "histogram" in part else _right_of_k(part["right_of_k"]))]
        if part["kept"] == 0 and report["kept"]:
            lines.append(f"    {task} is not asked any more: training on the other tasks may unlearn it (docs/log.md)")
    return "\n".join(lines)


def _grid(mean_edges: list[float], std_edges: list[float], counts: list[list[int]]) -> list[str]:
    """Rows of the mean, best on top, columns of the spread; each is named by its lower edge."""
    width = max(6, len(str(max(map(max, counts)))) + 1)
    rows = [f"{'mean / std':>14}" + "".join(f"{edge:{width}.3f}" for edge in std_edges[:-1])]
    for edge, row in reversed(list(zip(mean_edges, counts))):
        rows.append(f"{edge:14.1f}" + "".join(f"{count or '.':>{width}}" for count in row))
    return rows


def _right_of_k(counts: dict[str, int]) -> list[str]:
    """Two rows: how many of the K answers are right, and how many samples have so many; ten to a row."""
    cells, rows = list(counts.items()), []
    for at in range(0, len(cells), 10):
        part = cells[at:at + 10]
        width = max(6, max(len(str(cell)) for pair in part for cell in pair) + 1)
        rows += [f"{title:>14}" + "".join(f"{pair[k]:>{width}}" for pair in part)
                 for k, title in enumerate(("right of K", "samples"))]
    return rows
