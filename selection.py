"""Variance-aware selection: which samples teach the initial policy anything (Temporal-RLT, data selection).

The advantage of a completion is its distance from the mean of its group. A sample that the policy always gets wrong, or
always right, gives a group without distances and so without gradient. K completions of the initial policy show which:

    discrete   (qa, classification)       all_wrong, all_right dropped; mixed kept
    continuous (grounding, gqa, tracking) low_variance_poor, low_variance_good dropped; high_variance_good kept;
                                          high_variance_poor, below the quality floor, dropped

The paper publishes neither K nor its thresholds. Ours, K = 8 at temperature 1 and the two numbers below, are no more
than ours. The report therefore shows every count, and `control="random"` selects as many samples by chance, so that
"selected beats random" can be tested.
"""

import json
import random
import statistics
from collections import Counter
from pathlib import Path

import numpy as np

from data import load_samples, parse_entry, read_jsonl, write_jsonl
from rewards import task_score

DISCRETE = ("qa", "classification")
BINS = ("all_wrong", "all_right", "mixed",
        "low_variance_poor", "low_variance_good", "high_variance_poor", "high_variance_good")
KEPT_BINS = ("mixed", "high_variance_good")
MIN_STD, MIN_MEAN = 0.1, 0.1  # of the task score of K completions


def read_predictions(file: str | Path) -> dict[str, dict]:
    """The lines of `predictions.jsonl` by id. ValueError names the line."""
    predictions = {}
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                prediction = json.loads(line)
                key, _ = prediction["id"], prediction["parts"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{file}:{number}: not a prediction with 'id' and 'parts' ({error}); "
                                 "eval.py --num_samples 8 writes them") from error
            if key in predictions:
                raise ValueError(f"{file}:{number}: a second prediction for sample {key!r}")
            predictions[key] = prediction
    return predictions


def task_scores(prediction: dict) -> list[float]:
    """The K task scores: the mean of the parts without `format`, which every sample learns to satisfy alike."""
    scores = [task_score(parts) for parts in prediction["parts"]]
    # A video that could not be read has no completions to vary: as poor as can be, and not worth a seat.
    if set(prediction.get("reasons", [])) == {"unreadable_video"}:
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
    own samples. control="random" keeps as many of each task, drawn with `seed`; the report's bins stay as measured.
    ValueError names a sample without a prediction, or with fewer than two completions.
    """
    missing = [sample["id"] for sample in samples if sample["id"] not in predictions]
    if missing:
        raise ValueError(f"no prediction for sample {missing[0]!r} ({len(missing)} of {len(samples)} are missing); run "
                         "eval.py on this very file, or name the part it was run on (x.jsonl:N)")
    if control not in (None, "random"):
        raise ValueError(f"unknown control {control!r}; there is 'random'")
    kept, tasks = set(), {}
    for task in sorted({sample["task"] for sample in samples}):
        ids = [sample["id"] for sample in samples if sample["task"] == task]
        scores = [task_scores(predictions[i]) for i in ids]
        bins, report = (_discrete_bins(scores) if task in DISCRETE
                        else _continuous_bins(scores, min_std, min_mean, std_quantile, mean_quantile))
        chosen = [i for i, name in zip(ids, bins) if name in KEPT_BINS]
        if control == "random":
            chosen = random.Random(f"{seed} {task}").sample(ids, len(chosen))
        kept.update(chosen)
        tasks[task] = {"total": len(ids), "kept": len(chosen),
                       "bins": {name: bins.count(name) for name in BINS}, **report}
    report = {"total": len(samples), "kept": len(kept), "control": control, "seed": seed, "tasks": tasks,
              "bins": {name: sum(task["bins"][name] for task in tasks.values()) for name in BINS}}
    return [sample["id"] for sample in samples if sample["id"] in kept], report


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


def write_selection(predictions: Path, entry: str, out: Path, options: dict) -> tuple[int, int]:
    """Write the kept lines of `entry` to `out` and the report beside it; `options` are keywords of `select`.

    Returns (number kept, number of samples).
    """
    samples, source = load_samples([entry]), parse_entry(entry)[0]
    ids, report = select(samples, read_predictions(predictions), **options)
    as_written = {sample["id"]: sample for sample in read_jsonl(source)}
    out.parent.mkdir(parents=True, exist_ok=True)
    write_jsonl(out, [as_written[i] for i in ids], source)
    out.with_suffix(".report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return len(ids), len(samples)
