"""The tables of what one H200 measured, from the rows that tests/gpu_check.py wrote there.

    python tests/test_readme.py      writes them into README.md and docs/results.md

tests/results/h200: first.jsonl is of commit daf4062, second.jsonl of 3fe88fe, default_run.json the summary of the default run
of the latter. The script that wrote them is that of 3fe88fe in both cases.
"""

import json
from pathlib import Path

from tools import plan

FOLDER = Path(__file__).resolve().parent / "results" / "h200"
COMMITS = {"first": "daf4062", "second": "3fe88fe"}
GOALS = {"3b": 0.45, "7b": 0.60}  # of the bandwidth, in a decode step


def read(name: str) -> dict[str, float]:
    lines = (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["what"]: row["value"] for row in map(json.loads, lines)}


def number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def decode_rows(runs: list[dict]) -> list[str]:
    """ms a token, and the share of the card's bandwidth that this is."""
    rows = []
    for shape in GOALS:
        for count in (8, 32):
            for how, suffix in (("", ""), (", `--compile`", ", compiled")):
                name = f"decode {shape}, {count} rows{suffix}"
                ms = [number(run.get(f"{name}: a step"), 1) for run in runs]
                shares = [run.get(f"{name}: share of the bandwidth") for run in runs]
                cells = [f"{a} ({b:.0%})" if a else "" for a, b in zip(ms, shares)]
                goal = f"{GOALS[shape]:.0%}" if suffix else ""
                rows.append(f"| decode step of {shape.upper()}, {count} rows{how}, ms (share of the bandwidth) | {cells[0]} | {cells[1]} | {goal} |")
    return rows


def scoring_rows(runs: list[dict]) -> list[str]:
    rows = []
    for shape in GOALS:
        for way, words in (("as the code does it", ""), ("lower right, cuDNN", ", attention by cuDNN"), ("explicit mask, no cuDNN", ", a mask of ones and zeros")):
            name = f"scoring {shape}, {way}"
            if f"{name}: forward" in runs[0]:
                share = runs[0].get(f"{name}: share of the matrix rate, recomputation counted") or runs[0][
                    f"{name}: share of the matrix rate, recomputation c"]
                rows.append(f"| scoring {shape.upper()}, forward, backward, ms (share of the matrix rate){words} | {runs[0][f'{name}: forward']:.0f}, "
                            f"{runs[0][f'{name}: backward']:.0f} ({share:.0%}) | | {'' if words else '50%'} |")
    return rows


def vision_rows(runs: list[dict]) -> list[str]:
    """Of the grid that bench.build_prompt makes for P = 3800 and 32 frames. Backward with recomputation is three times forward."""
    flops = plan.vision_flops(plan.count(plan.load_shape("3b")), (16, 30, 30)) / 1e12
    ms = [runs[0][f"vision 3b, 32 frames: {part}"] for part in ("forward", "backward")]
    shares = [n * flops / runs[1]["rate of a large product"] / (t / 1e3) for n, t in zip((1, 3), ms)]
    return [f"| vision tower of 3B, 32 frames, 3,600 tokens, forward, backward, ms (share of the matrix rate) | {ms[0]:.0f} ({shares[0]:.0%}), "
            f"{ms[1]:.0f} ({shares[1]:.0%}) | | |"]


def plain_rows(runs: list[dict], wanted: list[tuple[str, str, int, str]]) -> list[str]:
    """wanted: (row, words, digits, goal)."""
    return [f"| {words} | " + " | ".join(number(run.get(what), digits) for run in runs) + f" | {goal} |"
            for what, words, digits, goal in wanted]


def table() -> list[str]:
    runs = [read(name) for name in COMMITS]
    head = [f"| | {' | '.join(COMMITS.values())} | goal |", "|---|---|---|---|"]
    right = [("float32, prompt shared: largest |log p - CPU's|", "float32: largest difference of log p from the CPU", 6, "< 0.001"),
             ("float32, prompt shared: |gradient - CPU's|, of its length", "float32: difference of the gradient, of its length", 6, "< 0.001"),
             ("bfloat16, prompt shared: mean |log p - CPU's|", "bfloat16: mean difference of log p from the CPU in float32", 3, "< 0.05"),
             ("bfloat16, prompt shared: |gradient - CPU's|, of its length", "bfloat16: difference of the gradient", 3, "< 0.1"),
             ("graph: largest difference of log p", "recorded decode steps against steps that Python starts, the same tokens", 0, "0"),
             *((f"toy {kind}: mean gap, sampled and scored", f"sampled against scored in bfloat16, `{flag}`", 4, "< 0.05")
               for kind, flag in (("plain", "train.py"), ("lora", "--lora_rank 4"), ("shard", "--shard on"), ("offload", "--offload")))]
    fits = [("memory of a step, 3b, sampling", "a step of 3B (P 2000, G 4, C 128, 2 questions), sampling, GB", 1, "58.9 by the plan"),
            ("memory of a step, 3b, learning", "learning, GB", 1, "71.4"), ("memory of a step, 3b, stepping", "the optimiser's step, GB", 1, "67.6"),
            ("memory that train.py --dry_run prints, 8 layers of 3b", "`--dry_run` of 8 layers of 3B, GB", 1, "26.5 by the plan"),
            ("AdamW 3b, fused: a step", "AdamW of 3B, fused, ms", 0, ""), ("AdamW 3b, not fused: a step", "not fused, ms", 0, "")]
    small = [("rate of a large product", "a large product, Tflop/s", 0, ""), ("rate of a large copy", "a large copy, read and written, TB/s", 2, ""),
             ("attention, prompt, lower right, cuDNN: a new shape", "cuDNN's attention, a shape it has not seen, ms", 0, ""),
             ("sampling, 8 rows, as the code does it", "sampling one token for 8 rows, in two levels, ms", 2, ""), ("sampling, 8 rows, one level", "in one, ms", 2, ""),
             ("norm of 5840 tokens, as the code does it", "an RMS norm of 5,840 tokens, ms", 3, ""), ("norm of 5840 tokens, library", "as the library writes it, ms", 3, "")]
    return [*head, *plain_rows(runs, right), *decode_rows(runs), *scoring_rows(runs), *vision_rows(runs), *plain_rows(runs, fits), *plain_rows(runs, small)]


def short_table() -> list[str]:
    """For the README: the newest figure of each."""
    first, second = (read(name) for name in COMMITS)
    both = first | second
    rows = ["| on one H200, computed in bfloat16 (3B with float32 weights, as in training), P = 3800 | 3B | 7B |", "|---|---|---|"]
    for count in (8, 32):
        cells = [f"{both[f'decode {shape}, {count} rows: a step']:.1f} ms, {both[f'decode {shape}, {count} rows, compiled: a step']:.1f} with `--compile`"
                 for shape in GOALS]
        rows.append(f"| a decode step, {count} rows | " + " | ".join(cells) + " |")
    cells = [f"{first[f'scoring {shape}, as the code does it: forward']:.0f} + {first[f'scoring {shape}, as the code does it: backward']:.0f} ms" for shape in GOALS]
    return [*rows, "| forward + backward of 8 completions of 256 tokens, text part | " + " | ".join(cells) + " |",
            f"| forward + backward of the vision tower, 32 frames | {first['vision 3b, 32 frames: forward']:.0f} + {first['vision 3b, 32 frames: backward']:.0f} ms | |"]


def default_run() -> str:
    """One sentence about the default run on the card."""
    summary = json.loads((FOLDER / "default_run.json").read_text(encoding="utf-8"))
    seconds, after = summary["seconds"], summary["after"]
    return (f"The default run at 3fe88fe (600 + 150 steps) on the card, seed 0: {seconds['total']:.0f} s (warm start {seconds['sft']:.0f}, selection {seconds['selected']:.0f}, "
            f"GRPO {seconds['grpo']:.0f}), grounding mIoU {after['grounding/mIoU']:.3f}, gqa mIoU {after['gqa/mIoU']:.3f}")


if __name__ == "__main__":
    print("\n".join([*table(), "", *short_table(), "", default_run()]))
