"""Failures on purpose: a short run of the synthetic task with one thing broken, to know it again when it is no drill.

    python -m tools.drills                    the list
    python -m tools.drills wrong_fps          runs/drill-wrong_fps, in 15 seconds; the first of all drills in two minutes more
    python -m tools.drills wrong_fps --healthy --out runs/drill-healthy      the same run with nothing broken

Nothing in train.py knows of it: a drill replaces a function from outside, or prepares other data or flags, and calls
`train.main`. At its end stand what was broken, what the screen showed, what the report worries about (tools/report.py) and
how it is found and cured; docs/drills.md has all of that to read. Drills begin where a short warm start ends, which the
first of them makes.
"""

import argparse
import contextlib
import io
import itertools
import json
import math
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch

import grpo
import rewards
import train
from data import Clip, read_video
from lib import loader
from lib.terminal import errors_in_one_sentence
from tools import report


class Begin(NamedTuple):
    """Where a drill begins, and how long it is."""

    model: Path  # what a short warm start has left
    clips: Path  # train.jsonl and eval.jsonl of the synthetic task
    steps: int = 12  # of GRPO
    questions: int = 8  # a step
    sft_steps: int = 100  # of the drill that has a warm start of its own


COMMON = ["--tasks", "grounding", "--min_pixels", "3136", "--max_new_tokens", "64", "--lr", "4e-4", "--warmup_steps", "0",
          "--pack_tokens", "8192", "--no-gradient_checkpointing", "--num_workers", "0", "--device", "cpu", "--select_k", "0",
          "--sft_questions", "8", "--group_size", "8", "--beta", "0.01", "--sft_lr", "2e-3"]


def begin_from(folder: Path) -> Begin:
    """The warm start of all drills in `folder`, made if it is not there."""
    clips = Path("toy") / "seed0-400-160"
    if not (folder / "summary.json").exists():
        print(f"the warm start that drills begin from, once: {folder}")
        train.main([*COMMON, "--toy_train", "400", "--toy_eval", "160", "--sft_steps", "600", "--steps", "0", "--out", str(folder),
                    "--overwrite"])
    return Begin(folder / "warm_start", clips)


# --- flags of a run, broken or not ------------------------------------------------------------------------------------


def data_flags(train_file: Path, eval_file: Path) -> list[str]:
    return ["--train_data", str(train_file), "--eval_data", str(eval_file)]


def go_on(begin: Begin) -> list[str]:
    """GRPO from the warm start."""
    return ["--model", str(begin.model), "--sft_steps", "0", *data_flags(begin.clips / "train.jsonl", begin.clips / "eval.jsonl")]


def start_anew(begin: Begin) -> list[str]:
    """A warm start of its own, from random weights."""
    return ["--sft_steps", str(begin.sft_steps), *data_flags(begin.clips / "train.jsonl", begin.clips / "eval.jsonl")]


EARLY = 6  # seconds


def ask_for_early_events(begin: Begin) -> list[str]:
    """Only about what is over after 6 of the 12 seconds: the drill shows 8 of them, and labels are up to 2 late. And about the first
    or the second colour: a short warm start does not yet find a colour that is asked for by its name."""
    files = []
    for name in ("train", "eval"):
        samples = map(json.loads, open(begin.clips / f"{name}.jsonl", encoding="utf-8"))
        files.append(begin.clips / f"early.{name}.jsonl")
        files[-1].write_text("".join(json.dumps(sample) + "\n" for sample in samples if sample["task"] == "grounding"
                                     and "its" in sample["question"].split() and sample["spans"][0][1] <= EARLY), encoding="utf-8")
    return ["--model", str(begin.model), "--sft_steps", "0", *data_flags(*files)]


# --- what is broken: each takes the flags of the whole run and gives those of the broken one, while it is broken ------

FIRST_NAN = 4  # step


@contextlib.contextmanager
def nan(flags: list[str], begin: Begin) -> Iterator[list[str]]:
    """The loss is nan from a step on, as behind a logarithm of 0."""
    step, accumulate = itertools.count(1), train.accumulate_gradients

    def with_nan(policy, reference, groups, loss, denominator, **settings):
        def lost(*tensors, **more):
            value, stats = loss(*tensors, **more)
            return value * math.nan, stats

        return accumulate(policy, reference, groups, lost if next(step) >= FIRST_NAN else loss, denominator, **settings)

    with patch.object(train, "accumulate_gradients", with_nan):
        yield flags


@contextlib.contextmanager
def bad_video(flags: list[str], begin: Begin) -> Iterator[list[str]]:
    """Every fourth file is only half there, as after a download that broke off."""
    broken = begin.clips.with_name(f"{begin.clips.name}-broken")
    shutil.rmtree(broken, ignore_errors=True)
    shutil.copytree(begin.clips, broken)
    for path in sorted((broken / "videos").iterdir())[::4]:
        path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    yield [*flags, *data_flags(broken / "train.jsonl", broken / "eval.jsonl")]


@contextlib.contextmanager
def all_same(flags: list[str], begin: Begin) -> Iterator[list[str]]:
    """A reward that does not look at the completion."""
    score = rewards.score

    def blind_score(sample, completion, *rest, **settings):
        parts = dict.fromkeys(score(sample, completion, *rest, **settings).parts, 0.5)
        return rewards.Score(sum(parts.values()), parts, "ok")

    with patch.object(rewards, "score", blind_score):
        yield flags


@contextlib.contextmanager
def truncate(flags: list[str], begin: Begin) -> Iterator[list[str]]:
    """Answers have about 47 tokens."""
    yield [*flags, "--max_new_tokens", "24"]


RATE, SAID = 3.0, 2.0  # frames a second: sampled, and in the positions


@contextlib.contextmanager
def wrong_fps(flags: list[str], begin: Begin) -> Iterator[list[str]]:
    """As many frames as 2 a second would be, at the positions of 2 a second, sampled at 3 a second."""

    def read_too_fast(path, **arguments) -> Clip:
        clip = read_video(path, **{**arguments, "target_fps": RATE})
        count = 2 * round(len(clip.frames) * SAID / RATE / 2)
        return replace(clip, frames=clip.frames[:count], seconds=clip.seconds[:count], sample_fps=SAID)

    with patch.object(loader, "read_video", read_too_fast):
        yield flags


@contextlib.contextmanager
def pad_is_eos(flags: list[str], begin: Begin) -> Iterator[list[str]]:
    """The mask is `tokens != pad`, and pad is the end token: the end is never learned, neither in the warm start nor in GRPO."""
    mask_of, imitate = grpo.completion_mask, train.imitation_group

    def without_ends(tokens, eos_ids):
        return mask_of(tokens, eos_ids) & ~torch.isin(tokens, torch.tensor(list(eos_ids)))

    def imitate_without_end(policy, prompt, style):
        group = imitate(policy, prompt, style)
        return replace(group, mask=without_ends(group.tokens, policy.eos_ids))

    with patch.object(grpo, "completion_mask", without_ends), patch.object(train, "imitation_group", imitate_without_end):
        yield flags


# --- the drills -------------------------------------------------------------------------------------------------------


class Drill(NamedTuple):
    broken: str  # what
    flags: Callable[[Begin], list[str]]  # of the whole run
    break_it: Callable[[list[str], Begin], AbstractContextManager[list[str]]]
    screen: str  # pattern of the lines that show it
    worry: str  # how the report's sentence about it begins
    found: str  # how it is found, and cured


DRILLS = {
    "nan": Drill(
        f"the loss is nan from step {FIRST_NAN} on", go_on, nan, r"no finite loss or gradient|steps in a row|grad nan", "Not a number",
        "the screen names the questions of each lost step; a norm that grew before means --lr, one that did not the loss or reward that "
        "was changed last. After five such steps the run ends with the weights of the last good one, and --resume goes on"),
    "bad_video": Drill(
        "every fourth video file ends in the middle", go_on, bad_video, r"unreadable|cannot be read", "Unreadable videos",
        "python data.py check FILE decodes all of them before a run; its good.jsonl has the others"),
    "all_same": Drill(
        "the reward does not look at the completion", go_on, all_same, r"dead (\d+)/\1 ", "All groups are dead",
        "score two completions by hand, a right and a wrong one, with the function that train.py calls: they have to differ"),
    "truncate": Drill(
        "--max_new_tokens 24, and answers have 47", go_on, truncate, r"truncated [1-9]|not one", "truncated at --max_new_tokens 24",
        "compare `length` with the limit, and see where the texts in completions.jsonl end; raise --max_new_tokens"),
    "wrong_fps": Drill(
        f"frames are sampled at {RATE:g} a second, and their positions say {SAID:g}", ask_for_early_events, wrong_fps,
        r"^step 1/|^GRPO: |mIoU", "Times are on a wrong scale",
        "plot the said middles over the true ones: a line of another slope than 1. Compare `seconds` and `sample_fps` of "
        "data.read_video with the clock of a player"),
    "pad_is_eos": Drill(
        "the mask is `tokens != pad`, where pad is the end token", start_anew, pad_is_eos, r"truncated [1-9]", "The end token is not said",
        "texts in completions.jsonl go on after </answer> up to the limit; a mask has to go by position, as grpo.completion_mask does"),
}


class Screen(io.StringIO):
    """Prints what is printed, and keeps it."""

    def __init__(self):
        super().__init__()
        self.real = sys.stdout

    def write(self, text: str) -> int:
        self.real.write(text)
        return super().write(text)

    def flush(self) -> None:
        self.real.flush()


def carry_out(name: str, begin: Begin, out: Path, healthy: bool = False) -> tuple[list[str], list[str]]:
    """A run into `out` with this thing broken, or with nothing: (lines of the screen that show it, the report's worries)."""
    drill, screen = DRILLS[name], Screen()
    flags = [*COMMON, "--steps", str(begin.steps), "--questions", str(begin.questions), "--out", str(out), *drill.flags(begin)]
    with contextlib.redirect_stdout(screen), contextlib.nullcontext(flags) if healthy else drill.break_it(flags, begin) as changed:
        try:
            train.main(changed)
        except SystemExit as end:  # a run that ends itself says why
            if not isinstance(end.code, str) or not (out / "metrics.jsonl").exists():
                raise
            print(end.code)
    report.write_report([out], out / "report.html", seconds=20)  # a run that ended itself has written none
    shown = [line for line in screen.getvalue().splitlines() if re.search(drill.screen, line)]
    return shown, report.run_data(out)["worries"]


MOST_LINES = 4  # of the screen


def tell(name: str, shown: list[str], worries: list[str], out: Path, healthy: bool = False) -> None:
    drill = DRILLS[name]
    lines = shown if len(shown) <= MOST_LINES else [*shown[:MOST_LINES - 2], "...", *shown[-2:]]
    print(f"\n--- drill {name}\nbroken: {'nothing' if healthy else drill.broken}\non the screen:")
    print("".join(f"    {line}\n" for line in lines) + "in the report:")
    print("".join(f"    {'->' if drill.worry in text else '  '} {text}\n" for text in worries or ["nothing to worry about"]), end="")
    print((f"found and cured: {drill.found}\n" * (not healthy)) + f"the page: {out / 'report.html'}")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tools.drills", description="A short run with one thing broken, and how it shows.")
    parser.add_argument("name", nargs="?", choices=sorted(DRILLS), help="what to break; none: the list")
    parser.add_argument("--list", action="store_true", help="the drills, one a line")
    parser.add_argument("--healthy", action="store_true", help="the same run with nothing broken, to compare")
    parser.add_argument("--out", type=Path, help="folder of the run; by default runs/drill-NAME")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    if args.list or not args.name:
        print("".join(f"{name:11} {drill.broken}\n" for name, drill in DRILLS.items()), end="")
        return
    out = args.out or Path("runs") / f"drill-{args.name}{'-healthy' * args.healthy}"
    if (out / "config.json").exists():
        raise ValueError(f"{out} holds a run already: name another --out, or delete it")
    shown, worries = carry_out(args.name, begin_from(Path("runs") / "drill-start"), out, args.healthy)
    tell(args.name, shown, worries, out, args.healthy)


if __name__ == "__main__":
    with errors_in_one_sentence():
        main()
