"""docs/reliability.md: runs that are killed at any moment, a long one in which everything goes wrong, and one that must not grow."""

import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, copy_start
from processes import read, run_ranks, start_ranks
from small_runs import STARTED, assert_equal_runs, lines, train_in, weights

import train
from lib.loader import VideoLoader

# All four stages, with a video that cannot be read.
STAGES = [*STARTED, "--eval_data", "toy/eval.jsonl", "--sft_steps", "4", "--select_k", "2", "--select_min_std", "0",
          "--select_min_mean", "0", "--questions", "2", "--steps", "6", "--eval_every", "3", "--seed", "1"]
PAGE = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")


def test_every_test_that_the_page_names_exists():
    """A row whose test is gone, or was renamed, is a claim that nothing repeats."""
    named = re.findall(r"\| `(\S+?)::(\w+)` \|", PAGE)
    assert len(named) >= 12
    for file, name in named:
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), (file, name)


def start_of(whole_run: Path, folder: Path) -> Path:
    copy_start(whole_run, folder)
    (folder / "toy" / "videos" / "train-0002.mp4").write_bytes(b"not a video")
    return folder


def kill_until_it_ends(folder: Path, size: int, seed: int, most: int, stages: list[str], steps: int) -> list[str]:
    """Kill all processes of a run of so many `steps` at random moments, up to `most` times, and let it end; where it was at each
    kill. Moments are counted in steps, and a little later: seconds would be others on a busy machine."""
    chance, where, arguments = random.Random(seed), [], [*stages, "--out", "killed"]
    while True:
        began = (folder / "killed" / "config.json").exists()
        ranks = start_ranks(folder / "log", size, train_in, folder, ["--resume", "--out", "killed"] if began else arguments)
        at, later = chance.randrange(steps), chance.uniform(0.0, 0.1)
        while ranks[0].is_alive() and (len(where) == most or len(lines_that_parse(folder / "killed" / "metrics.jsonl")) < at):
            time.sleep(0.005)
        ranks[0].join(later)
        if not ranks[0].is_alive() or len(where) == most:
            break
        for rank in ranks:
            rank.kill()
        for rank in ranks:
            rank.join()
        where.append(stage_of(folder / "killed"))
    for rank in ranks:
        rank.join(60)
    assert [rank.exitcode for rank in ranks] == [0] * size, read(folder / "log", 0)[-3000:]
    return where


def stage_of(out: Path) -> str:
    state = out / "state.json"
    done = json.loads(state.read_text()) if state.exists() else {}
    log = lines_that_parse(out / "metrics.jsonl")
    return f"{len(log)} steps, done: {', '.join(name for name in done if name != 'seconds') or 'nothing'}"


def lines_that_parse(file: Path) -> list[str]:
    return [line for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")] if file.exists() else []


def check_kills(whole_run: Path, folder: Path, size: int, seed: int, most: int, stages: list[str] = STAGES) -> list[str]:
    start_of(whole_run, folder)
    run_ranks(folder / "log", size, train_in, folder, [*stages, "--out", "whole"], seconds=240)
    where = kill_until_it_ends(folder, size, seed, most, stages, len(lines_that_parse(folder / "whole" / "metrics.jsonl")))
    assert_equal_runs(folder / "whole", folder / "killed")
    before, after = (json.loads((folder / name / "summary.json").read_text()) for name in ("whole", "killed"))
    assert {**before, "seconds": 0} == {**after, "seconds": 0}
    return where


def test_a_run_killed_at_random_moments_is_the_run_that_was_not(whole_run, tmp_path):
    """Whatever a kill finds half done. In the fast suite one seed, one process and a few kills."""
    assert check_kills(whole_run, tmp_path, 1, 0, 2, [*STAGES, "--sft_steps", "2", "--steps", "3", "--eval_every", "0"])


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("seed", range(1, 6))
def test_kills_in_every_stage_change_nothing(whole_run, tmp_path, size, seed):
    """Of one process and of two, to the last bit; `-s` shows where the kills came."""
    for place in check_kills(whole_run, tmp_path, size, seed, most=12):
        print(f"{size} processes, seed {seed}: killed after {place}")


# --- everything at once -----------------------------------------------------------------------------------------------


def train_with_short_deadlines(folder: Path, arguments: list[str], largest_file: int) -> None:
    """`largest_file` bytes: beyond them the disk is full. A worker that is stopped costs two seconds."""
    class Impatient(VideoLoader):
        def __init__(self, settings, **named):
            super().__init__(settings, **named, deadline=2.0)

    train.VideoLoader = Impatient
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
    train_in(folder, arguments)


def workers_of(pid: int) -> list[int]:
    try:
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        return [child for child in children if b"lib.loader" in Path(f"/proc/{child}/cmdline").read_bytes()]
    except OSError:  # just ended
        return []


FAULTS = ["kill all", "kill one", "SIGTERM", "stop a worker", "kill a worker"]


def strike(fault: str, ranks: list, chance: random.Random) -> None:
    """One fault. Whatever it leaves alive has to end by itself, or to go on."""
    if fault in ("kill all", "SIGTERM"):
        for rank in ranks:
            os.kill(rank.pid, signal.SIGKILL if fault == "kill all" else signal.SIGTERM)
    elif fault == "kill one":
        os.kill(chance.choice(ranks).pid, signal.SIGKILL)
    elif fault in ("stop a worker", "kill a worker"):
        for worker in workers_of(chance.choice(ranks).pid)[:1]:
            os.kill(worker, signal.SIGSTOP if fault == "stop a worker" else signal.SIGKILL)


@pytest.mark.slow
def test_a_run_in_which_everything_goes_wrong_comes_to_its_end(whole_run, tmp_path):
    """The runs of kills alone show that it is the same run; a worker that dies costs its video. With SOAK_MINUTES=120 in the
    environment other runs, with other faults, follow for so long; `-s` shows what struck each."""
    until = time.monotonic() + 60 * float(os.environ.get("SOAK_MINUTES", "0"))
    for seed in itertools.count():
        folder = tmp_path / str(seed)
        folder.mkdir()
        starts, struck = soak(start_of(whole_run, folder), seed)
        counts = {fault: struck.count(fault) for fault in (*FAULTS, "full disk")}
        print(f"{time.strftime('%H:%M:%S')} run {seed}: {starts} starts; faults: {counts}", flush=True)
        shutil.rmtree(folder)
        if time.monotonic() > until:
            break


def soak(folder: Path, seed: int, most: int = 30) -> tuple[int, list[str]]:
    """Two processes, 60 steps, a fault every few seconds, `most` of them: each step is in the log once, the weights are
    numbers, and nothing half written is left. -> how often it was started, and what struck it."""
    chance, struck, out = random.Random(seed), [], folder / "run"
    first = [*STARTED, "--sft_steps", "20", "--steps", "40", "--questions", "2", "--num_workers", "1", "--save_every", "3",
             "--wait_minutes", "1", "--max_bad_share", "1", "--out", "run"]
    for attempt in range(200):
        is_full = len(struck) < most and attempt % 4 == 1
        struck += ["full disk"] * is_full
        arguments = ["--resume", "--out", "run"] if (out / "config.json").exists() else first
        ranks = start_ranks(folder / "log", 2, train_with_short_deadlines, folder, arguments,
                            2**16 if is_full else resource.RLIM_INFINITY)
        while all(rank.is_alive() for rank in ranks):
            ranks[0].join(chance.uniform(1.0, 5.0))
            if all(rank.is_alive() for rank in ranks) and len(struck) < most:
                struck.append(chance.choice(FAULTS))
                strike(struck[-1], ranks, chance)
        for rank in ranks:
            rank.join(240)
        assert not any(rank.is_alive() for rank in ranks), (struck[-1], read(folder / "log", 0)[-2000:])
        if [rank.exitcode for rank in ranks] == [0, 0]:
            break
    assert [rank.exitcode for rank in ranks] == [0, 0], read(folder / "log", 0)[-3000:]
    log = [(line["phase"], line["step"]) for line in lines(out / "metrics.jsonl")]
    assert log == [("sft", k) for k in range(1, 21)] + [("grpo", k) for k in range(1, 41)]
    assert all(torch.isfinite(weight).all() for weight in weights(out / "final").values())
    assert not list(out.glob("partial-*")) and not list(out.glob("replaced-*"))
    return attempt + 1, struck


# --- nothing grows ----------------------------------------------------------------------------------------------------


def train_and_count(folder: Path, arguments: list[str]) -> None:
    """Write down the memory (MB) and the open files of this process every 100 steps."""
    def log_and_count(run, step, *rest, log=train.Run.log_grpo):
        log(run, step, *rest)
        if (step + 1) % 100 == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            with open(folder / "counted", "a") as file:
                file.write(json.dumps([pages * os.sysconf("SC_PAGE_SIZE") / 1e6, len(os.listdir("/proc/self/fd"))]) + "\n")

    train.Run.log_grpo = log_and_count
    train_in(folder, arguments)


@pytest.mark.slow
def test_memory_and_open_files_stay_what_they_are_over_2000_steps(whole_run, tmp_path):
    """A megabyte a step is nothing in a test and 40 GB in a week."""
    start_of(whole_run, tmp_path)
    (process,) = start_ranks(tmp_path / "log", 1, train_and_count, tmp_path, [
        *STARTED, "--sft_steps", "0", "--steps", "2000", "--questions", "1", "--group_size", "2", "--max_new_tokens", "4",
        "--keep_dead_groups", "--save_every", "200", "--num_workers", "1", "--max_bad_share", "1", "--out", "run"])
    process.join(1500)
    assert process.exitcode == 0, read(tmp_path / "log", 0)[-3000:]
    counted = [json.loads(line) for line in (tmp_path / "counted").read_text().splitlines()]
    print(f"MB and open files after each 100 steps: {counted}")
    memory, files = zip(*counted[4:])  # what is loaded late, and the cache of clips, is there by then
    assert len(counted) == 20 and len(set(files)) == 1
    assert max(memory[8:]) - min(memory[:8]) < 20
    shutil.rmtree(tmp_path / "run")
