"""The whole loop on real files: what is logged, saved, resumed, split over processes, and refused."""

import contextlib
import dataclasses
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ALONE, ROOT, copy_start
from processes import read, run_ranks, start_ranks
from small_runs import (
    SMALL,
    STARTED,
    assert_equal_runs,
    assert_same_run,
    lines,
    run,
    train_and_be_told_to_end,
    train_and_die_in_step_3,
    train_in,
    weights,
)

import rewards
import train
from data import VideoSettings, video_arguments
from grpo import accumulate_gradients, grpo_loss, rollout, score_groups
from lib import run as lib_run
from lib import toy
from lib.answers import PUBLISHED
from lib.checkpoints import names_in, newest_checkpoint
from lib.distributed import World
from lib.geometry import QWEN2_5
from lib.loader import VideoLoader, _clip_key
from lib.questions import with_style
from lib.run import Clock, Run, log_line, means_of_sums
from lib.samples import load_samples
from model import VideoLM
from tools import evaluate

# --- one run ----------------------------------------------------------------------------------------------------------


def test_a_run_leaves_every_file_that_others_rely_on(whole_run):
    """Tools read these names; a stage that forgets to write its part is found here and not after hours of training."""
    summary = json.loads((whole_run / "summary.json").read_text())
    for stage in ("before", "after_sft", "after"):
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
    evaluate.run(["--model", str(whole_run / "final"), "--data", str(data), "--out", str(tmp_path), "--device", "cpu", *tasks,
                  "--num_workers", "0"])
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
        assert {"wait", "sample", "sync", "score", "step"} <= set(line["seconds"])
        assert 0 < line["entropy"] < 7  # nats; only with --entropy_bonus, as here
        assert line["groups"] == 3 and line["clip_fraction"] == 0 and all(math.isfinite(v) for v in line["seconds"].values())
        assert line["wait_share"] == pytest.approx(line["seconds"]["wait"] / sum(line["seconds"].values()), abs=1e-3)
        assert line["sampled"] == round(line["length"] * 24)
        assert line["sampled_per_second"] == pytest.approx(line["sampled"] / line["seconds"]["sample"], rel=1e-2)
        assert f"videos {line['wait_share']:.0%}, {line['sampled_per_second']:.0f} tokens/s" in log_line(line, 4)
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


# --- imitation ---------------------------------------------------------------------------------------------------------


def test_imitation_learns_the_completion_and_not_the_prompt(model_folder):
    """An SFT baseline whose prompt is trained too is weak by construction; the loss must be that of the target alone."""
    model = VideoLM.load(str(model_folder))
    target = train.encode_target(model, "<answer>3 to 7</answer>")
    assert target[0, -1] == model.tokenizer.eos_token_id
    assert model.tokenizer.decode(target[0, :-1]) == "<answer>3 to 7</answer>"


@pytest.mark.parametrize("pack_tokens", [1, 8192])
def test_imitation_is_the_gradient_of_the_negative_log_likelihood(model, prompts, pack_tokens):
    """The warm start goes through the loss of GRPO, where a clip, a ratio or a denominator of completions in place of
    tokens could bend it. Here beside the likelihood itself, with a prompt for each target and no pack: one mean over the
    tokens of all targets, which differ in length, with video and without."""
    model.pack_tokens = pack_tokens
    targets = ["<answer>A</answer>", "<think>0123456789 3 to 7</think><answer>B</answer>", "<answer>B</answer> which colour"]
    prompts = [dataclasses.replace(prompt, sample={**prompt.sample, "target": target})
               for prompt, target in zip(prompts, targets)]
    assert sum(prompt.patches is None for prompt in prompts) == 1

    def gradient() -> dict[str, torch.Tensor]:
        found = {name: p.grad.clone() for name, p in model.hf.named_parameters() if p.grad is not None}
        model.hf.zero_grad()
        return found

    videos = model.encode_prompts(prompts)
    tokens = [train.encode_target(model, target) for target in targets]
    count = sum(t.numel() for t in tokens)
    logps = [model.logprobs(model.embed(p.ids, video), p.positions, t, 1.0, share_prefix=False)
             for p, video, t in zip(prompts, videos, tokens)]
    nll = -sum(x.sum() for x in logps) / count
    nll.backward()
    wanted = gradient()

    groups = [train.imitation_group(model, prompt, "think") for prompt in prompts]
    assert [group.tokens.tolist() for group in groups] == [t.tolist() for t in tokens]
    sums = accumulate_gradients(model, None, groups, train.SFT_LOSS, train.size_of(groups, "token"), temperature=1.0)
    found = gradient()
    assert train.size_of(groups, "token") == sums["tokens"] == count
    assert sums["nll_sum"] / count == pytest.approx(nll.item(), abs=1e-6)
    assert found.keys() == wanted.keys() and any("visual" in name for name in found)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], atol=1e-6, rtol=1e-5)


def test_the_warm_start_lowers_its_loss(whole_run):
    losses = [line["loss"] for line in lines(whole_run / "metrics.jsonl") if line["phase"] == "sft"]
    assert len(losses) == 90 and sum(losses[-5:]) < 0.5 * sum(losses[:5])


# --- what can go wrong, and what can be exchanged ----------------------------------------------------------------------


def not_a_number(*arguments, **settings):
    """A loss of which no gradient is finite."""
    loss, stats = grpo_loss(*arguments, **settings)
    return loss * math.nan, stats


@pytest.mark.parametrize("phase", ["sft", "grpo"])
def test_five_steps_without_a_finite_gradient_end_a_run(started, monkeypatch, phase):
    """One such step is skipped; a run that skips all of them burns its hours and says at the end that nothing was learned.
    In the warm start as well as in GRPO, and the weights are still those from before."""
    monkeypatch.chdir(started)
    monkeypatch.setattr(train, "SFT_LOSS", partial(not_a_number, **train.SFT_LOSS.keywords))
    monkeypatch.setattr(train, "loss_of", lambda config, made=train.loss_of: partial(not_a_number, **made(config).keywords))
    steps = ["--sft_steps", "7", "--steps", "0"] if phase == "sft" else ["--sft_steps", "0", "--steps", "7"]
    with pytest.raises(SystemExit, match=f"{phase} step 5: 5 steps in a row without a finite loss and gradient; last questions: .*train-0"):
        train.main([*STARTED, *steps, "--keep_dead_groups", "--out", "run"])
    log = lines(Path("run/metrics.jsonl"))
    assert [(line["phase"], line["step"], line["grad_norm"]) for line in log] == [(phase, k, None) for k in range(1, 6)]
    assert not any(name.startswith("optimizer/") for name in names_in(newest_checkpoint(Path("run"))))  # no step was taken


def test_another_loss_can_be_put_in(started, monkeypatch):
    """The simplest policy gradient there is, without ratio, clip and reference, in eight lines and no other change."""
    def reinforce(logps, old_logps, advantages, mask, *, ref_logps, denominator, entropies):
        gain = torch.where(mask, logps, 0.0).sum(dim=1) * advantages  # (B,)
        return -gain.sum() / denominator, {"tokens": mask.sum()}

    monkeypatch.chdir(started)
    monkeypatch.setattr(train, "loss_of", lambda config: reinforce)
    train.main([*STARTED, "--sft_steps", "0", "--steps", "2", "--beta", "0", "--out", "run"])
    log = lines(Path("run/metrics.jsonl"))
    assert len(log) == 2 and all(line["grad_norm"] > 0 for line in log)
    before, after = weights("start"), weights("run/final")
    assert max((before[name] - after[name]).abs().max() for name in before) > 1e-4


def test_the_entropy_bonus_reaches_the_gradient_and_the_log(model, prompts):
    """A flag that is parsed and never used is the commonest dead setting of published trainers. The gradient moves by
    the bonus times that of the tokens' entropy, and not at all, nor the log, where the bonus is 0."""
    groups = rollout(model, prompts, rewards.score, group_size=3, max_new_tokens=6, temperature=1.0, seeds=[0, 1, 2])
    groups[0].mask[0, -2:] = False  # as behind an end token

    def gradient(bonus: float, with_entropy: bool):
        loss = train.loss_of(train.Config(beta=0.0, loss_norm="token", entropy_bonus=bonus))
        model.hf.zero_grad()
        sums = accumulate_gradients(model, None, groups, loss, 20.0, temperature=1.0, with_entropy=with_entropy)
        return {n: p.grad.clone() for n, p in model.hf.named_parameters() if p.grad is not None}, sums

    plain, sums = gradient(0.0, with_entropy=False)
    assert "entropy_sum" not in sums and "entropy" not in means_of_sums(ALONE, sums)
    moved, sums = gradient(0.5, with_entropy=True)
    model.hf.zero_grad()
    entropy = sum((scored.entropies * group.mask).sum()
                  for group, scored in zip(groups, score_groups(model, groups, 1.0, with_entropy=True)))
    entropy.backward()
    for name, p in model.hf.named_parameters():
        if name in moved:
            torch.testing.assert_close(moved[name], plain[name] - 0.5 / 20 * p.grad, atol=2e-5, rtol=1e-4)
    assert sums["entropy_sum"] == pytest.approx(entropy.item(), rel=1e-5)
    assert means_of_sums(ALONE, sums)["entropy"] == pytest.approx(sums["entropy_sum"] / sums["tokens"])


# --- resumed ------------------------------------------------------------------------------------------------------------

# Four steps of imitation and six of GRPO over a data set with a broken video, two questions a step: in some steps one of two
# processes has fewer groups than the other, or none. Runs that add up in another order agree only as long as no random number
# lies within rounding of the border between two tokens. With seed 0 one does, in step 6; with 1 to 7 none does, on the machine
# where that was tried. Should two runs below part in one completion elsewhere, try another seed first.
SHORT = [*STARTED, "--eval_data", "toy/eval.jsonl", "--lr_schedule", "constant", "--questions", "2", "--steps", "6",
         "--seed", "1"]


def copy_short(whole_run: Path, folder: Path) -> Path:
    copy_start(whole_run, folder)
    (folder / "toy" / "videos" / "train-0002.mp4").write_bytes(b"not a video")
    return folder


@pytest.fixture(scope="module")
def one(whole_run, tmp_path_factory) -> Path:
    """The run of SHORT in one process, whole: what the runs that are killed, shared out or sharded are compared with.
    Beside it lie its model and data."""
    folder = copy_short(whole_run, tmp_path_factory.mktemp("short"))
    with contextlib.chdir(folder):
        train.main([*SHORT, "--out", "one"])
    return folder / "one"


@pytest.fixture
def short(whole_run, tmp_path, monkeypatch) -> Path:
    """A folder with the same model and data."""
    monkeypatch.chdir(tmp_path)
    return copy_short(whole_run, tmp_path)


def test_there_is_something_to_compare_with(one):
    """Two runs in which nothing happens are equal."""
    log = lines(one / "metrics.jsonl")
    assert len(log) == 10 and sum(line["unreadable"] for line in log) > 0
    assert any(line["grad_norm"] > 0 and "kl" in line for line in log)
    start, end = weights(one.parent / "start"), weights(one / "final")
    assert max((start[name] - end[name]).abs().max() for name in start) > 1e-3
    assert json.loads((one / "summary.json").read_text())["after"]["n"] == 8


def test_a_killed_run_resumes_bit_for_bit(one, short):
    """Resuming that repeats or skips a batch, or loses optimiser state, gives another model: compared to the last bit.
    The kill comes when a step behind the newest checkpoint is in the log already."""
    broken = short / "broken"
    (killed,) = start_ranks(short, 1, train_and_die_in_step_3, short, [*SHORT, "--out", "broken", "--num_workers", "1"])
    killed.join(120)
    assert killed.exitcode == -signal.SIGKILL
    assert newest_checkpoint(broken).name == "checkpoint-1-grpo-000002" and len(lines(broken / "metrics.jsonl")) == 4 + 3
    train.main(["--resume", "--out", "broken", "--num_workers", "0"])
    assert_equal_runs(one, broken)
    first, second = (json.loads((folder / "summary.json").read_text()) for folder in (one, broken))
    assert {k: v for k, v in first.items() if k != "seconds"} == {k: v for k, v in second.items() if k != "seconds"}


@pytest.mark.parametrize("told", [(0,), (1,)])
def test_a_run_that_is_told_to_end_saves_the_step_and_goes_on_bit_for_bit(one, short, told):
    """A scheduler's SIGTERM cost all steps since the newest checkpoint. It reaches the ranks at different moments, or only one
    of them: they save together, or one of them would wait for the others for ever. Step 3 is no multiple of --save_every."""
    size = 1 + max(told)
    ranks = start_ranks(short / "log", size, train_and_be_told_to_end, short,
                        [*SHORT, "--save_every", "100", "--out", "ended"], told, 2)
    for rank in ranks:
        rank.join(120)
    assert [rank.exitcode for rank in ranks] == [1] * size  # `processes` makes 1 of every exception
    text = read(short / "log", 0)
    assert "ended by SIGTERM: the state behind grpo step 3 has been saved: --resume goes on from there" in text
    assert "SystemExit: 143" in text
    assert newest_checkpoint(short / "ended").name == "checkpoint-1-grpo-000003"
    if size == 1:
        train.main(["--resume", "--out", "ended"])
        assert_equal_runs(one, short / "ended")
    else:
        run_ranks(short / "log", size, train_in, short, ["--resume", "--out", "ended"])
        assert_same_run(one, short / "ended")


def test_a_signal_between_the_steps_ends_a_run_at_once(short, monkeypatch):
    """An evaluation may take longer than a scheduler waits, and there is nothing to save in it."""
    def evaluate_and_be_told(run, *_):
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("went on")

    monkeypatch.setattr(train, "measure", evaluate_and_be_told)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit, match="143"):
        train.main([*SHORT, "--out", "ended"])
    assert signal.getsignal(signal.SIGTERM) == before  # and whoever called train.main has the signal back


def test_ctrl_c_is_one_line_and_no_traceback(short, monkeypatch, capsys):
    """In the middle of a step, or of a save, where the library takes it for a disk that cannot be written."""
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.distributed.checkpoint.FileSystemWriter, "write_data", interrupt)
    old = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit, match="130"):
            train.main([*SHORT, "--out", "ended"])
    finally:
        signal.signal(signal.SIGINT, old)
    err = capsys.readouterr().err
    assert "interrupted: no step had been saved yet; --resume goes on" in err and "make room" not in err


def test_too_many_unreadable_videos_end_a_run_with_its_state(started, monkeypatch, capsys):
    """A folder that was unmounted, or half copied, made a run that trained on the rest, and said so in lines that nobody reads."""
    monkeypatch.chdir(started)
    monkeypatch.setattr(lib_run, "ENOUGH_VIDEOS", 4)
    for k in (1, 3, 5):
        (started / "toy" / "videos" / f"train-000{k}.mp4").write_bytes(b"not a video")
    arguments = [*STARTED, "--sft_steps", "0", "--steps", "40", "--questions", "3", "--group_size", "2", "--max_new_tokens", "2"]
    with pytest.raises(SystemExit, match=r"\d of the \d videos tried so far cannot be read, more than --max_bad_share 0.1"):
        train.main([*arguments, "--out", "run"])
    assert "train-000" in capsys.readouterr().out
    done = len(lines(Path("run/metrics.jsonl")))
    assert done >= 1 and newest_checkpoint(Path("run")).name == f"checkpoint-1-grpo-{done:06d}"
    train.main(["--resume", "--out", "run", "--max_bad_share", "1", "--steps", str(done + 6)])
    assert len(lines(Path("run/metrics.jsonl"))) == done + 6


def test_too_many_unreadable_videos_end_a_selection(started, monkeypatch):
    """It answers every question first: what it has kept of the rest would be trained on."""
    monkeypatch.chdir(started)
    monkeypatch.setattr(lib_run, "ENOUGH_VIDEOS", 6)
    (started / "toy" / "videos" / "train-0001.mp4").write_bytes(b"not a video")
    with pytest.raises(SystemExit, match="1 of the 6 videos tried so far"):
        train.main([*STARTED, "--sft_steps", "0", "--select_k", "2", "--max_new_tokens", "2", "--out", "run"])


def test_a_resumed_run_keeps_its_settings_and_refuses_others(whole_run, monkeypatch, capsys):
    """`--resume` without the other flags must not train a real run on with the toy's values, nor another seed's order."""
    monkeypatch.chdir(whole_run.parent)
    config = train.parse_config(["--resume", "--out", "run", "--steps", "9"])
    assert (config.steps, config.group_size, config.sft_steps, config.overwrite) == (9, 8, 90, False)
    with pytest.raises(SystemExit):
        train.parse_config(["--resume", "--out", "run", "--seed", "5"])
    assert "--seed 0" in capsys.readouterr().err


# --- several processes ------------------------------------------------------------------------------------------------


def test_two_processes_give_the_run_of_one_also_with_an_unreadable_video(one, short):
    """Noise is a function of the question, gradients are summed with one denominator: the world size is no setting.

    One video is broken, so that in some steps one rank has fewer groups than the other, or none: it must not hang.
    """
    run_ranks(short, 2, train_in, short, [*SHORT, "--out", "two"])
    assert "train-0002.mp4" in read(short, 0) + read(short, 1)
    assert_same_run(one, short / "two")


@pytest.mark.parametrize("shard", ["off", "on"])
def test_videos_pictures_and_text_share_the_steps_of_two_processes(started, monkeypatch, shard):
    """A rank whose questions show nothing, beside one with videos and one whose picture cannot be read: none waits for ever,
    and the vision tower of all gets the gradient that one process computes."""
    from PIL import Image

    monkeypatch.chdir(started)
    for name, size in (("red", (60, 40)), ("green", (120, 30)), ("blue", (30, 90))):
        Image.new("RGB", size, name).save(f"{name}.png")
    Path("cut.png").write_bytes(Path("red.png").read_bytes()[:60])
    video = next(line for line in lines(started / "toy/train.jsonl") if line["task"] == "qa")
    asked = {"task": "qa", "question": "Which colour?", "options": ["red", "green"], "answer": "A"}
    samples = [{**video, "video": str(started / "toy" / video["video"])}, {**asked, "id": "text"}, {**asked, "id": "text2"},
               {**asked, "id": "one", "image": "red.png"}, {**asked, "id": "cut", "image": ["red.png", "cut.png"]},
               {**asked, "id": "two", "image": ["green.png", "blue.png"]}]
    Path("mixed.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    arguments = [*STARTED, "--train_data", "mixed.jsonl", "--eval_data", "mixed.jsonl", "--questions", "3", "--steps", "2",
                 "--sft_questions", "3", "--sft_steps", "2", "--max_new_tokens", "64", "--keep_dead_groups"]
    train.main([*arguments, "--out", "one"])
    run_ranks(started, 2, train_in, started, [*arguments, "--out", "two", "--shard", shard])
    assert "cut.png: truncated or damaged" in read(started, 0) + read(started, 1)
    assert_same_run(started / "one", started / "two")
    before, after = weights(started / "start"), weights(started / "one" / "final")
    assert any("visual" in name and not torch.equal(before[name], after[name]) for name in before)
    told = lines(started / "one" / "predictions.after.jsonl")
    assert [line["id"] for line in told if line["reasons"] == ["unreadable_video"]] == ["cut"]
    assert "data:image/jpeg" in (started / "one" / "report.html").read_text()


def test_a_question_that_comes_twice_in_a_step_is_answered_twice(started, monkeypatch):
    """Four questions and eight places in each step. With noise that depends on the question alone, both groups of a
    question are the same eight completions, and the step learns from half of what it has paid for. Two processes each
    have one of the two, and must find the same."""
    monkeypatch.chdir(started)
    arguments = [*STARTED, "--train_data", "toy/train.jsonl:4", "--sft_steps", "0", "--questions", "8", "--steps", "2"]
    train.main([*arguments, "--out", "one"])
    said = [(r["step"], r["id"], r["completion"]) for r in lines(Path("one/completions.jsonl"))]
    groups = [said[k:k + 4] for k in range(0, len(said), 4)]
    assert len(groups) == 2 * 8 and all(len({(step, name) for step, name, _ in group}) == 1 for group in groups)
    for step in (1, 2):
        of_step = [group for group in groups if group[0][0] == step]
        assert sorted(group[0][1] for group in of_step) == sorted(2 * [s["id"] for s in four_samples()])
        assert len({tuple(group) for group in of_step}) == 8
    result = run(started, *arguments, "--out", "two", processes=2)
    assert result.returncode == 0, result.stderr[-3000:]
    assert_same_run(Path("one"), Path("two"))


def four_samples() -> list[dict]:
    return load_samples(["toy/train.jsonl:4"], tasks=["grounding", "qa"])


# --- sharding ---------------------------------------------------------------------------------------------------------


def test_a_sharded_run_is_the_run_of_one_process(one, short):
    """Through all stages: imitation, sampling, GRPO, evaluation, checkpoints, resume without shards, and final/."""
    train.main([*SHORT, "--out", "shards", "--shard", "on", "--steps", "4"])
    train.main(["--resume", "--out", "shards", "--shard", "off", "--steps", "6"])
    assert_same_run(one, short / "shards")


def test_what_is_frozen_is_not_sharded(monkeypatch, capsys):
    """A layer's gathered bfloat16 weights and its float32 adapters are two things to FSDP, and folding a third."""
    for arguments in (["--shard", "on"], ["--offload"]):
        with pytest.raises(SystemExit):
            train.parse_config(["--lora_rank", "4", *arguments])
        assert "--shard on and --offload" in capsys.readouterr().err
    gpus = World(0, 8, torch.device("cuda:0"))
    monkeypatch.setattr(train, "worth_sharding", lambda *_: True)
    monkeypatch.setattr(train, "Sharding", lambda *_, **__: pytest.fail("LoRA was sharded"))
    monkeypatch.setattr(train.VideoLM, "load", lambda *_: SimpleNamespace(hf=None, geometry=QWEN2_5))
    monkeypatch.setattr(train.lora, "add_adapters", lambda *_: None)
    train.load_model(train.parse_config(["--lora_rank", "4"]), gpus, "a name")


@pytest.mark.slow
@pytest.mark.parametrize("processes, shard", [(2, "on"), (4, "on"), (4, "off")])
def test_the_number_of_processes_and_sharding_change_nothing(one, short, processes, shard):
    """Two questions a step: of four processes, two have none at all, in every step."""
    several = run(short, *SHORT, "--out", "several", "--shard", shard, "--steps", "4", processes=processes)
    assert several.returncode == 0, several.stderr[-3000:]
    resumed = run(short, "--resume", "--out", "several", "--steps", "6", processes=2)  # on two, with the same shards or none
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert_same_run(one, short / "several")


@pytest.mark.slow
def test_two_nodes_are_two_agents_that_meet_at_an_address(one, short):
    """The commands of the README, on one machine: each agent starts one process; nobody is told a rank."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    start = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--rdzv_id=run1",
             "--rdzv_backend=c10d", f"--rdzv_endpoint=localhost:{port}", str(ROOT / "train.py"), *SHORT, "--out", "two",
             "--shard", "on"]
    agents = [subprocess.Popen(start, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True, stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE) for _ in range(2)]
    for agent in agents:
        _, errors = agent.communicate(timeout=300)
        assert agent.returncode == 0, errors[-3000:]
    assert_same_run(one, short / "two")


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("flags", [[], ["--shard", "on"], ["--offload"], ["--lora_rank", "4"]])
def test_a_run_on_a_gpu_goes_on_where_it_was(short, gpu, flags):
    """Not to the last bit: the gradient of attention is summed there in no fixed order, and one token that rounding has
    chosen makes another completion. What is asked is the same, and sampling and scoring agree."""
    on_gpu = [*SHORT, "--device", gpu, "--gradient_checkpointing", "--keep_dead_groups", "--sft_steps", "0", "--steps", "4",
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


# --- LoRA -------------------------------------------------------------------------------------------------------------


def test_a_lora_run_trains_adapters_only_and_resumes_bit_for_bit(started, monkeypatch):
    """Both stages end to end. After the warm start its adapters are part of the reference (KL 0 at step 1), checkpoints
    hold what is trained and no more, and folders are plain ones in which only the adapted matrices have changed."""
    monkeypatch.chdir(started)
    train.main([*STARTED, "--sft_steps", "2", "--sft_lr", "1e-2", "--lr", "1e-2", "--lora_rank", "4", "--lora_alpha", "8",
                "--out", "run"])
    run = started / "run"
    log = [line for line in lines(run / "metrics.jsonl") if line["phase"] == "grpo"]
    assert log[0]["kl"] == 0 and log[-1]["kl"] > 0 and any(line["grad_norm"] > 0 for line in log)
    saved = names_in(run / "checkpoint-1-grpo-000004")
    trained = {name.removeprefix("model/") for name in saved if name.startswith("model/")}
    assert trained and all("lora_" in name for name in trained)
    assert {name.split("/")[1] for name in saved if name.startswith("optimizer/")} == trained
    start, warm, final = (weights(path) for path in (started / "start", run / "warm_start", run / "final"))
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
    assert_equal_runs(run, started / "again")


def test_the_reference_of_a_lora_run_is_the_policy_itself(model, model_folder):
    """A second model in memory is what LoRA is there to save; the numbers alone would not tell."""
    name = str(model_folder)
    assert train.load_reference(train.Config(lora_rank=4, freeze_vision=True), ALONE, model, name) is model
    assert train.load_reference(train.Config(lora_rank=4, freeze_vision=True, beta=0.0), ALONE, model, name) is None
    reference = train.load_reference(train.Config(), ALONE, model, name)
    assert reference.hf is not model.hf and not any(p.requires_grad for p in reference.hf.parameters())


def test_lora_freezes_the_vision_tower_and_stays_what_it_is_in_a_resumed_run(tmp_path, capsys):
    assert train.parse_config(["--lora_rank", "8"]).freeze_vision is True
    assert train.parse_config([]).freeze_vision is False and train.parse_config([]).lora_rank == 0
    out = tmp_path / "run"
    Run(train.parse_config(["--out", str(out), "--lora_rank", "8"]), ALONE, loader=None)
    assert train.parse_config(["--resume", "--out", str(out)]).lora_rank == 8
    for arguments in (["--lora_rank", "4"], ["--lora_alpha", "16"]):
        with pytest.raises(SystemExit):
            train.parse_config(["--resume", "--out", str(out), *arguments])
        assert arguments[0] in capsys.readouterr().err


# --- pieces -----------------------------------------------------------------------------------------------------------


def test_a_model_of_which_nothing_can_be_read_is_named(tmp_path, monkeypatch, capsys):
    """All metrics 0 look like a bad model; mostly the answers were cut, or in another format. Before a warm start it is normal."""
    for sft_steps, expected in (("0", True), ("5", False)):
        run = SimpleNamespace(config=train.parse_config(["--sft_steps", sft_steps]), out=tmp_path, loader=None, world=ALONE,
                              progress=None)
        monkeypatch.setattr(train, "evaluate", lambda *_: ({"parse_failure": 1.0}, []))
        train.measure(run, SimpleNamespace(gathered=contextlib.nullcontext), [{"id": "a"}], None, "before")
        assert ("not one held-out answer could be read" in capsys.readouterr().out) == expected


def test_held_out_videos_that_cannot_be_read_are_said(tmp_path, monkeypatch, capsys):
    """They count as 0 in every metric, and nothing said so; with a wrong root all metrics were 0, and the model was blamed."""
    run = SimpleNamespace(config=train.parse_config([]), out=tmp_path, loader=None, world=ALONE, progress=None)
    lost, answered = {"id": "a", "problem": "a.mp4: no such file"}, {"id": "b"}
    for name, predictions in (("before", [lost, answered]), ("on_the_way", [lost])):
        monkeypatch.setattr(train, "evaluate", lambda *_, lines=predictions: ({"parse_failure": 0.5}, lines))
        train.measure(run, SimpleNamespace(gathered=contextlib.nullcontext), [{"id": "a"}, {"id": "b"}], None, name)
        assert f"1 of {len(predictions)} held-out questions could not be asked ({name}): a.mp4: no such file" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="a.mp4: no such file. Check --eval_data"):
        train.measure(run, SimpleNamespace(gathered=contextlib.nullcontext), [{"id": "a"}], None, "after")


def test_with_a_published_model_fewer_questions_are_answered_together():
    """32 long prompts at once need memory that neither the plan nor the rehearsal had counted."""
    assert train.parse_config([]).eval_batch == 32
    assert train.parse_config(["--model", "m", "--train_data", "a"]).eval_batch == 8


def test_an_interrupted_selection_asks_nothing_twice(model, tmp_path, monkeypatch):
    """It is the longest inference of a run: K answers to every training question. What is left of it when the process
    dies must serve the next one (without a model, any question that is asked raises), and other settings must not mix."""
    toy.write_dataset(tmp_path, train=2, eval=1, seed=0)
    samples = with_style(load_samples([str(tmp_path / "train.jsonl")], tasks=["qa"]), "think")
    config = train.Config(select_k=2, max_new_tokens=6)
    with VideoLoader(VideoSettings(min_pixels=3136), num_workers=0) as loader:
        run = SimpleNamespace(config=config, out=tmp_path, loader=loader, world=ALONE, progress=None, check_videos=lambda _: None)
        nobody = SimpleNamespace(gathered=contextlib.nullcontext)
        monkeypatch.setattr(train, "select", lambda *_, **__: sys.exit("killed"))
        with pytest.raises(SystemExit, match="killed"):
            train.select_samples(run, model, samples, rewards.score)
        asked = {}
        report = {"kept": 2, "total": 2, "tasks": {}, "bins": {}, "control": None, "source": "predictions"}
        monkeypatch.setattr(train, "select", lambda _, predictions, **__: asked.update(predictions) or (["a"], report))
        run.config = dataclasses.replace(config, select_k=3)
        with pytest.raises(ValueError, match="num_samples 2, not 3"):
            train.select_samples(run, nobody, samples, rewards.score)
        run.config = config
        assert train.select_samples(run, nobody, samples, rewards.score)["ids"] == ["a"]
    assert list(asked) == [sample["id"] for sample in samples]
    assert not (tmp_path / "selecting").exists()


def test_the_next_step_is_decoded_while_this_one_is_sampled(model, tmp_path, monkeypatch):
    """A GPU that waits for videos waits for minutes: what the next step needs must become ready without being asked for."""
    toy.write_dataset(tmp_path / "toy", 4, 1, 0)
    samples = load_samples([str(tmp_path / "toy" / "train.jsonl")], tasks=["grounding"])
    config = train.parse_config(["--out", str(tmp_path / "run"), "--questions", "2", "--group_size", "2",
                                 "--max_new_tokens", "3"])
    ready = []

    def watch(*arguments, **settings):
        coming = [loader.ahead[_clip_key(sample["video"], video_arguments(sample, loader.settings))] for _, sample in questions.peek(2)]
        ready.extend(future.result(timeout=60) for future in coming)  # nobody has loaded them
        return rollout(*arguments, **settings)

    monkeypatch.setattr(train, "rollout", watch)
    with VideoLoader(VideoSettings(min_pixels=3136), num_workers=1) as loader:
        run = Run(config, ALONE, loader)
        run.clock, questions = Clock(ALONE, ""), train.make_questions(run, model, samples, seed=0)
        sampled = train.sample_groups(run, model, questions, rewards.score, step=0)
        assert len(sampled.groups) == len(ready) == 2
        assert all(loader.load(sample) is clip for (_, sample), clip in zip(questions.peek(2), ready))


def test_the_learning_rate_rises_falls_and_never_reaches_the_last_zero():
    rates = [train.learning_rate(1.0, step, 10, 4, "linear") for step in range(10)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and rates[4] == 1.0
    assert rates[5:] == pytest.approx([5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    assert train.learning_rate(1.0, 0, 10, 0, "linear") == 1.0 and train.learning_rate(2.0, 9, 10, 0, "constant") == 2.0


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


def test_a_model_of_ones_own_goes_on_seeing_what_it_saw(whole_run, capsys):
    """The same weights scored 0.144 instead of 0.497 mIoU where the papers' pixels took the place of those that they were
    trained with, without a word."""
    known = json.loads((whole_run / "config.json").read_text())
    ours = ["--model", str(whole_run / "final"), "--train_data", "x.jsonl"]
    config = train.parse_config(ours)
    assert (config.min_pixels, config.max_new_tokens) == (known["min_pixels"], known["max_new_tokens"]) != (16 * 784, 1024)
    assert config.lr == 1e-6  # what is no question of seeing and asking stays the published value
    assert train.parse_config([*ours, "--min_pixels", "12544"]).min_pixels == 12544


def test_one_thread_for_a_small_model_unless_told_otherwise(model_folder, monkeypatch, capsys):
    """Beside one busy process the threads of a step spin for the one without a core: 50 s instead of 1.5 s."""
    try:
        torch.set_num_threads(2)
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        train.choose_threads(ALONE, str(model_folder))
        assert torch.get_num_threads() == 2 and not capsys.readouterr().out
        monkeypatch.delenv("OMP_NUM_THREADS")
        train.choose_threads(ALONE, "Qwen/Qwen2.5-VL-7B-Instruct")
        assert torch.get_num_threads() == 2
        train.choose_threads(ALONE, str(model_folder))
        assert torch.get_num_threads() == 1 and "one thread" in capsys.readouterr().out
    finally:
        torch.set_num_threads(1)


def test_switches_can_be_turned_off_as_well_as_on():
    """`type=bool` flags, which turn "--flag False" into True, are in half of the published trainers."""
    assert train.parse_config(["--freeze_vision"]).freeze_vision is True
    assert train.parse_config(["--no-freeze_vision"]).freeze_vision is False
    with pytest.raises(SystemExit):
        train.parse_config(["--freeze_vision", "False"])


@pytest.mark.parametrize("arguments, remedy", [
    (["--model", "x"], "--train_data"), (["--eval_data", "a.jsonl"], "--train_data"), (["--group_size", "1"], "2 or more"),
    (["--select_k", "1"], "2 or more"), (["--temperature", "0"], "evaluation is greedy anyway"),
    (["--lora_rank", "-1"], "0: train the model itself"),
    (["--lora_rank", "4", "--no-freeze_vision"], "vision tower"),
    (["--model", "x", "--train_data", "a", "--eval_every", "5"], "--eval_data"),
    (["--frame_cache", "x", "--frame_cache_gb", "0"], "without --frame_cache nothing is kept"),
    (["--tasks", "dancing"], "invalid choice"), (["--lr_rate", "1"], "unrecognized"),
    (["--max_bad_share", "10"], "0 to 1"),
    (["--compile", "--shard", "on"], "--compile"), (["--offload", "--shard", "off"], "--shard off"),
])
def test_wrong_settings_are_refused_with_the_remedy(arguments, remedy, capsys):
    with pytest.raises(SystemExit):
        train.parse_config(arguments)
    assert remedy in capsys.readouterr().err


def test_weights_for_others_are_bfloat16_where_that_loses_nothing():
    """A published checkpoint is bfloat16 and is trained in it on a GPU; what adapters add is finer than that, and the toy's
    figures are of its float32."""
    real = ["--model", "m", "--train_data", "x.jsonl"]
    assert train.parse_config(real).save_dtype == "bfloat16"
    assert train.parse_config([*real, "--lora_rank", "4"]).save_dtype == "float32"
    assert train.parse_config([*real, "--lora_rank", "4", "--save_dtype", "bfloat16"]).save_dtype == "bfloat16"
    assert train.parse_config([]).save_dtype == "float32"


def test_a_model_or_data_inside_the_folder_is_not_overwritten(tmp_path):
    """`--overwrite` around the model that is to be loaded would delete it, and then not find it."""
    (tmp_path / "final").mkdir()
    with pytest.raises(SystemExit):
        train.parse_config(["--model", str(tmp_path / "final"), "--train_data", "a", "--out", str(tmp_path), "--overwrite"])


@pytest.mark.parametrize("entry", ["run/a.jsonl", "run/a.jsonl@videos:3", "a.jsonl@run/videos", "a.jsonl:50%@"])
def test_data_inside_the_folder_is_not_overwritten_however_it_is_named(tmp_path, monkeypatch, entry):
    """FILE@ROOT is no path, and so was taken for one outside: the data were deleted, and then not found."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run" / "videos").mkdir(parents=True)
    for file in ("a.jsonl", "run/a.jsonl"):
        Path(file).touch()
    arguments = ["--train_data", entry.removesuffix("@"), "--out", "run", "--overwrite"]
    if entry.endswith("@"):
        assert train.parse_config(arguments).overwrite
        arguments += ["--video_root", "run/videos"]
    with pytest.raises(SystemExit):
        train.parse_config(arguments)


def test_a_mistyped_name_of_data_costs_no_old_run(tmp_path, monkeypatch):
    """With --overwrite the old run was deleted first, and only then the new one's data were looked for."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    for flags in (["--train_data", "trian.jsonl"], ["--train_data", "a.jsonl"]):
        (tmp_path / "a.jsonl").write_text("no sample\n")
        with pytest.raises(ValueError, match="trian.jsonl: no such file|a.jsonl"):
            train.main([*SMALL, *flags, "--out", "run", "--overwrite"])
        assert (tmp_path / "run" / "config.json").exists()


def test_help_has_three_groups(capsys):
    """Sixty flags in one list are read by nobody: what a paper decides, what the machine decides, and the toy's."""
    with pytest.raises(SystemExit):
        train.parse_config(["--help"])
    text = capsys.readouterr().out
    titles = [text.index(f"\n{title}") for title in ("the papers", "your machine", "the synthetic task")]
    assert titles == sorted(titles)
    where = {name: sum(text.index(f"  --{name} ") > title for title in titles)
             for name in ("lr", "group_size", "sft_steps", "select_k", "out", "num_workers", "wait_minutes", "toy_train")}
    assert where == {"lr": 1, "group_size": 1, "sft_steps": 1, "select_k": 1, "out": 2, "num_workers": 2, "wait_minutes": 2,
                     "toy_train": 3}
    for f in dataclasses.fields(train.Config):
        assert f"--{f.name}" in text and f.metadata["help"] and f.metadata["group"]
