"""The whole loop on real files: what is logged, saved, resumed, split over processes, and refused."""

import dataclasses
import json
import math
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

import data
import grpo
import train
from data import VideoSettings
from grpo import accumulate_gradients, rollout, score_groups
from lib import distributed as scale
from lib import toy
from lib.answers import PUBLISHED
from lib.captions import words_judge
from lib.loader import VideoLoader, _clip_key
from lib.questions import with_style
from lib.samples import load_samples
from model import VideoLM
from tools import evaluate

SMALL = ["--toy_train", "6", "--toy_eval", "4", "--sft_steps", "4", "--sft_questions", "4", "--steps", "4", "--questions", "3",
         "--group_size", "4", "--max_new_tokens", "48", "--select_k", "0", "--save_every", "2", "--num_workers", "1",
         "--device", "cpu", "--warmup_steps", "0"]


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def without_seconds(records: list[dict]) -> list[dict]:
    timings = ("seconds", "wait_share", "sampled_per_second")
    return [{name: value for name, value in record.items() if name not in timings} for record in records]


def run(folder: Path, *arguments: str, processes: int = 0, env: dict | None = None) -> subprocess.CompletedProcess:
    """train.py as a user starts it: plain, or by torchrun with that many processes."""
    start = [sys.executable, str(ROOT / "train.py")]
    if processes:
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
                 str(ROOT / "train.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    return subprocess.run([*start, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """One run of all four stages in miniature, with a warm start long enough that groups have spread."""
    folder = tmp_path_factory.mktemp("whole")
    old = Path.cwd()
    os.chdir(folder)
    try:
        train.main([*SMALL, "--out", "run", "--sft_steps", "60", "--sft_questions", "12", "--select_k", "3",
                    "--select_min_std", "0.01", "--select_min_mean", "0", "--group_size", "8",
                    "--eval_every", "2", "--sft_equal_time", "--entropy_bonus", "0.001",
                    "--frame_cache", "frames", "--frame_cache_gb", "0.1"])
    finally:
        os.chdir(old)
    return folder / "run"


@pytest.fixture
def started(whole_run, tmp_path) -> Path:
    """A folder with the clips and, as `start`, a model that has learned enough for the rewards of a group to differ."""
    shutil.copytree(whole_run / "warm_start", tmp_path / "start")
    shutil.copytree(whole_run.parent / "toy" / "seed0-6-4", tmp_path / "toy")
    return tmp_path


# --- one run ----------------------------------------------------------------------------------------------------------


def test_a_run_leaves_every_file_that_others_rely_on(whole_run):
    """Tools read these names; a stage that forgets to write its part is found here and not after hours of training."""
    summary = json.loads((whole_run / "summary.json").read_text())
    for stage in ("before", "after_sft", "after", "sft_equal_time"):
        assert summary[stage]["n"] == 12 and 0 <= summary[stage]["grounding/mIoU"] <= 1
    assert set(summary["baselines"]) == {"whole_video", "best_constant_span", "start_box_copied", "most_frequent_letter"}
    assert set(summary["seconds"]) >= {"before", "sft", "after_sft", "selected", "grpo", "after", "total"}
    assert summary["selected"]["kept"] == len(json.loads((whole_run / "state.json").read_text())["selected"]["ids"])
    assert summary["best"]["step"] in (2, 4)
    config = json.loads((whole_run / "config.json").read_text())
    assert set(config) == {f.name for f in dataclasses.fields(train.Config)}
    assert VideoLM.load(str(whole_run / "final")).hf and VideoLM.load(str(whole_run / "best")).hf
    assert len(list(whole_run.glob("checkpoint-*"))) == 2 and not list(whole_run.glob("partial-*"))


def test_eval_py_finds_the_same_numbers_without_being_told_how(whole_run, tmp_path):
    """Another resolution, prompt or length than in training gives another result: peers' evaluations differ in all three."""
    data = whole_run.parent / "toy" / "seed0-6-4" / "eval.jsonl"
    tasks = ["--tasks", "grounding", "qa", "gqa"]
    evaluate.run(["--model", str(whole_run / "final"), "--data", str(data), "--out", str(tmp_path), "--device", "cpu", *tasks])
    measured, summary = json.loads((tmp_path / "metrics.json").read_text()), json.loads((whole_run / "summary.json").read_text())
    assert {name: measured[name] for name in summary["after"]} == pytest.approx(summary["after"])
    assert measured["baselines"] == summary["baselines"]
    asked = json.loads((whole_run / "final" / "asked.json").read_text())
    assert asked["min_pixels"] == train.Config().min_pixels != PUBLISHED["min_pixels"]


def test_training_and_evaluation_share_the_frame_cache(whole_run, tmp_path):
    """A flag that does not reach the loader decodes every video again, and says nothing."""
    frames = whole_run.parent / "frames"
    before = {file.name: file.stat().st_mtime_ns for file in frames.iterdir()}
    assert len(before) == 10  # 6 clips for training, 4 held out, each with three questions
    evaluate.run(["--model", str(whole_run / "final"), "--data", str(whole_run.parent / "toy" / "seed0-6-4" / "eval.jsonl") + ":1",
               "--out", str(tmp_path / "x"), "--device", "cpu", "--num_workers", "0", "--max_new_tokens", "2",
               "--frame_cache", str(frames), "--frame_cache_gb", "0.1"])
    after = {file.name: file.stat().st_mtime_ns for file in frames.iterdir()}
    assert after.keys() == before.keys() and sum(after[name] > before[name] for name in before) == 1  # found and read


def test_every_step_logs_what_the_readme_explains(whole_run):
    """A number that is missing in one step breaks the plot of the whole run."""
    steps = [line for line in lines(whole_run / "metrics.jsonl") if line["phase"] == "grpo" and "reward" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4] and [("evaluation" in line) for line in steps] == [False, True] * 2
    for line in steps:
        assert {"reward", "format", "kl", "loss", "grad_norm", "length", "truncated", "groups", "dead_groups", "unreadable",
                "clip_fraction", "ratio", "logp_gap_mean", "logp_gap_max", "lr", "wait_share", "sampled"} <= set(line)
        assert {"wait", "sample", "meet", "score", "step"} <= set(line["seconds"])
        assert 0 < line["entropy"] < 7  # nats; only with --entropy_bonus, as here
        assert line["groups"] == 3 and line["clip_fraction"] == 0 and all(math.isfinite(v) for v in line["seconds"].values())
        assert line["wait_share"] == pytest.approx(line["seconds"]["wait"] / sum(line["seconds"].values()), abs=1e-3)
        assert line["sampled"] == round(line["length"] * 24)
        assert line["sampled_per_second"] == pytest.approx(line["sampled"] / line["seconds"]["sample"], rel=1e-2)
        assert f"videos {line['wait_share']:.0%}, {line['sampled_per_second']:.0f} tokens/s" in train.log_line(line, 4)
    assert steps[0]["kl"] == 0 and steps[-1]["kl"] > 0  # the reference is the policy at the start of GRPO
    assert any(line["grad_norm"] > 0 for line in steps)


def test_sampled_and_scored_log_probabilities_agree_at_every_step(whole_run):
    """The alarm for a position, mask or temperature that differs between sampling and scoring, in a real run."""
    gaps = [line["logp_gap_max"] for line in lines(whole_run / "metrics.jsonl") if "logp_gap_max" in line]
    assert len(gaps) == 4 and 0 < max(gaps) < 1e-4


def test_every_completion_is_kept_with_its_parts_and_advantage(whole_run):
    """What the policy said is the first thing to look at when a reward misbehaves."""
    records = lines(whole_run / "completions.jsonl")
    assert len(records) == 4 * 3 * 8
    for record in records:
        assert {"step", "id", "completion", "reward", "parts", "reason", "advantage"} <= set(record)
        assert record["reward"] == pytest.approx(sum(record["parts"].values()))
    groups = {}
    for record in records:
        groups.setdefault((record["step"], record["id"]), []).append(record)
    for group in groups.values():
        assert sum(r["advantage"] for r in group) == pytest.approx(0, abs=1e-4)
    reward = lines(whole_run / "metrics.jsonl")
    first = next(line for line in reward if line["phase"] == "grpo")
    assert first["reward"] == pytest.approx(sum(r["reward"] for r in records if r["step"] == 1) / 24)


def test_imitation_learns_the_completion_and_not_the_prompt(model_folder):
    """An SFT baseline whose prompt is trained too is weak by construction; the loss must be that of the target alone."""
    model = VideoLM.load(str(model_folder))
    target = train.encode_target(model, "<answer>3 to 7</answer>")
    assert target[0, -1] == model.tokenizer.eos_token_id
    assert model.tokenizer.decode(target[0, :-1]) == "<answer>3 to 7</answer>"


def test_the_warm_start_lowers_its_loss(whole_run):
    losses = [line["loss"] for line in lines(whole_run / "metrics.jsonl") if line["phase"] == "sft"]
    assert len(losses) == 60 and sum(losses[-5:]) < 0.5 * sum(losses[:5])


# --- the folder of a run ----------------------------------------------------------------------------------------------


def test_a_folder_that_holds_a_run_is_not_overwritten(whole_run, monkeypatch):
    """A second start with the same --out must not cost the first one's result."""
    before = (whole_run / "summary.json").read_bytes()
    monkeypatch.chdir(whole_run.parent)
    with pytest.raises(SystemExit, match="--overwrite"):
        train.main([*SMALL, "--out", "run"])
    assert (whole_run / "summary.json").read_bytes() == before


def test_a_killed_run_resumes_bit_for_bit(started):
    """Resuming that repeats or skips a batch, or loses optimiser state, gives another model: compared to the last bit."""
    tmp_path = started
    arguments = ["--model", "start", "--train_data", "toy/train.jsonl", "--eval_data", "toy/eval.jsonl", *SMALL[4:],
                 "--tasks", "grounding", "qa", "--min_pixels", "3136", "--lr", "4e-4", "--sft_lr", "1e-3",
                 "--steps", "6", "--pack_tokens", "8192"]
    unbroken = run(tmp_path, *arguments, "--out", "unbroken")
    assert unbroken.returncode == 0, unbroken.stderr[-3000:]
    start = [sys.executable, str(ROOT / "train.py"), *arguments, "--out", "broken"]
    process = subprocess.Popen(start, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    while process.poll() is None and not list((tmp_path / "broken").glob("checkpoint-1-grpo-*")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = len(lines(tmp_path / "unbroken" / "metrics.jsonl"))
    resumed = run(tmp_path, *arguments, "--out", "broken", "--resume")
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    for file in ("metrics.jsonl", "completions.jsonl"):
        a, b = (without_seconds(lines(tmp_path / name / file)) for name in ("unbroken", "broken"))
        assert a == b
    assert done == len(lines(tmp_path / "broken" / "metrics.jsonl")) == 10
    a, b = (VideoLM.load(str(tmp_path / name / "final")).hf.state_dict() for name in ("unbroken", "broken"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    first, second = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("unbroken", "broken"))
    assert {k: v for k, v in first.items() if k != "seconds"} == {k: v for k, v in second.items() if k != "seconds"}


@pytest.mark.parametrize("fails_in", ["sampling", "scoring", "the optimiser's step"])
def test_running_out_of_memory_costs_no_finished_step(started, monkeypatch, fails_in):
    """Hours of training between two checkpoints, gone with the longest prompt of the data: what the steps before it have
    learned is saved, and the run that goes on from there is the run that never failed."""
    monkeypatch.chdir(started)
    arguments = ["--model", "start", "--train_data", "toy/train.jsonl", *SMALL[4:], "--tasks", "grounding", "qa",
                 "--min_pixels", "3136", "--lr", "4e-4", "--sft_steps", "0", "--select_k", "0", "--steps", "4",
                 "--save_every", "100", "--num_workers", "0", "--device", "cpu", "--pack_tokens", "8192"]
    train.main([*arguments, "--out", "unbroken"])

    def too_much_in(call, nth):
        calls = []

        def counted(*args, **named):
            calls.append(call)
            if len(calls) == nth:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return call(*args, **named)
        return counted

    target, name = {"sampling": (VideoLM, "generate"), "scoring": (VideoLM, "logprobs_packed"),
                    "the optimiser's step": (torch.optim.AdamW, "step")}[fails_in]
    with monkeypatch.context() as patched:
        patched.setattr(target, name, too_much_in(getattr(target, name), {"scoring": 5}.get(fails_in, 3)))
        with pytest.raises(SystemExit) as caught:
            train.main([*arguments, "--out", "broken"])
    text = str(caught.value)
    assert "out of memory in grpo step 3, in " + fails_in in text and "--resume" in text
    assert (started / "broken" / "checkpoint-1-grpo-000002").exists()
    train.main([*arguments, "--out", "broken", "--resume"])
    for file in ("metrics.jsonl", "completions.jsonl"):
        a, b = (without_seconds(lines(started / name / file)) for name in ("unbroken", "broken"))
        assert a == b
    a, b = (VideoLM.load(str(started / name / "final")).hf.state_dict() for name in ("unbroken", "broken"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_resumed_run_keeps_its_settings_and_refuses_others(whole_run, monkeypatch, capsys):
    """`--resume` without the other flags must not train a real run on with the toy's values, nor another seed's order."""
    monkeypatch.chdir(whole_run.parent)
    config = train.parse_config(["--resume", "--out", "run", "--steps", "9"])
    assert (config.steps, config.group_size, config.sft_steps, config.overwrite) == (9, 8, 60, False)
    with pytest.raises(SystemExit):
        train.parse_config(["--resume", "--out", "run", "--seed", "5"])
    assert "--seed 0" in capsys.readouterr().err


def test_overwriting_deletes_runs_only(tmp_path, monkeypatch):
    """`--out . --overwrite` in a folder of other things, or around the model that is to be loaded, must not delete it."""
    (tmp_path / "thesis.tex").write_text("years of work")
    run = train.Run(train.parse_config(["--out", str(tmp_path), "--overwrite"]), ALONE, loader=None)
    assert (run.out / "thesis.tex").exists()
    model = tmp_path / "final"
    model.mkdir()
    with pytest.raises(SystemExit):
        train.parse_config(["--model", str(model), "--train_data", "a", "--out", str(tmp_path), "--overwrite"])


def test_lines_behind_the_checkpoint_are_written_again_and_not_twice(tmp_path):
    """A kill between two checkpoints leaves lines of steps that are about to be repeated, and half a line at the end."""
    file = tmp_path / "metrics.jsonl"
    records = [{"phase": p, "step": s} for p, s in (("sft", 1), ("sft", 2), ("grpo", 1), ("grpo", 2), ("grpo", 3))]
    file.write_text("".join(json.dumps(r) + "\n" for r in records) + '{"phase": "gr')
    train.cut_log(file, ("grpo", 2))
    assert lines(file) == records[:4]
    train.cut_log(file, ("sft", 1))
    assert lines(file) == records[:1]


def test_a_full_disk_does_not_cost_the_best_model_so_far(tmp_path, model_folder):
    """Written in place, best/ would be half the new weights when the disk is full, and none of the old ones."""
    run = train.Run(train.parse_config(["--out", str(tmp_path / "run")]), ALONE, loader=None)
    model = VideoLM.load(str(model_folder))
    train.save_model(run, model, "best")
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, unlimited[1]))
    try:
        with pytest.raises(Exception):
            train.save_model(run, model, "best")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    saved = VideoLM.load(str(tmp_path / "run" / "best")).hf.state_dict()
    assert all(torch.equal(saved[name], weight) for name, weight in model.hf.state_dict().items())
    train.save_model(run, model, "best")  # there is room again; the leftovers are no obstacle
    assert sorted(path.name for path in (tmp_path / "run").iterdir() if path.is_dir()) == ["best"]


# --- several processes ------------------------------------------------------------------------------------------------


def test_two_processes_give_the_run_of_one_also_with_an_unreadable_video(started):
    """Noise is a function of the question, gradients are summed with one denominator: the world size is no setting.

    One video is broken, so that in some steps one rank has fewer groups than the other, or none: it must not hang.
    """
    tmp_path = started
    (tmp_path / "toy" / "videos" / "train-0002.mp4").write_bytes(b"not a video")
    arguments = ["--model", "start", "--train_data", "toy/train.jsonl", "--eval_data", "toy/eval.jsonl", *SMALL[4:],
                 "--min_pixels", "3136", "--lr", "4e-4", "--sft_lr", "1e-3", "--tasks", "grounding", "qa",
                 "--pack_tokens", "8192", "--sft_steps", "6", "--sft_questions", "4", "--steps", "6", "--questions", "2",
                 "--seed", "1"]  # with some seeds, 0 among them, a random number lies within rounding of a border of tokens
    results = [run(tmp_path, *arguments, "--out", f"world{n}", processes=n) for n in (1, 2)]
    for result in results:
        assert result.returncode == 0, result.stderr[-3000:]
    assert "train-0002.mp4" in results[1].stdout + results[1].stderr
    one, two = (without_seconds(lines(tmp_path / f"world{n}" / "metrics.jsonl")) for n in (1, 2))
    assert len(one) == len(two) == 12 and sum(line["unreadable"] for line in one) > 0
    for a, b in zip(one, two):
        assert a.keys() == b.keys()
        assert a.pop("phase") == b.pop("phase")
        assert a == pytest.approx(b, abs=1e-4, rel=1e-3)
    files = [tmp_path / f"world{n}" / "completions.jsonl" for n in (1, 2)]
    said = [[(r["step"], r["id"], r["completion"]) for r in lines(file)] for file in files]
    assert sorted(said[0]) == sorted(said[1])
    a, b = (VideoLM.load(str(tmp_path / f"world{n}" / "final")).hf.state_dict() for n in (1, 2))
    assert max((a[name] - b[name]).abs().max() for name in a) < 1e-4
    start = VideoLM.load(str(tmp_path / "start")).hf.state_dict()
    assert max((a[name] - start[name]).abs().max() for name in a) > 1e-3  # there was something to compare
    assert any(line["grad_norm"] > 0 and "kl" in line for line in one)
    summaries = [json.loads((tmp_path / f"world{n}" / "summary.json").read_text()) for n in (1, 2)]
    assert summaries[0]["after"] == pytest.approx(summaries[1]["after"], abs=1e-6) and summaries[0]["after"]["n"] == 8


# --- sharding ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def short(started) -> list[str]:
    """Arguments of a run over a data set with a broken video, of 4 steps of imitation and 6 of GRPO."""
    (started / "toy" / "videos" / "train-0002.mp4").write_bytes(b"not a video")
    return ["--model", "start", "--train_data", "toy/train.jsonl", "--eval_data", "toy/eval.jsonl", *SMALL[4:],
            "--min_pixels", "3136", "--lr", "4e-4", "--sft_lr", "1e-3", "--lr_schedule", "constant", "--tasks", "grounding",
            "qa", "--pack_tokens", "8192", "--questions", "2", "--steps", "6"]


def assert_same_run(a: Path, b: Path) -> None:
    """The same losses, completions, answers and weights, within what the order of float32 sums explains."""
    ours, theirs = (without_seconds(lines(folder / "metrics.jsonl")) for folder in (a, b))
    assert len(ours) == len(theirs) == 10 and any(line["unreadable"] for line in ours)
    for x, y in zip(ours, theirs):
        assert x.pop("phase") == y.pop("phase") and x == pytest.approx(y, abs=1e-4, rel=1e-3)
    said = [sorted((r["step"], r["id"], r["completion"]) for r in lines(folder / "completions.jsonl")) for folder in (a, b)]
    assert said[0] == said[1]
    ours, theirs = (VideoLM.load(str(folder / "final")).hf.state_dict() for folder in (a, b))
    assert ours.keys() == theirs.keys() and max((ours[name] - theirs[name]).abs().max() for name in ours) < 1e-4
    ours, theirs = (json.loads((folder / "summary.json").read_text())["after"] for folder in (a, b))
    assert ours == pytest.approx(theirs, abs=1e-6)


def test_a_sharded_run_is_the_run_of_one_process(started, short, monkeypatch):
    """Through all stages: imitation, sampling, GRPO, evaluation, checkpoints, resume without shards, and final/."""
    monkeypatch.chdir(started)
    train.main([*short, "--out", "whole"])
    train.main([*short, "--out", "shards", "--shard", "on", "--steps", "4"])
    train.main(["--resume", "--out", "shards", "--shard", "off", "--steps", "6"])
    assert_same_run(Path("whole"), Path("shards"))


def test_a_sharded_rehearsal_is_a_rehearsal(started, short, monkeypatch, capsys):
    """Nothing ends a completion there, not even the end token, of which the passes of weight zero are made."""
    monkeypatch.chdir(started)
    train.main([*short, "--dry_run", "--shard", "on"])
    assert "peak memory" in capsys.readouterr().out and not Path("runs").exists()


@pytest.mark.slow
def test_a_rehearsal_by_two_processes_ends_although_one_has_nothing(started, short):
    """Of one question a step, the other process has only passes of weight zero."""
    arguments = [*short, "--questions", "1", "--sft_questions", "1", "--dry_run", "--shard", "on"]
    result = run(started, *arguments, "--out", "rehearsal", processes=2)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "peak memory" in result.stdout and not (started / "rehearsal").exists()


def test_what_is_frozen_is_not_sharded(monkeypatch, capsys):
    """A layer's gathered bfloat16 weights and its float32 adapters are two things to FSDP, and folding a third."""
    for arguments in (["--shard", "on"], ["--offload"]):
        with pytest.raises(SystemExit):
            train.parse_config(["--lora_rank", "4", *arguments])
        assert "--shard on and --offload" in capsys.readouterr().err
    gpus = scale.World(0, 8, torch.device("cuda:0"))
    monkeypatch.setattr(scale, "worth_sharding", lambda *_: True)
    monkeypatch.setattr(scale, "shard", lambda *_, **__: pytest.fail("LoRA was sharded"))
    monkeypatch.setattr(train.VideoLM, "load", lambda *_: SimpleNamespace(hf=None))
    monkeypatch.setattr(train.lora, "add_adapters", lambda *_: None)
    train.load_model(train.parse_config(["--lora_rank", "4"]), gpus, "a name")


@pytest.mark.slow
@pytest.mark.parametrize("processes, shard", [(2, "on"), (4, "on"), (4, "off")])
def test_the_number_of_processes_and_sharding_change_nothing(started, short, processes, shard):
    """Two questions a step: of four processes, two have none at all, in every step."""
    assert run(started, *short, "--out", "one").returncode == 0
    several = run(started, *short, "--out", "several", "--shard", shard, "--steps", "4", processes=processes)
    assert several.returncode == 0, several.stderr[-3000:]
    resumed = run(started, "--resume", "--out", "several", "--steps", "6", processes=2)  # on two, with the same shards or none
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert_same_run(started / "one", started / "several")


@pytest.mark.slow
def test_two_nodes_are_two_agents_that_meet_at_an_address(started, short):
    """The commands of the README, on one machine: each agent starts one process; nobody is told a rank."""
    assert run(started, *short, "--out", "one").returncode == 0
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    start = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--rdzv_id=run1",
             "--rdzv_backend=c10d", f"--rdzv_endpoint=localhost:{port}", str(ROOT / "train.py"), *short, "--out", "two",
             "--shard", "on"]
    agents = [subprocess.Popen(start, cwd=started, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) for _ in range(2)]
    for agent in agents:
        _, errors = agent.communicate(timeout=300)
        assert agent.returncode == 0, errors[-3000:]
    assert_same_run(started / "one", started / "two")


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("flags", [[], ["--shard", "on"], ["--offload"], ["--lora_rank", "4"]])
def test_a_run_on_a_gpu_goes_on_where_it_was(started, short, gpu, monkeypatch, flags):
    """Not to the last bit: the gradient of attention is summed there in no fixed order, and one token that rounding has
    chosen makes another completion. What is asked is the same, and sampling and scoring agree."""
    monkeypatch.chdir(started)
    on_gpu = [*short, "--device", gpu, "--gradient_checkpointing", "--keep_dead_groups", "--sft_steps", "0", "--steps", "4",
              *flags]
    train.main([*on_gpu, "--out", "whole"])
    train.main([*on_gpu, "--out", "broken", "--steps", "2"])
    train.main(["--resume", "--out", "broken", "--steps", "4"])
    whole, broken = ([(r["step"], r["id"]) for r in lines(Path(out) / "completions.jsonl")] for out in ("whole", "broken"))
    assert whole == broken and whole[-1][0] == 4
    steps = [line for line in lines(Path("broken/metrics.jsonl")) if line["phase"] == "grpo"]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    assert all(line["logp_gap_mean"] < 0.05 and math.isfinite(line["grad_norm"]) for line in steps)
    a, b, start = (VideoLM.load(folder).hf.state_dict() for folder in ("whole/final", "broken/final", "start"))
    moved, apart = (torch.stack([(a[name] - other[name]).square().sum() for name in a]).sum() for other in (start, b))
    assert 0 < moved and apart < moved


@pytest.mark.gpu
def test_a_rehearsal_on_a_gpu_says_what_a_step_takes(started, short, gpu, monkeypatch, capsys):
    """The figure is what was allocated there, not what the process holds."""
    monkeypatch.chdir(started)
    train.main([*short, "--device", gpu, "--dry_run"])
    text = capsys.readouterr().out
    assert 0 < float(text.split("peak memory: ")[1].split()[0]) < 4
    assert "on the GPU" in text or gpu == "cpu"


# --- LoRA -------------------------------------------------------------------------------------------------------------


def test_a_lora_run_trains_adapters_only_and_resumes_bit_for_bit(started, monkeypatch):
    """Both stages end to end. After the warm start its adapters are part of the reference (KL 0 at step 1), checkpoints
    hold what is trained and no more, and folders are plain ones in which only the adapted matrices have changed."""
    monkeypatch.chdir(started)
    arguments = ["--model", "start", "--train_data", "toy/train.jsonl", "--eval_data", "toy/eval.jsonl", *SMALL[4:],
                 "--tasks", "grounding", "qa", "--min_pixels", "3136", "--sft_steps", "2", "--sft_lr", "1e-2", "--lr", "1e-2",
                 "--lora_rank", "4", "--lora_alpha", "8", "--no-gradient_checkpointing"]
    train.main([*arguments, "--out", "run"])
    run = started / "run"
    log = [line for line in lines(run / "metrics.jsonl") if line["phase"] == "grpo"]
    assert log[0]["kl"] == 0 and log[-1]["kl"] > 0 and any(line["grad_norm"] > 0 for line in log)
    saved = scale.names_in(run / "checkpoint-1-grpo-000004")
    trained = {name.removeprefix("model/") for name in saved if name.startswith("model/")}
    assert trained and all("lora_" in name for name in trained)
    assert {name.split("/")[1] for name in saved if name.startswith("optimizer/")} == trained
    start, warm, final = (VideoLM.load(str(path)).hf.state_dict() for path in (started / "start", run / "warm_start", run / "final"))
    assert start.keys() == final.keys()
    adapted = {name for name in start if name.split(".")[-2] in train.lora.TARGETS and "language_model.layers" in name
               and name.endswith("weight")}
    for a, b in ((start, warm), (warm, final)):
        assert {name for name in a if not torch.equal(a[name], b[name])} == adapted
    # as if the machine had stopped between the two checkpoints
    shutil.copytree(run, started / "again")
    for name in ("checkpoint-1-grpo-000004", "final"):
        shutil.rmtree(started / "again" / name)
    train.main(["--out", "again", "--resume"])
    assert without_seconds(lines(run / "metrics.jsonl")) == without_seconds(lines(started / "again" / "metrics.jsonl"))
    resumed = VideoLM.load(str(started / "again" / "final")).hf.state_dict()
    assert all(torch.equal(final[name], resumed[name]) for name in final)


def test_a_checkpoint_of_another_kind_of_run_is_refused(started, monkeypatch):
    """Names that do not fit must not be skipped in silence: adapters that stay as they were drawn would be trained on."""
    model = VideoLM.load(str(started / "start"))
    config = train.parse_config(["--out", str(started / "run"), "--freeze_vision"])
    run = train.Run(config, ALONE, loader=None)
    optimizer = train.make_optimizer(config, model, 1e-3)
    run.save("sft", 1, model, optimizer, 0)
    run.checkpoint = scale.newest_checkpoint(run.out)
    saved = scale.names_in(run.checkpoint)
    assert any("lm_head" in name or "embed_tokens" in name for name in saved)
    assert not any("visual" in name for name in saved)  # frozen: not saved
    assert run.restore("sft", model, optimizer) == (1, 0)
    everything = dataclasses.replace(config, freeze_vision=False)
    with pytest.raises(ValueError, match="visual"):  # as it is now, its vision tower would be lost at the next save
        run.restore("sft", model, train.make_optimizer(everything, model, 1e-3))
    train.lora.add_adapters(model.hf, 4, 8.0, train.lora.TARGETS, 0)
    with pytest.raises(ValueError, match="lora_A"):
        run.restore("sft", model, train.make_optimizer(config, model, 1e-3))


def test_the_reference_of_a_lora_run_is_the_policy_itself(started):
    """A second model in memory is what LoRA is there to save; the numbers alone would not tell."""
    model, name = VideoLM.load(str(started / "start")), str(started / "start")
    assert train.load_reference(train.Config(lora_rank=4, freeze_vision=True), ALONE, model, name) is model
    assert train.load_reference(train.Config(lora_rank=4, freeze_vision=True, beta=0.0), ALONE, model, name) is None
    reference = train.load_reference(train.Config(), ALONE, model, name)
    assert reference.hf is not model.hf and not any(p.requires_grad for p in reference.hf.parameters())


def test_lora_freezes_the_vision_tower_and_stays_what_it_is_in_a_resumed_run(tmp_path, capsys):
    assert train.parse_config(["--lora_rank", "8"]).freeze_vision is True
    assert train.parse_config([]).freeze_vision is False and train.parse_config([]).lora_rank == 0
    out = tmp_path / "run"
    train.Run(train.parse_config(["--out", str(out), "--lora_rank", "8"]), ALONE, loader=None)
    assert train.parse_config(["--resume", "--out", str(out)]).lora_rank == 8
    for arguments in (["--lora_rank", "4"], ["--lora_targets", "q_proj"]):
        with pytest.raises(SystemExit):
            train.parse_config(["--resume", "--out", str(out), *arguments])
        assert arguments[0] in capsys.readouterr().err


# --- the rehearsal ----------------------------------------------------------------------------------------------------


def test_a_dry_run_takes_the_longest_prompts_to_the_limit_and_leaves_nothing(started, monkeypatch, capsys):
    """A run that dies in hour three on the first long video is what it prevents: the largest step is done first, whatever
    the order of the data, with gradients and moments although all its rewards are alike."""
    monkeypatch.chdir(started)
    whole = [json.loads(line) for line in (started / "toy" / "train.jsonl").read_text().splitlines()]
    short = [{**sample, "start": 0.0, "end": 2.0, "duration": 2.0} for sample in whole[:6] if sample["task"] == "qa"]
    long = [sample for sample in whole if sample["task"] == "qa"][-2:]
    (started / "data.jsonl").write_text("".join(json.dumps(s) + "\n" for s in [*short, *long]))
    before = sorted(started.rglob("*"))
    monkeypatch.setattr(train, "CANDIDATES", 2)  # seconds decide who is looked at
    steps, trained = [], []
    real_step, real_gradients = train.optimizer_step, train.grpo_gradients
    monkeypatch.setattr(train, "optimizer_step", lambda *a: steps.append((a[2], real_step(*a))) or steps[-1][1])
    monkeypatch.setattr(train, "grpo_gradients", lambda *a: trained.extend(a[3]) or real_gradients(*a))
    arguments = ["--model", "start", "--train_data", f"data.jsonl@{started}/toy", "--dry_run", "--questions", "2",
                 "--sft_questions", "1", "--sft_steps", "10", "--steps", "5", "--max_new_tokens", "50", "--group_size", "4",
                 "--device", "cpu", "--min_pixels", "3136", "--num_workers", "0"]
    train.main(arguments)
    said = capsys.readouterr().out
    assert sorted(group.prompt.sample["id"] for group in trained) == sorted(sample["id"] for sample in long)
    assert all(group.mask.all() and group.mask.shape == (4, 50) for group in trained)
    assert all(torch.equal(group.advantages, torch.linspace(-1, 1, 4)) for group in trained)
    assert len(steps) == 2 and all(norm > 0 and optimizer.state for optimizer, norm in steps)
    assert "peak memory" in said and "warm start" in said and "GRPO" in said and "4 completions of 50" in said
    assert sorted(started.rglob("*")) == before


def test_a_dry_run_of_the_synthetic_task_writes_clips_and_no_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train.main([*SMALL, "--out", "run", "--dry_run", "--lora_rank", "4", "--tasks", "qa", "--toy_train", "3"])
    assert "in all" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["toy"]


def test_hours_are_steps_times_measured_seconds():
    """By hand: 40 samples, 4 questions a step; 2 s wait and sample, 3 s score and step; 8 greedy answers twice."""
    config = train.Config(questions=4, sft_questions=8, sft_steps=-1, steps=20, select_k=16, group_size=8, eval_every=0)
    cost = {"decode": 0.1, "sft": 7.0, "wait": 0.5, "sample": 1.5, "score": 2.0, "step": 1.0}
    stages = train.predict_seconds(config, cost, samples(40), samples(8))
    assert stages == pytest.approx({"warm start": 5 * 7, "selection": 40 * 0.5 * 2, "GRPO": 20 * 5,
                                    "evaluation": 3 * 8 * 0.5, "SFT, equal time": 0})
    slow = train.predict_seconds(config, {**cost, "decode": 2.0}, samples(40), samples(8))  # the model waits for videos
    assert slow["GRPO"] == pytest.approx(20 * 4 * 2.0) and slow["warm start"] == pytest.approx(5 * 8 * 2.0)
    assert slow["evaluation"] == pytest.approx(3 * 8 * 2.0)
    only_sft = dataclasses.replace(config, steps=0, select_k=0)
    assert train.predict_seconds(only_sft, {"decode": 0.1, "sft": 7.0}, samples(40), [])["GRPO"] == 0


def test_running_out_of_memory_in_a_dry_run_says_what_helps(started, monkeypatch):
    """The answer it was asked for; a page of traceback hides it."""
    def too_much(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.chdir(started)
    monkeypatch.setattr(train, "grpo_gradients", too_much)
    with pytest.raises(SystemExit, match=r"in phase 'score'(.|\n)*--lora_rank"):
        train.main(["--model", "start", "--train_data", "toy/train.jsonl:2", "--dry_run", "--questions", "1", "--tasks", "qa",
                    "grounding", "--max_new_tokens", "3", "--device", "cpu", "--min_pixels", "3136", "--num_workers", "0"])


# --- pieces -----------------------------------------------------------------------------------------------------------


ALONE = scale.World(0, 1, torch.device("cpu"))


def samples(n):
    return [{"id": str(i)} for i in range(n)]


def test_an_interrupted_selection_asks_nothing_twice(model, tmp_path, monkeypatch):
    """It is the longest inference of a run: K answers to every training question. What is left of it when the process
    dies must serve the next one (without a model, any question that is asked raises), and other settings must not mix."""
    toy.write_dataset(tmp_path, train=2, eval=1, seed=0)
    samples = with_style(load_samples([str(tmp_path / "train.jsonl")], tasks=["qa"]), "think")
    config = train.Config(select_k=2, max_new_tokens=6)
    with VideoLoader(VideoSettings(min_pixels=3136), num_workers=0) as loader:
        run = SimpleNamespace(config=config, out=tmp_path, loader=loader, judge=words_judge,
                              world=scale.World(0, 1, torch.device("cpu")))
        monkeypatch.setattr(train, "select", lambda *_, **__: sys.exit("killed"))
        with pytest.raises(SystemExit, match="killed"):
            train.select_samples(run, model, samples)
        asked = {}
        report = {"kept": 2, "total": 2, "tasks": {}, "bins": {}, "control": None, "source": "predictions"}
        monkeypatch.setattr(train, "select", lambda _, predictions, **__: asked.update(predictions) or (["a"], report))
        run.config = dataclasses.replace(config, select_k=3)
        with pytest.raises(ValueError, match="num_samples 2, not 3"):
            train.select_samples(run, SimpleNamespace(hf=torch.nn.Identity()), samples)
        run.config = config
        assert train.select_samples(run, SimpleNamespace(hf=torch.nn.Identity()), samples)["ids"] == ["a"]
    assert list(asked) == [sample["id"] for sample in samples]
    assert not (tmp_path / "selecting").exists()


def test_every_sample_is_seen_exactly_once_an_epoch():
    """Ranks that shuffle with seeds of their own see 65 % of an epoch; here there is one order for all."""
    stream = train.Stream(samples(10), 0, 0, ALONE)
    epochs = [[s["id"] for s in stream.take(10)] for _ in range(3)]
    assert all(sorted(epoch, key=int) == [str(i) for i in range(10)] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_a_stream_goes_on_where_it_stood():
    """Resume starts a new stream at the cursor; looking ahead must not move it."""
    stream = train.Stream(samples(7), 1, 0, ALONE)
    stream.take(9)
    stream.peek(5)
    assert stream.cursor == 9
    again = train.Stream(samples(7), 1, 9, ALONE)
    assert [s["id"] for s in stream.take(6)] == [s["id"] for s in again.take(6)]


def test_ranks_share_a_stream_by_position_however_much_is_taken():
    """With replaced groups odd numbers are taken: what a rank has decoded ahead must stay its own, and nothing be lost."""
    ranks = [train.Stream(samples(12), 0, 0, scale.World(r, 2, torch.device("cpu"))) for r in (0, 1)]
    ahead = [{s["id"] for s in stream.peek(12)} for stream in ranks]
    taken = [[s["id"] for count in (4, 3, 1, 4) for s in stream.take(count)] for stream in ranks]
    assert sorted(taken[0] + taken[1], key=int) == [str(i) for i in range(12)]
    assert [set(t) for t in taken] == ahead


def test_the_next_step_is_decoded_while_this_one_is_sampled(model, tmp_path, monkeypatch):
    """A GPU that waits for videos waits for minutes: what the next step needs must become ready without being asked for."""
    toy.write_dataset(tmp_path / "toy", 4, 1, 0)
    questions = load_samples([str(tmp_path / "toy" / "train.jsonl")], tasks=["grounding"])
    config = train.parse_config(["--out", str(tmp_path / "run"), "--questions", "2", "--group_size", "2",
                                 "--max_new_tokens", "3"])
    ready = []

    def watch(*arguments, **settings):
        coming = [loader.ahead[_clip_key(sample, loader.settings)] for sample in stream.peek(2)]
        ready.extend(future.result(timeout=60) for future in coming)  # nobody has loaded them
        return grpo.rollout(*arguments, **settings)

    monkeypatch.setattr(train, "rollout", watch)
    with VideoLoader(VideoSettings(min_pixels=3136), num_workers=1) as loader:
        run, stream = train.Run(config, ALONE, loader), train.Stream(questions, 0, 0, ALONE)
        groups, _, _ = train.collect_groups(run, model, stream, 0, train.Clock(ALONE, ""))
        assert len(groups) == len(ready) == 2
        assert all(loader.load(sample) is clip for sample, clip in zip(stream.peek(2), ready))


def test_the_learning_rate_rises_falls_and_never_reaches_the_last_zero():
    rates = [train.learning_rate(1.0, step, 10, 4, "linear") for step in range(10)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and rates[4] == 1.0
    assert rates[5:] == pytest.approx([5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    assert train.learning_rate(1.0, 0, 10, 0, "linear") == 1.0 and train.learning_rate(2.0, 9, 10, 0, "constant") == 2.0


def test_one_pass_through_the_data_is_a_number_of_steps():
    assert train.number_of_steps(train.FULL_PASS, samples(17), 8) == 3 and train.number_of_steps(5, samples(17), 8) == 5


def test_several_passes_have_no_gap_between_them():
    """Three epochs of 17 in steps of 8 are 51 questions in 7 steps; 3 x 3 steps would show 21 samples a fourth time."""
    assert train.number_of_steps(-3, samples(17), 8) == 7 and train.number_of_steps(-2, samples(16), 8) == 4
    assert train.number_of_steps(0, samples(17), 8) == 0
    stream = train.Stream(samples(17), 0, 0, ALONE)
    seen = [sample["id"] for _ in range(7) for sample in stream.take(8)]
    assert set(Counter(seen[:51]).values()) == {3}


def test_the_entropy_bonus_reaches_the_gradient_and_the_log(model, prompts):
    """A flag that is parsed and never used is the commonest dead setting of published trainers. The gradient moves by
    the bonus times that of the tokens' entropy, and not at all, nor the log, where the bonus is 0."""
    groups = rollout(model, prompts, group_size=3, max_new_tokens=6, temperature=1.0, seeds=[0, 1, 2])
    groups[0].mask[0, -2:] = False  # as behind an end token
    settings = dict(temperature=1.0, beta=0.0, clip_low=0.2, clip_high=0.2, norm="token", denominator=20.0,
                    reuse_video=False)

    def gradient(**more):
        model.hf.zero_grad()
        sums = accumulate_gradients(model, None, groups, **settings, **more)
        return {n: p.grad.clone() for n, p in model.hf.named_parameters() if p.grad is not None}, sums

    plain, sums = gradient()
    none, _ = gradient(entropy_bonus=0.0)
    assert "entropy_sum" not in sums and all(torch.equal(plain[name], none[name]) for name in plain)
    moved, sums = gradient(entropy_bonus=0.5)
    model.hf.zero_grad()
    scored = score_groups(model, groups, 1.0, False, with_entropy=True)
    entropy = sum((entropies * group.mask).sum() for group, (_, entropies) in zip(groups, scored))
    entropy.backward()
    for name, p in model.hf.named_parameters():
        if name in moved:
            torch.testing.assert_close(moved[name], plain[name] - 0.5 / 20 * p.grad, atol=2e-5, rtol=1e-4)
    assert sums["entropy_sum"] == pytest.approx(entropy.item(), rel=1e-5)
    assert train.mean_sums(ALONE, sums)["entropy"] == pytest.approx(sums["entropy_sum"] / sums["tokens"])
    assert "entropy" not in train.mean_sums(ALONE, {n: v for n, v in sums.items() if n != "entropy_sum"})


def test_best_is_judged_by_the_first_metric_of_each_task():
    assert train.score_of({"grounding/mIoU": 0.5, "grounding/R@0.3": 1.0, "qa/accuracy": 0.7, "n": 3}) == pytest.approx(0.6)


# --- flags ------------------------------------------------------------------------------------------------------------


def test_left_out_flags_take_the_published_values_with_a_model(tmp_path):
    """Whoever trains a real checkpoint gets the paper's recipe and not the toy's learning rate."""
    (tmp_path / "a.jsonl").touch()
    paper = train.parse_config(["--model", "Qwen/Qwen2.5-VL-7B-Instruct", "--train_data", "a.jsonl"])
    assert (paper.lr, paper.beta, paper.group_size, paper.questions, paper.sft_steps, paper.select_k) == (1e-6, 0.04, 8, 8, 0, 0)
    assert (paper.fps, paper.total_pixels, paper.max_new_tokens, paper.prompt) == (2.0, 3584 * 784, 1024, "think")
    assert train.parse_config(["--model", "x", "--train_data", "a.jsonl", "--lr", "2e-6"]).lr == 2e-6
    synthetic = train.parse_config([])
    assert synthetic.lr == train.Config().lr != paper.lr and synthetic.sft_steps > 0 and synthetic.select_k > 0


def test_switches_can_be_turned_off_as_well_as_on():
    """`type=bool` flags, which turn "--flag False" into True, are in half of the published trainers."""
    assert train.parse_config(["--freeze_vision"]).freeze_vision is True
    assert train.parse_config(["--no-freeze_vision"]).freeze_vision is False
    with pytest.raises(SystemExit):
        train.parse_config(["--freeze_vision", "False"])


@pytest.mark.parametrize("arguments, remedy", [
    (["--model", "x"], "--train_data"), (["--train_data", "a.jsonl"], "--model"), (["--group_size", "1"], "2 or more"),
    (["--select_k", "1"], "2 or more"), (["--temperature", "0"], "more than 0"), (["--questions", "0"], "at least 1"),
    (["--lora_rank", "-1"], "0 (off)"), (["--lora_rank", "4", "--lora_alpha", "0"], "alpha over 0"),
    (["--lora_rank", "4", "--no-freeze_vision"], "vision tower"), (["--lora_targets", "lm_head"], "invalid choice"),
    (["--save_every", "0"], "at least 1"), (["--sft_equal_time", "--steps", "0"], "nothing to compare"),
    (["--model", "x", "--train_data", "a", "--eval_every", "5"], "--eval_data"),
    (["--frame_cache", "x", "--frame_cache_gb", "0"], "leave --frame_cache out"),
    (["--tasks", "dancing"], "invalid choice"), (["--lr_rate", "1"], "unrecognized"),
])
def test_wrong_settings_are_refused_with_the_remedy(arguments, remedy, capsys):
    with pytest.raises(SystemExit):
        train.parse_config(arguments)
    assert remedy in capsys.readouterr().err


def test_every_flag_is_explained(capsys):
    with pytest.raises(SystemExit):
        train.parse_config(["--help"])
    text = capsys.readouterr().out
    for f in dataclasses.fields(train.Config):
        assert f"--{f.name}" in text and f.metadata["help"]
