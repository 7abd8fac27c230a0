"""Runs of train.py in miniature: their flags, how tests start them, and how two of them are compared."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from model import VideoLM

ROOT = Path(__file__).resolve().parent.parent

# Videos are decoded in the process itself: a worker imports torch before it decodes its first. `whole_run` has one.
SMALL = ["--sft_steps", "4", "--sft_questions", "4", "--steps", "4", "--questions", "3", "--group_size", "4",
         "--max_new_tokens", "64", "--select_k", "0", "--save_every", "2", "--num_workers", "0", "--device", "cpu",
         "--warmup_steps", "0"]
CLIPS = ["--toy_train", "6", "--toy_eval", "4"]  # of a run without --model
# With the model and the clips of `started`, at the toy's resolution and about its learning rates.
STARTED = [*SMALL, "--model", "start", "--train_data", "toy/train.jsonl", "--tasks", "grounding", "qa",
           "--lr", "4e-4", "--sft_lr", "1e-3", "--pack_tokens", "8192", "--no-gradient_checkpointing",
           "--save_dtype", "float32"]  # runs are compared to the last bit


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def without_seconds(records: list[dict]) -> list[dict]:
    timings = ("seconds", "wait_share", "sampled_per_second")
    return [{name: value for name, value in record.items() if name not in timings} for record in records]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return VideoLM.load(str(folder)).hf.state_dict()


def run(folder: Path, *arguments: str, processes: int = 0) -> subprocess.CompletedProcess:
    """train.py as a user starts it: plain, or by torchrun with that many processes."""
    start = [sys.executable, str(ROOT / "train.py")]
    if processes:
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
                 str(ROOT / "train.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*start, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def train_in(folder: Path, arguments: list[str]) -> None:
    """For a process of its own (processes.run_ranks)."""
    os.chdir(folder)
    train.main(arguments)


def train_and_die_in_step_3(folder: Path, arguments: list[str]) -> None:
    """The same, but when the third step of GRPO has been logged, the process gets the signal that nothing can catch."""
    def log_and_die(run, step, *rest, log=train.Run.log_grpo):
        log(run, step, *rest)
        if step == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    train.Run.log_grpo = log_and_die
    train_in(folder, arguments)


def assert_equal_runs(a: Path, b: Path) -> None:
    """The same logs, completions and weights, to the last bit."""
    for file in ("metrics.jsonl", "completions.jsonl"):
        assert without_seconds(lines(a / file)) == without_seconds(lines(b / file))
    ours, theirs = weights(a / "final"), weights(b / "final")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def assert_same_run(a: Path, b: Path) -> None:
    """The same losses, completions, answers and weights, within what the order of float32 sums explains."""
    ours, theirs = (without_seconds(lines(folder / "metrics.jsonl")) for folder in (a, b))
    assert len(ours) == len(theirs)
    for x, y in zip(ours, theirs):
        assert x.pop("phase") == y.pop("phase") and x == pytest.approx(y, abs=1e-4, rel=1e-3)
    said = [sorted((r["step"], r["id"], r["completion"]) for r in lines(folder / "completions.jsonl")) for folder in (a, b)]
    assert said[0] == said[1]
    ours, theirs = weights(a / "final"), weights(b / "final")
    assert ours.keys() == theirs.keys()
    # AdamW divides a gradient by its own size: where it is 0 but for rounding, a weight may go either way.
    apart = torch.cat([(ours[name] - theirs[name]).abs().flatten() for name in ours])
    assert (apart > 1e-5).float().mean() < 1e-4 and apart.max() < 1e-3
    ours, theirs = (json.loads((folder / "summary.json").read_text())["after"] for folder in (a, b))
    assert ours == pytest.approx(theirs, abs=1e-6)


def train_and_be_told_to_end(folder: Path, arguments: list[str], told: tuple[int, ...], step: int) -> None:
    """The same, but the ranks in `told` get SIGTERM when that step of GRPO, counted from 0, has been logged: before its end."""
    def log_and_signal(run, now, *rest, log=train.Run.log_grpo):
        log(run, now, *rest)
        if now == step and run.world.rank in told:
            os.kill(os.getpid(), signal.SIGTERM)

    train.Run.log_grpo = log_and_signal
    train_in(folder, arguments)
