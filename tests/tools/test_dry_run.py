"""The rehearsal is as large as the run, leaves nothing behind, and adds up its hours."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from processes import read, run_ranks
from small_runs import CLIPS, SMALL, lines, train_in

import train
from lib import toy
from tools import dry_run

REHEARSAL = [*SMALL, "--model", "start", "--train_data", "toy/train.jsonl", "--tasks", "qa", "--min_pixels", "3136",
             "--no-gradient_checkpointing", "--pack_tokens", "8192", "--max_new_tokens", "120", "--dry_run"]


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    toy.write_dataset(tmp_path_factory.getbasetemp() / "rehearsed", 6, 1, 0)
    return tmp_path_factory.getbasetemp() / "rehearsed"


@pytest.fixture
def folder(model_folder, clips, tmp_path, monkeypatch) -> Path:
    """With the clips, of which one is broken, and, as `start`, a model that has learned nothing."""
    shutil.copytree(model_folder, tmp_path / "start")
    shutil.copytree(clips, tmp_path / "toy")
    (tmp_path / "toy" / "videos" / "train-0002.mp4").write_bytes(b"not a video")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_dry_run_takes_the_longest_prompts_to_the_limit_and_leaves_nothing(folder, monkeypatch, capsys):
    """A run that dies in hour three on the first long video is what it prevents: the largest step is done first, whatever
    the order of the data, with gradients and moments although all its rewards are alike."""
    samples = [sample for sample in lines(folder / "toy" / "train.jsonl") if sample["task"] == "qa"]
    short = [{**sample, "start": 0.0, "end": 2.0, "duration": 2.0} for sample in samples[:2]]
    long = samples[-2:]
    (folder / "data.jsonl").write_text("".join(json.dumps(s) + "\n" for s in [*short, *long]))
    before = sorted(folder.rglob("*"))
    monkeypatch.setattr(dry_run, "CANDIDATES", 2)  # seconds decide who is looked at
    steps, updates, made = [], [], []
    real_step, real_gradients, real_optimizer = dry_run.optimizer_step, dry_run.accumulate_gradients, dry_run.make_optimizer
    monkeypatch.setattr(dry_run, "optimizer_step", lambda *a: steps.append((a[0], real_step(*a))) or steps[-1][1])

    def gradients(*arguments, **named):
        """On a GPU the peak is here, and only from the second step on, when there are moments: 8 bytes a parameter."""
        assert len(made[-1].state) == len(made[-1].param_groups[0]["params"]) > 0
        updates.append(arguments[2])
        return real_gradients(*arguments, **named)

    monkeypatch.setattr(dry_run, "make_optimizer", lambda *a: made.append(real_optimizer(*a)) or made[-1])
    monkeypatch.setattr(dry_run, "accumulate_gradients", gradients)
    train.main([*REHEARSAL, "--train_data", f"data.jsonl@{folder}/toy", "--questions", "2", "--sft_questions", "1",
                "--sft_steps", "10", "--steps", "5", "--max_new_tokens", "120", "--group_size", "4"])
    said = capsys.readouterr().out
    imitated, trained = updates
    assert len(imitated) == 1 and sorted(group.prompt.sample["id"] for group in trained) == sorted(s["id"] for s in long)
    assert all(group.mask.all() and group.mask.shape == (4, 120) for group in trained)
    assert all(torch.equal(group.advantages, torch.linspace(-1, 1, 4)) for group in trained)
    assert len(steps) == 2 and all(norm > 0 and optimizer.state for optimizer, norm in steps)
    assert "peak memory" in said and "warm start" in said and "GRPO" in said and "4 completions of 120" in said
    assert sorted(folder.rglob("*")) == before


def test_a_dry_run_of_the_synthetic_task_writes_clips_and_no_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train.main([*SMALL, *CLIPS, "--out", "run", "--dry_run", "--lora_rank", "4", "--tasks", "qa", "--toy_train", "3"])
    assert "in all" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["toy"]


def test_hours_are_steps_times_measured_seconds():
    """By hand: 40 samples, 4 questions a step; 2 s wait and sample, 3 s score and step; 8 greedy answers three times."""
    config = train.Config(questions=4, sft_questions=8, sft_steps=-1, steps=20, select_k=16, group_size=8, eval_every=0)
    cost = {"decode": 0.1, "sft": 7.0, "wait": 0.5, "sample": 1.5, "score": 2.0, "step": 1.0}
    stages = dry_run.predict_seconds(config, cost, samples(40), samples(8))
    assert stages == pytest.approx({"warm start": 5 * 7, "selection": 40 * 0.5 * 2, "GRPO": 20 * 5, "evaluation": 3 * 8 * 0.5})
    slow = dry_run.predict_seconds(config, {**cost, "decode": 2.0}, samples(40), samples(8))  # the model waits for videos
    assert slow["GRPO"] == pytest.approx(20 * 4 * 2.0) and slow["warm start"] == pytest.approx(5 * 8 * 2.0)
    assert slow["evaluation"] == pytest.approx(3 * 8 * 2.0)
    often = dry_run.predict_seconds(dataclasses.replace(config, eval_every=5), cost, samples(40), samples(8))
    assert often["evaluation"] == pytest.approx((3 + 4) * 8 * 0.5)
    only_sft = dataclasses.replace(config, steps=0, select_k=0)
    assert dry_run.predict_seconds(only_sft, {"decode": 0.1, "sft": 7.0}, samples(40), [])["GRPO"] == 0


def samples(n):
    return [{"id": str(i)} for i in range(n)]


def test_running_out_of_memory_in_a_dry_run_says_what_helps(folder, monkeypatch):
    """The answer it was asked for; a page of traceback hides it."""
    def too_much(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(dry_run, "accumulate_gradients", too_much)
    with pytest.raises(SystemExit, match=r"in phase 'score'(.|\n)*--lora_rank"):
        train.main([*REHEARSAL, "--train_data", "toy/train.jsonl:1", "--sft_steps", "0", "--questions", "1",
                    "--max_new_tokens", "3"])


def test_a_data_set_that_cannot_be_read_is_told_before_the_run(folder):
    """A --video_root that is wrong: every question is left out, and the run would go on to its end without one."""
    with pytest.raises(SystemExit, match="not one video(.|\n)*--video_root"):
        train.main([*REHEARSAL, "--train_data", "toy/train.jsonl@/nowhere"])


def test_a_sharded_rehearsal_is_a_rehearsal(folder, capsys):
    """Nothing ends a completion there, not even the end token, of which the passes of weight zero are made."""
    train.main([*REHEARSAL, "--shard", "on"])
    assert "peak memory" in capsys.readouterr().out and not Path("runs").exists()


def test_a_rehearsal_by_two_processes_ends_although_one_has_nothing(folder):
    """Of one question a step, the other process has only passes of weight zero."""
    arguments = [*REHEARSAL, "--questions", "1", "--sft_questions", "1", "--shard", "on", "--out", "rehearsal"]
    run_ranks(folder / "said", 2, train_in, folder, arguments)
    assert "peak memory" in read(folder / "said", 0) and "peak memory" not in read(folder / "said", 1)
    assert not (folder / "rehearsal").exists()


@pytest.mark.gpu
def test_a_rehearsal_on_a_gpu_says_what_a_step_takes(folder, gpu, capsys):
    """The figure is what was allocated there, not what the process holds."""
    train.main([*REHEARSAL, "--device", gpu])
    text = capsys.readouterr().out
    assert 0 < float(text.split("peak memory: ")[1].split()[0]) < 4
    assert "on the GPU" in text or gpu == "cpu"
