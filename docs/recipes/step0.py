"""Does the base model reach its published row? Asked before anything is trained, because what makes it miss (frames,
pixels, prompt, system message, parser) makes every later number wrong, and costs minutes here and days there.

    python docs/recipes/step0.py METRICS.json [--at_least] NAME=PERCENT ...

A mean p of n values in [0, 1] has a standard error of at most sqrt(p (1 - p) / n), whatever the values are. Allowed are
two of these, and one point for what is known to differ: greedy answers here, a repetition penalty there, two parsers.
Exit status 1 where a figure is further away (--at_least: below).
"""

import argparse
import json
import math
import sys
from pathlib import Path

SEEN = ("prompt", "fps", "max_frames", "total_pixels", "min_pixels", "max_new_tokens", "max_prompt_tokens")


def allowed(percent: float, n: int) -> float:
    """How far from a published figure an honest repetition may lie, in points."""
    share = percent / 100
    return 200 * math.sqrt(share * (1 - share) / n) + 1


def misses(metrics: dict, published: dict[str, float], at_least: bool) -> list[str]:
    """Print a line for each figure, in per cent; returns the names of those that are too far away."""
    found = []
    for name, percent in published.items():
        ours, margin = 100 * metrics[name], allowed(percent, metrics["n"])
        difference = ours - percent
        if difference < -margin or (difference > margin and not at_least):
            found.append(name)
        print(f"{name}: published {percent:.1f}, here {ours:.1f}, difference {difference:+.1f}, allowed "
              f"{'-' if at_least else '±'}{margin:.1f}{'  <- too far' if name in found else ''}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Does the base model reach its published row?")
    parser.add_argument("metrics", type=Path, help="metrics.json of eval.py")
    parser.add_argument("published", nargs="+", metavar="NAME=PERCENT", help="a metric and its published value")
    parser.add_argument("--at_least", action="store_true", help="a higher figure is no fault")
    args = parser.parse_args()
    metrics = json.loads(args.metrics.read_text(encoding="utf-8"))
    published = {name: float(percent) for name, percent in (pair.split("=") for pair in args.published)}
    if misses(metrics, published, args.at_least):
        print("asked with " + ", ".join(f"{name} {metrics['config'][name]}" for name in SEEN))
        print(f"{metrics['n']} samples, parse_failure {100 * metrics['parse_failure']:.1f} %, reasons {metrics['reasons']}")
        sys.exit("step 0 failed: docs/recipes.md says what to look at; STEP0=go_on trains all the same")


if __name__ == "__main__":
    main()
