"""All six tasks learnt together in miniature: the table of docs/results.md, from runs of three seeds.

    torchrun train.py FLAGS --seed 0 --out runs/six0             FLAGS is what stands below; likewise seeds 1 and 2
    torchrun eval.py --model runs/six0/final --data toy/seed0-600-200/eval.jsonl --tasks TASKS --probe --out runs/six0/probes
    python tests/six_tasks.py runs/six0 runs/six1 runs/six2      finished runs to tests/results/six_tasks.json
    python tests/test_readme.py                                  the tables, from that file

`python tests/six_tasks.py` alone prints the tables. Intervals are of the mean over the seeds; within each seed clips are drawn,
each with its questions (tools/intervals.py).
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from eval import values_of  # noqa: E402
from lib.samples import load_samples  # noqa: E402
from tools.intervals import resampled_means  # noqa: E402

RESULTS = ROOT / "tests" / "results" / "six_tasks.json"
TASKS = "grounding qa gqa tracking classification captioning"
FLAGS = f"--tasks {TASKS} --select_k 0 --sft_steps 4500 --steps 300 --max_new_tokens 160"
# Of each task what GRPO is to raise, or, where imitation has learnt all of it, to keep.
METRICS = ("grounding/mIoU", "qa/accuracy", "gqa/mIoU", "gqa/Acc@GQA", "tracking/AO", "tracking/AO@2-7",
           "classification/accuracy", "captioning/recall", "captioning/precision", "captioning/F1")
STAGES = {"before": "before", "after_sft": "after SFT", "after": "after GRPO"}
PROBES = {"black": "black", "another_video": "another video", "another_question": "another question"}


def record(run: Path) -> dict:
    """Of a finished run: its tables, the resampled means of its last answers, and what the probes say."""
    summary, config = (json.loads((run / name).read_text()) for name in ("summary.json", "config.json"))
    held_out = {sample["id"]: sample for sample in load_samples([f"toy/seed{config['seed']}-{config['toy_train']}-{config['toy_eval']}/eval.jsonl"])}
    answers = [json.loads(line) for line in (run / "predictions.after.jsonl").read_text().splitlines()]
    samples = [held_out[answer["id"]] for answer in answers]
    means = resampled_means(values_of(samples, answers), samples)
    probed = json.loads((run / "probes" / "metrics.json").read_text())["probes"]
    return {"seed": config["seed"], **{stage: summary[stage] for stage in STAGES}, "baselines": summary["baselines"],
            "seconds": summary["seconds"], "resampled": {name: np.round(means[name], 4).tolist() for name in METRICS},
            "probes": {probe: {"score": {name: probed[probe]["score"][name] for name in METRICS},
                               "unreadable": probed[probe]["unreadable"]} for probe in PROBES}}


def collect(runs: list[Path]) -> dict:
    """What RESULTS holds: the seeds, and of their resampled means only the interval."""
    seeds = [record(run) for run in runs]
    resampled = {name: np.mean([seed["resampled"][name] for seed in seeds], axis=0) for name in METRICS}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return {"command": f"torchrun train.py {FLAGS}", "commit": commit, "date": time.strftime("%Y-%m-%d"),
            "intervals": {name: np.quantile(column, (0.025, 0.975)).round(4).tolist() for name, column in resampled.items()},
            "seeds": [{name: value for name, value in seed.items() if name != "resampled"} for seed in seeds]}


def best_blind(seed: dict, name: str) -> float:
    return max(answers.get(name) or 0.0 for answers in seed["baselines"].values())


def table(results: dict) -> list[str]:
    """Rows of Markdown: means over the seeds, the interval of the last stage, and its lowest seed."""
    rows = ["| | " + " | ".join(STAGES.values()) + " | 95 % | lowest seed | best blind answer |", "|---" * 7 + "|"]
    for name in METRICS:
        low, high = results["intervals"][name]
        cells = [statistics.fmean(seed[stage][name] for seed in results["seeds"]) for stage in STAGES]
        blind = statistics.fmean(best_blind(seed, name) for seed in results["seeds"])
        rows.append(f"| {name} | " + " | ".join(f"{cell:.3f}" for cell in cells)
                    + f" | {low:.3f} to {high:.3f} | {min(seed['after'][name] for seed in results['seeds']):.3f} | {blind:.3f} |")
    return rows


def probe_table(results: dict) -> list[str]:
    """What is left after GRPO when the video or the question is taken away, and the share that cannot be read."""
    rows = ["| | intact | " + " | ".join(f"{words} | unreadable" for words in PROBES.values()) + " | best blind answer |",
            "|---" * (3 + 2 * len(PROBES)) + "|"]
    for name in METRICS:
        cells = [statistics.fmean(seed["after"][name] for seed in results["seeds"])]
        for probe in PROBES:
            found = [seed["probes"][probe] for seed in results["seeds"]]
            cells += [statistics.fmean(each["score"][name] for each in found),
                      statistics.fmean(each["unreadable"][name.split("/")[0]] for each in found)]
        cells.append(statistics.fmean(best_blind(seed, name) for seed in results["seeds"]))
        rows.append(f"| {name} | " + " | ".join(f"{cell:.3f}" for cell in cells) + " |")
    return rows


def main() -> None:
    if runs := [Path(run) for run in sys.argv[1:]]:
        RESULTS.write_text(json.dumps(collect(runs), indent=1) + "\n")
    results = json.loads(RESULTS.read_text())
    print("\n".join([*table(results), "", *probe_table(results)]))


if __name__ == "__main__":
    main()
