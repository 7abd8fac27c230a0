"""The figure of README: what GRPO does to the held-out questions, three seeds of the default run.

    python tests/curves.py runs/seed0 runs/seed1 runs/seed2   logs of finished runs (train.py --eval_every 25) to
                                                              tests/results/curves.seed*.csv, and then the figure
    python tests/curves.py                                    the figure alone, docs/curves.svg, from these files

A row of a csv file is a GRPO step. Row 0 is the warm start, before GRPO: it has the held-out mIoU that GRPO starts from,
and that of the best answer that never looks at a video.
"""

import csv
import json
import statistics
import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
TABLES = [ROOT / "tests" / "results" / f"curves.seed{seed}.csv" for seed in (0, 1, 2)]
FIGURE = ROOT / "docs" / "curves.svg"
COLUMNS = ("step", "reward", "groups", "dead_groups", "mIoU", "best_blind")
COLOURS = ("#0072b2", "#d55e00", "#009e73")  # of the seeds; told apart by colour-blind readers too
WINDOW = 10  # steps
# The same bytes wherever it is drawn: ids from a fixed salt, text as text, no date (in `draw`).
STYLE = {"svg.hashsalt": "curves", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9,
         "axes.spines.top": False, "axes.spines.right": False}


def rows_of(run: Path) -> list[dict]:
    """Of a finished run with evaluations: its metrics.jsonl and summary.json as rows of `COLUMNS`."""
    summary = json.loads((run / "summary.json").read_text())
    if not (summary["after_sft"] and summary["after"]):
        raise SystemExit(f"{run}/summary.json: the figure needs a finished run with a warm start, GRPO and held-out questions")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["phase"] == "grpo"]
    blind = max(answers.get("grounding/mIoU") or 0.0 for answers in summary["baselines"].values())
    rows = [{"step": 0, "mIoU": summary["after_sft"]["grounding/mIoU"], "best_blind": blind}]
    for line in lines:
        metrics = line.get("evaluation") or (summary["after"] if line is lines[-1] else {})
        row = {name: line[name] for name in ("step", "reward", "groups", "dead_groups")}
        rows.append(row | ({"mIoU": metrics["grounding/mIoU"]} if metrics else {}))
    return rows


def write_table(file: Path, rows: list[dict]) -> None:
    with open(file, "w", encoding="utf-8", newline="") as out:
        writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: round(value, 4) for name, value in row.items()} for row in rows)


def read_table(file: Path) -> list[dict]:
    with open(file, encoding="utf-8", newline="") as table:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(table)]


def column(rows: list[dict], name: str) -> tuple[list[float], list[float]]:
    """The steps that have a value, and the values."""
    return tuple(zip(*((row["step"], row[name]) for row in rows if name in row)))


def smooth(values: list[float]) -> list[float]:
    """The mean of the last `WINDOW` values, of fewer at the beginning: a step has 16 questions, which is noisy."""
    return [statistics.fmean(values[max(0, i + 1 - WINDOW):i + 1]) for i in range(len(values))]


def draw(tables: list[list[dict]], file: Path) -> None:
    with matplotlib.rc_context(STYLE):
        figure, axes = plt.subplots(1, 3, figsize=(10, 3), facecolor="white")
        figure.subplots_adjust(left=0.05, right=0.99, bottom=0.16, top=0.87, wspace=0.22)
        reward, overlap, dead = axes
        for seed, (rows, colour) in enumerate(zip(tables, COLOURS)):
            steps, values = column(rows, "reward")
            reward.plot(steps, values, color=colour, linewidth=0.5, alpha=0.35)
            reward.plot(steps, smooth(values), color=colour, linewidth=1.4, label=f"seed {seed}")
            overlap.plot(*column(rows, "mIoU"), color=colour, linewidth=1.4, marker="o", markersize=3)
            share = [row["dead_groups"] / max(row["groups"], 1) for row in rows if "groups" in row]
            dead.plot(steps, share, color=colour, linewidth=0.5, alpha=0.35)
            dead.plot(steps, smooth(share), color=colour, linewidth=1.4)
        for name, row, line in (("warm start", "mIoU", "--"), ("best blind answer", "best_blind", ":")):
            level = statistics.fmean(rows[0][row] for rows in tables)
            overlap.axhline(level, color="#555555", linewidth=1.0, linestyle=line, label=f"{name} ({level:.2f})")
        reward.set_title(f"reward (thick: mean of {WINDOW} steps)")
        overlap.set_title("held-out grounding mIoU")
        dead.set_title("share of dead groups")
        for ax in axes:
            ax.set_xlabel("GRPO step")
            ax.grid(color="#dddddd", linewidth=0.5)
        overlap.set_ylim(0, 1.02)
        dead.set_ylim(0, 1.02)
        reward.legend(frameon=False, loc="lower right")
        overlap.legend(frameon=False, loc="lower right")
        figure.savefig(file, format=file.suffix[1:], metadata={"Date": None} if file.suffix == ".svg" else None)
        plt.close(figure)


def main(runs: list[str]) -> None:
    if len(runs) not in (0, len(TABLES)):
        raise SystemExit(f"{len(runs)} runs: the figure shows {len(TABLES)} seeds; name three folders, or none to draw it again")
    for table, run in zip(TABLES, runs):
        write_table(table, rows_of(Path(run)))
    draw([read_table(table) for table in TABLES], FIGURE)


if __name__ == "__main__":
    main(sys.argv[1:])
