"""The loop: from a checkpoint and questions about videos to a model that answers them better.

    torchrun train.py                                            the synthetic task, from random weights, on a laptop
    torchrun --nproc_per_node=8 train.py --model Qwen/Qwen2.5-VL-3B-Instruct --train_data a.jsonl --eval_data b.jsonl

Three stages, in this order, with an evaluation before, between and after; a step count of 0 skips one:

    warm start   `warm_start`: imitate `target` (SFT); the prompt is masked, the completion alone is learned
    selection    `select_samples`: K answers to every question; keep those whose answers differ (Temporal-RLT)
    GRPO         `train_grpo`: sample, score, compare, step (VideoChat-R1)

The last of them is the main loop and stands first below, because the warm start is the same update without a comparison.
`run_stages` puts them together.

All settings are the fields of `Config`, right below; the flags are made from them. Everything that can be random is a
function of (seed, step, place of the question in the stream), so a run that is resumed, or split over more processes, is
the same run.

Left out on purpose: callbacks, trainer classes, experiment trackers. metrics.jsonl has one line a step; plot that, or have
the same numbers written for TensorBoard (--tensorboard).
"""

import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from tqdm import tqdm

import rewards
from data import STYLES, Prompt, PromptTooLong, VideoSettings, shared_times, target_text
from eval import METRICS, answer_all, blind_baselines, evaluate, first_metrics, score_of
from grpo import Group, Loss, accumulate_gradients, grpo_loss, rollout
from lib import hf_folder, hub, lora, memory, toy
from lib.answers import SamplingSettings, claim, fingerprint, read_asked, write_lines
from lib.distributed import World, clip_gradients, start, stop, sum_gradients
from lib.flags import (COUNT, FRAME_RATE, FRAMES, PIXELS, SEED, SHARE, TOKENS, WORKERS, fill, flag, given_flags, make_parser,
                       range_problem, settings_of_the_run)
from lib.judge import load_judge
from lib.loader import VideoLoader
from lib.progress import Progress, work_of_stages
from lib.questions import Questions, number_of_steps, sampling_seed, tried_files, with_style
from lib.run import Run, write_json
from lib.samples import TASKS, load_samples, parse_entry, trained_on, unread_keys
from lib.selection import report_text, select
from lib.sharding import Sharding, worth_sharding
from lib.tables import print_table
from lib.terminal import errors_in_one_sentence, printable
from model import VideoLM

# --- settings ---------------------------------------------------------------------------------------------------------
#
# A flag that is left out takes the first value, the synthetic run's; with --model it takes `with_model`, VideoChat-R1's
# published value where there is one.

FULL_PASS = -1  # as a number of steps: once through the training data; -3 is three times
papers, machine, synthetic = (partial(flag, group=title) for title in (
    "the papers: what is trained on what, and how", "your machine, and what a run leaves on it", "the synthetic task"))


@dataclass
class Config:
    # what is trained on what
    model: str = papers("", "Hugging Face folder or hub id; without it a tiny random model is made")
    train_data: list[str] = papers((), "samples: FILE[@VIDEO_ROOT][:N] or FILE[@VIDEO_ROOT][:P%]; without them synthetic clips are made")
    eval_data: list[str] = papers((), "held-out samples, likewise; without them nothing is evaluated")
    tasks: list[str] = papers(("grounding", "qa", "gqa"), "only these tasks", with_model=tuple(TASKS),
                              choices=tuple(TASKS))
    seed: int = papers(0, "decides order, sampling and, in the synthetic run, clips and weights", within=SEED)
    # what the model sees and is asked
    prompt: str = papers("think", "with thought, without, or Temporal-R1's JSON", choices=STYLES)
    reward: str = papers("sum", "sum of the parts; the same without the precision of captions, as VideoChat-R1 has it; half task and "
                                "half format; or format and one half of the dual reward", choices=rewards.MIXES)
    judge: str = papers("", "causal LM that says which events a caption tells; without it word rules do")
    fps: float = papers(2.0, "frames looked at, for each second of video", within=FRAME_RATE)
    max_frames: int = papers(768, "most frames of one video", within=FRAMES)
    total_pixels: int = papers(12 * 784, "pixel budget of a whole video; 784 pixels of two frames make a token", with_model=3584 * 784,
                               within=PIXELS)
    min_pixels: int = papers(784, "least pixels of a frame", with_model=16 * 784, within=PIXELS)
    image_pixels: int = papers(0, "most pixels of a picture; 0: as many as the model's own files say (12.8 million)",
                               within=(0, 10**9))
    timestamps: bool = papers(False, "the time as text before each pair of frames for Qwen2.5-VL, too, as TimeLens shows it; "
                                     "Qwen3-VL always has it")
    max_prompt_tokens: int = papers(16384, "a longer prompt is an error, never cut", within=TOKENS)
    # GRPO
    steps: int = papers(150, "GRPO steps; -1: once through the (selected) data, -3: three times", with_model=FULL_PASS,
                        within=(-1000, 10**7))
    questions: int = papers(16, "questions a step, over all ranks", with_model=8, within=COUNT)
    group_size: int = papers(8, "completions of each question (G)", within=(1, 10_000))
    max_new_tokens: int = papers(80, "longest completion, in tokens", with_model=1024, within=TOKENS)
    temperature: float = papers(1.0, "of sampling and of scoring; evaluation is greedy anyway", within=(0.01, 100))
    lr: float = papers(4e-4, "peak learning rate", with_model=1e-6, within=(0, 1))
    lr_schedule: str = papers("linear", "after the warm-up: fall linearly to 0, or stay", choices=("linear", "constant"))
    warmup_steps: int = papers(20, "steps in which the rate rises from 0, here and in the warm start", with_model=0,
                               within=(0, 10**7))
    weight_decay: float = papers(0.0, "of AdamW", within=(0, 1))
    beta: float = papers(0.01, "weight of the KL to the reference; 0 loads no reference", with_model=0.04, within=(0, 100))
    entropy_bonus: float = papers(0.0, "reward for an undecided next token, in loss per nat; Temporal-R1's code has 0.001",
                                  within=(0, 10))
    loss_norm: str = papers("sequence", "mean over each completion's tokens first, or over all tokens at once",
                            choices=("sequence", "token"))
    adv_scale: str = papers("group", "divide advantages by the group's standard deviation, or not", choices=("group", "none"))
    clip_low: float = papers(0.2, "the ratio to the old policy is clipped at 1 - this", within=SHARE)
    clip_high: float = papers(0.2, "... and at 1 + this", within=(0, 100))
    inner_steps: int = papers(1, "optimiser steps on the same completions; with 1 nothing is ever clipped", within=(1, 1000))
    resample: int = papers(0, "rounds in which groups without spread are replaced by further questions", within=(0, 1000))
    keep_dead_groups: bool = papers(False, "pay for the KL of groups without spread too, as both papers do")
    freeze_vision: bool = papers(False, "train the language model only")
    # warm start
    sft_steps: int = papers(750, "steps of supervised fine-tuning before GRPO; -1: once through the data, -3: three times",
                            with_model=0, within=(-1000, 10**7))
    sft_questions: int = papers(16, "questions a step in it, over all ranks", with_model=8, within=COUNT)
    sft_lr: float = papers(2e-3, "its peak learning rate; falls linearly", with_model=2e-5, within=(0, 1))
    # selection
    select_k: int = papers(4, "answers to every training question for variance-aware selection; 0: train on all",
                           with_model=0, within=(0, 10_000))
    select_min_std: float = papers(0.1, "least spread of the task score (grounding, moments, gqa, tracking, captioning)", within=SHARE)
    select_min_mean: float = papers(0.1, "least mean of it", within=SHARE)

    # your machine
    out: str = machine("runs/toy", "folder of the run", with_model="runs/run")
    video_root: str = machine("", "where the videos lie, unless the entry says so; else the folder of its file")
    resume: bool = machine(False, "go on from the newest checkpoint of --out")
    overwrite: bool = machine(False, "delete the run that --out holds")
    dry_run: bool = machine(False, "one step on the longest prompts, with completions of full length: print peak memory "
                                   "and the time of the whole run, and leave nothing behind")
    eval_every: int = machine(0, "GRPO steps between evaluations on the way; the best model is kept in best/",
                              within=(0, 10**7))
    tensorboard: bool = machine(False, "write the numbers of metrics.jsonl to tensorboard/ in --out as well (needs pip install "
                                       "tensorboard)")
    eval_batch: int = machine(32, "questions answered together by each process, in evaluations and in the selection",
                              with_model=8, within=COUNT)
    save_every: int = machine(100, "steps between checkpoints, of which two stay", with_model=50, within=(1, 10**7))
    save_dtype: str = machine("float32", "of the weights in best/ and final/: bfloat16, half as large and what a GPU "
                                         "computes in, or float32, as they were trained (so too with --lora_rank)",
                              with_model="bfloat16", choices=("bfloat16", "float32"))
    push_to_hub: str = machine("", "NAME or OWNER/NAME on the Hugging Face hub: final/ is uploaded there at the end; a new "
                                   "repository is private")
    lora_rank: int = machine(0, "rank of adapters that are trained in place of the model, which is frozen, vision tower "
                                "included, and kept in bfloat16 on a GPU; 0: train the model itself", within=(0, 1024))
    lora_alpha: float = machine(32.0, "their output is multiplied by this / rank", within=(0.01, 10_000))
    shard: str = machine("auto", "deal weights, gradients and optimiser out over the processes (FSDP2); auto: on several "
                                 "GPUs, when 18 bytes a parameter are more than half of the memory of one, and without LoRA",
                         choices=("auto", "on", "off"))
    offload: bool = machine(False, "shard, and keep the shards of policy, optimiser and reference in CPU memory")
    gradient_checkpointing: bool = machine(False, "recompute activations backward: less memory, more time", with_model=True)
    pack_tokens: int = machine(8192, "questions share a pass through the model up to this many tokens", with_model=1,
                               within=TOKENS)
    compile: bool = machine(False, "sample with one decoder layer compiled by torch.compile: faster steps, after half a minute of "
                                   "compiling (a GPU and its compiler; not with --shard)")
    num_workers: int = machine(2, "processes that decode videos ahead; 0 decodes in this one", with_model=4, within=WORKERS)
    max_bad_share: float = machine(0.1, "of the videos tried so far, from the 100th on: when more cannot be read, the run saves "
                                         "its state and ends; 1: never", within=SHARE)
    frame_cache: str = machine("", "folder that keeps decoded clips for later epochs and runs; several processes may share it")
    frame_cache_gb: float = machine(50.0, "its size, in 10^9 bytes; clips that were not used for longest leave; "
                                          "without --frame_cache nothing is kept",
                                    within=(0.01, 10**6))
    wait_minutes: float = machine(60.0, "a process that is in one phase of a step for longer ends the run, and says who is "
                                        "where", within=(0.01, 100_000))
    device: str = machine("auto", "auto takes CUDA, then MPS, then the CPU")

    # the synthetic task
    toy_model: str = synthetic("qwen2_5", "the tiny random model: a Qwen2.5-VL or a Qwen3-VL", choices=tuple(toy.FAMILIES))
    toy_train: int = synthetic(600, "training clips", within=COUNT)
    toy_eval: int = synthetic(200, "held-out clips", within=COUNT)

MAX_GRAD_NORM = 1.0  # longer gradients are shortened to this, in both papers' trainers by default


def parse_config(arguments: list[str] | None = None) -> Config:
    """Flags to a Config. A flag left out takes the synthetic run's value, or with --model the published one."""
    parser = make_parser(Config, "GRPO for video language models.")
    given = given_flags(parser, arguments)
    if given.get("resume"):
        given = settings_of_the_run(Config, given, FIXED, parser)
    if given.get("lora_rank"):
        given.setdefault("freeze_vision", True)
        given.setdefault("save_dtype", "float32")  # what adapters change is often less than bfloat16 can say
    if given.get("model"):  # at another resolution, or with another prompt, a model of one's own is another model
        for name, value in read_asked(given["model"]).items():
            given.setdefault(name, value)
    if given.get("train_data"):
        given.setdefault("tasks", list(TASKS))
    config = fill(Config, given, with_model=bool(given.get("model")))
    if problem := find_problem(config):
        parser.error(problem)
    return config


# What decides which question comes when, and how it is sampled: another value would make a resumed run another run.
FIXED = ("model", "train_data", "tasks", "seed", "toy_model", "toy_train", "toy_eval", "prompt", "timestamps", "questions", "sft_questions",
         "lora_rank", "lora_alpha")


def find_problem(config: Config) -> str | None:
    """What is wrong with the settings, in words that name the flag and the remedy."""
    if problem := range_problem(config):
        return problem
    if config.model and not config.train_data:
        return "--model needs --train_data (samples as jsonl; python data.py convert makes them)"
    if config.eval_data and not config.train_data:
        return "--eval_data needs --train_data; to evaluate alone, use eval.py"
    if config.steps and config.group_size < 2:
        return "--group_size is 1: a completion without siblings has no advantage; take 2 or more"
    if config.select_k == 1:
        return "--select_k is 1: one answer has no spread; take 2 or more, or 0 to train on everything"
    if config.train_data and config.eval_every and not config.eval_data:
        return "--eval_every needs --eval_data"
    if config.offload and config.shard == "off":
        return "--offload keeps shards on the CPU; with --shard off there are none"
    if config.compile and (config.shard == "on" or config.offload):
        return "--compile compiles layers that are whole: leave it out, or --shard on and --offload"
    if config.overwrite and any(is_inside(path, config.out) for path in sources_of(config)):
        return f"--overwrite would delete the model or the data: they lie in --out {config.out}"
    if config.lora_rank and not config.freeze_vision:
        return "--lora_rank freezes the vision tower: leave --no-freeze_vision out, or train all of it (--lora_rank 0)"
    if config.lora_rank and (config.shard == "on" or config.offload):
        return "--lora_rank leaves little to shard: every GPU holds the frozen model; leave --shard on and --offload out"
    if config.tensorboard and find_spec("tensorboard") is None:
        return "--tensorboard needs a package that is not installed: pip install tensorboard"
    if config.push_to_hub and (problem := hub.find_problem(config.push_to_hub)):
        return f"--push_to_hub {config.push_to_hub}: {problem}"
    return None


def sources_of(config: Config) -> Iterator[str]:
    """What a run reads: the model, the files of samples and the folders of their videos."""
    yield from (config.model, config.video_root)
    for entry in (*config.train_data, *config.eval_data):
        file, root, _ = parse_entry(entry)
        yield from (str(file), root or "")


def is_inside(path: str, folder: str) -> bool:
    return bool(path) and Path(path).exists() and Path(path).resolve().is_relative_to(Path(folder).resolve())


# --- GRPO: the main loop ----------------------------------------------------------------------------------------------


def train_grpo(run: Run, policy: VideoLM, reference: VideoLM | None, samples: list[dict], held_out: list[dict],
               score) -> None:
    """`reference` is the policy as it is now, frozen; None when beta is 0. `score`: (sample, completion) -> rewards.Score."""
    config, world = run.config, run.world
    optimizer = make_optimizer(config, policy, config.lr)
    questions = make_questions(run, policy, samples, config.seed)
    steps = number_of_steps(config.steps, samples, config.questions)
    loss = loss_of(config)

    for step in run.steps("grpo", steps, policy, optimizer, questions):  # clock, checkpoints
        # 1. Sample G completions of each question, score them with rules, compare siblings.
        sampled = sample_groups(run, policy, questions, score, step)
        # 2. A group without spread has no policy gradient: it is left out, which saves its two forward passes. But it stays
        #    in the denominator, or the fewer questions teach something, the harder each of them would pull.
        #    Its KL goes with it, which both papers keep: --keep_dead_groups does too.
        live = [group for group in sampled.groups if group.is_live or config.keep_dead_groups]
        # One number for all ranks: a mean of the ranks' means would weigh a token by how much its rank has sampled.
        (denominator,) = world.all_reduce_sum(size_of(sampled.groups, config.loss_norm))
        # 3. Clipped policy gradient and KL to the reference. With one update per rollout (inner_steps = 1) the ratio is 1 and
        #    nothing is ever clipped; later updates compare with the log-probabilities of the first (`group.old_logps`).
        #    Gradients are added up over packs and ranks and stay in .grad until the optimiser takes them.
        lr = learning_rate(config.lr, step, steps, config.warmup_steps, config.lr_schedule)
        for _ in range(config.inner_steps):
            run.clock("score")
            stats = accumulate_gradients(policy, reference, live, loss, max(denominator, 1), temperature=config.temperature,
                                         with_entropy=config.entropy_bonus > 0)
            run.clock("step")
            grad_norm = optimizer_step(optimizer, world, lr)
        # 4. Say what happened; now and then answer the held-out questions. The completions are thrown away.
        run.clock.stop()  # the seconds of a step are those of learning
        is_due = config.eval_every and (step + 1) % config.eval_every == 0
        evaluation = keep_best(run, policy, held_out, score, step + 1) if is_due else None
        run.log_grpo(step, steps, sampled, stats, grad_norm, lr, evaluation)
        if is_due:
            write_page(run, seconds=20)


def loss_of(config: Config) -> Loss:
    """Put another loss in here."""
    return partial(grpo_loss, beta=config.beta, clip_low=config.clip_low, clip_high=config.clip_high,
                   norm=config.loss_norm, entropy_bonus=config.entropy_bonus)


@dataclass
class Sampled:
    """This rank's groups of a step, and what it took to get them."""

    groups: list[Group]
    replaced: list[Group]  # without spread, and exchanged for others (--resample)
    unreadable: int  # questions of this rank whose video could not be read
    resampled: int  # replaced groups of all ranks


def sample_groups(run: Run, policy: VideoLM, questions: Questions, score, step: int) -> Sampled:
    """A group of scored completions for each of the next questions.

    An unreadable video costs its group, never the run. With `--resample`, groups without spread give their places to
    further questions (DAPO's dynamic sampling). How many is counted over all ranks together, so that all take part in the
    same number of rounds.
    """
    config, world = run.config, run.world
    sampled = Sampled([], [], 0, 0)
    wanted = config.questions
    for attempt in range(config.resample + 1):
        run.clock("wait")
        # The next step's videos are decoded by other processes while the model works on these.
        batch = questions.next(wanted, ahead=config.questions)
        run.check_videos(batch.tried)
        run.clock("sample")
        # By place, not by sample: a sample that comes twice in a step is answered twice, and on no rank otherwise.
        seeds = [sampling_seed(config.seed, step, place) for place in batch.places]
        with policy.gathered():  # a sharded policy is put together once for all tokens
            new = rollout(policy, batch.prompts, score, group_size=config.group_size, max_new_tokens=config.max_new_tokens,
                          temperature=config.temperature, seeds=seeds, scale=config.adv_scale)
        run.clock("sync")  # the other ranks: not the videos
        sampled.unreadable += batch.unreadable
        # Counted before it is decided: a rank that went on alone would wait for the others for ever.
        (dead,) = world.all_reduce_sum(sum(not group.is_live for group in new))
        if attempt == config.resample or dead == 0:
            sampled.groups += new
            break
        sampled.groups += [group for group in new if group.is_live]
        sampled.replaced += [group for group in new if not group.is_live]
        sampled.resampled += int(dead)
        wanted = int(dead)
    (readable,) = world.all_reduce_sum(len(sampled.groups) + len(sampled.replaced))
    # A wrong --video_root makes every video unreadable; later steps may lose all of theirs and the run goes on.
    if step == 0 and readable == 0:
        raise SystemExit(NOTHING_READABLE)
    return sampled


NOTHING_READABLE = "not one video of the first step can be read (the reasons are above): check --video_root"


def size_of(groups: list[Group], norm: str) -> int:
    """What a loss is divided by: all completions, or all tokens."""
    return sum(len(group.tokens) if norm == "sequence" else group.num_tokens for group in groups)


def learning_rate(peak: float, step: int, steps: int, warmup: int, schedule: str) -> float:
    """Rate of 0-based `step`: a linear rise over `warmup` steps, then constant, or linear to 0 behind the last one."""
    # step + 1: a rate of 0 in the first step would waste its completions.
    rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
    fall = (steps - step) / max(steps - warmup, 1) if schedule == "linear" else 1.0
    return peak * min(rise, fall)


def make_optimizer(config: Config, policy: VideoLM, lr: float) -> torch.optim.AdamW:
    # Frozen here and not by a rate of 0: without a gradient the tower is not even passed backward (`vision_is_frozen`).
    policy.visual.requires_grad_(not config.freeze_vision)
    parameters = [p for p in policy.hf.parameters() if p.requires_grad]
    # Short runs from random weights need a short memory of squared gradients; for a published checkpoint PyTorch's is fine.
    betas = (0.9, 0.999 if config.model else 0.99)
    # Without `fused` PyTorch updates all parameters of a GPU at once, with temporary copies of 4 bytes a parameter.
    fused = bool(parameters) and parameters[0].device.type == "cuda"
    return torch.optim.AdamW(parameters, lr=lr, betas=betas, weight_decay=config.weight_decay, fused=fused)


def optimizer_step(optimizer: torch.optim.AdamW, world: World, lr: float, max_norm: float = MAX_GRAD_NORM) -> float:
    """Sum the gradients over the ranks, clip, step; returns the norm before clipping.

    Without a finite gradient there is no step, and without any either: momentum alone would move the policy, on no
    evidence at all, when all groups of a step are dead.
    """
    parameters = optimizer.param_groups[0]["params"]
    sum_gradients(world, parameters)  # a sum: the denominator of all ranks is in the loss already
    norm = clip_gradients(world, parameters, max_norm)
    optimizer.param_groups[0]["lr"] = lr
    if math.isfinite(norm) and norm > 0:
        with memory.note_if_out_of_memory("the optimiser's step"):
            optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def make_questions(run: Run, policy: VideoLM, samples: list[dict], seed: int) -> Questions:
    return Questions(samples, seed, run.world, model=policy, loader=run.loader, style=run.config.prompt,
                     max_prompt_tokens=run.config.max_prompt_tokens)


# --- warm start: imitation, through the same code ---------------------------------------------------------------------


def warm_start(run: Run, policy: VideoLM, samples: list[dict]) -> None:
    """Supervised fine-tuning on each sample's `target`.

    Imitation is GRPO with one completion a question, the target, whose advantage is 1: where ratio = 1 the gradient of
    -ratio * A is that of -log p, so the mean over all tokens is the gradient of the negative log-likelihood.
    """
    config, world = run.config, run.world
    optimizer = make_optimizer(config, policy, config.sft_lr)
    questions = make_questions(run, policy, samples, config.seed)
    steps = number_of_steps(config.sft_steps, samples, config.sft_questions)

    for step in run.steps("sft", steps, policy, optimizer, questions):
        run.clock("wait")
        batch = questions.next(config.sft_questions)
        run.check_videos(batch.tried)
        run.clock("learn")
        groups = [imitation_group(policy, prompt, config.prompt) for prompt in batch.prompts]
        # The prompt is not among them: a model that learns to predict its questions forgets how to answer.
        (tokens,) = world.all_reduce_sum(size_of(groups, "token"))
        if step == 0 and tokens == 0:
            raise SystemExit(NOTHING_READABLE)
        # Temperature 1: imitation is likelihood, whatever is sampled at later.
        stats = accumulate_gradients(policy, None, groups, SFT_LOSS, max(tokens, 1), temperature=1.0)
        lr = learning_rate(config.sft_lr, step, steps, config.warmup_steps, "linear")
        grad_norm = optimizer_step(optimizer, world, lr)
        run.log_sft(step, batch, tokens, stats, grad_norm, lr)


SFT_LOSS = partial(grpo_loss, beta=0.0, clip_low=0.2, clip_high=0.2, norm="token")


def imitation_group(policy: VideoLM, prompt: Prompt, style: str) -> Group:
    tokens = encode_target(policy, target_text(prompt.sample, style))  # (G, C) with G = 1
    return Group(prompt, tokens, mask=torch.ones_like(tokens, dtype=torch.bool),
                 advantages=torch.ones(1, device=policy.device))


def encode_target(policy: VideoLM, text: str) -> torch.Tensor:
    """(1, C): the completion to imitate, with the end token that the policy has to learn to say."""
    # split_special_tokens: an annotation that spells out <|im_end|> must not end the completion.
    ids = policy.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return torch.tensor([ids + [policy.tokenizer.eos_token_id]], device=policy.device)


def check_target_lengths(config: Config, policy: VideoLM, samples: list[dict]) -> None:
    """What is imitated must be sayable later: otherwise GRPO cuts every completion before its answer."""
    # By characters, to tokenise one text instead of all; a shorter text may have a few tokens more.
    longest = max(samples, key=lambda sample: len(target_text(sample, config.prompt)))
    length = encode_target(policy, target_text(longest, config.prompt)).numel()
    if length > config.max_new_tokens:
        raise SystemExit(f"sample {longest['id']}: its target has {length} tokens, more than a completion may have; raise "
                         f"--max_new_tokens ({config.max_new_tokens}), with --resume, or leave the task out (--tasks), with --overwrite")


# --- variance-aware selection -----------------------------------------------------------------------------------------


def select_samples(run: Run, policy: VideoLM, samples: list[dict], score) -> dict:
    """Answer every training question `select_k` times and keep those that are worth training on: {ids, report}."""
    config, world = run.config, run.world
    sampling = SamplingSettings(config.prompt, config.max_new_tokens, config.max_prompt_tokens, config.select_k,
                                config.temperature, config.reward, config.seed, config.eval_batch, config.timestamps)
    partial_answers = run.out / "selecting"  # an interrupted selection goes on there
    claim(world, partial_answers,
          fingerprint("the policy before GRPO", config.judge, sampling, run.loader.settings, samples))
    with policy.gathered():
        predictions = answer_all(policy, run.loader, samples, world, sampling, score, "selected", partial_answers,
                                 progress=run.progress)
    # The task's own score decides, without `format`: samples that differ in their tags alone teach nothing about videos.
    problems = {p["id"]: p["problem"] for p in predictions if p["reasons"][0] == "unreadable_video"}
    run.check_videos([pair for sample in world.share(samples) for pair in tried_files(sample, problems.get(sample["id"], ""))])
    ids, report = select(samples, {p["id"]: p for p in predictions}, min_std=config.select_min_std,
                         min_mean=config.select_min_mean, seed=config.seed)
    if world.is_first:
        write_json(run.out / "selected.report.json", report)
        tqdm.write("\n" + report_text(report))
    world.sync()
    if world.is_first:
        shutil.rmtree(partial_answers)
    if not ids:
        raise SystemExit("the selection kept nothing: the answers to a question do not differ, by --select_min_std, or "
                         "are too poor, by --select_min_mean. See selected.report.json; --resume --select_k 0 goes on "
                         "with everything")
    return {"ids": ids, "report": report}


# --- evaluation -------------------------------------------------------------------------------------------------------


def measure(run: Run, policy: VideoLM, held_out: list[dict], score, name: str) -> dict | None:
    """Metrics of greedy answers to the held-out samples; the answers go to predictions.NAME.jsonl."""
    if not held_out:
        return None
    config = run.config
    # Greedy, one answer: no noise between two evaluations, and what users of the model get.
    sampling = SamplingSettings(config.prompt, config.max_new_tokens, config.max_prompt_tokens, batch=config.eval_batch)
    with policy.gathered():
        # An evaluation on the way belongs to the stage that it interrupts, and has a bar of its own.
        metrics, predictions = evaluate(policy, run.loader, held_out, run.world, sampling, score, name,
                                        run.progress if name != "on_the_way" else None)
    if run.world.is_first:
        write_lines(run.out / f"predictions.{name}.jsonl", predictions)
    end_or_warn_of_unreadable(run.world, predictions, name)
    if run.world.is_first:
        if metrics["parse_failure"] == 1 and not (name == "before" and config.sft_steps):  # the warm start teaches the format
            tqdm.write(UNREADABLE_ANSWERS.format(name=name))
    return metrics


def end_or_warn_of_unreadable(world: World, predictions: list[dict], name: str) -> None:
    """Held-out videos that cannot be read count as 0, and look like a poor model."""
    lost = [line["problem"] for line in predictions if line.get("problem")]
    if not lost:
        return
    text = (f"{len(lost)} of {len(predictions)} held-out questions could not be asked ({name}): "
            + "; ".join(printable(problem) for problem in lost[:3]) + ("; ..." if len(lost) > 3 else ""))
    if len(lost) == len(predictions) and name != "on_the_way":
        raise SystemExit(f"{text}. Check --eval_data and --video_root")
    if world.is_first:
        tqdm.write(f"warning: {text}. They count as 0 in every metric")


UNREADABLE_ANSWERS = (
    "warning: not one held-out answer could be read, so every metric is 0. The commonest causes: answers are cut before they "
    "end (raise --max_new_tokens), the model does not know the format that --prompt asks for (a warm start teaches it: "
    "--sft_steps), or it is no instruction-tuned checkpoint. predictions.{name}.jsonl has the answers and the reasons")


def keep_best(run: Run, policy: VideoLM, held_out: list[dict], score, step: int) -> dict:
    """Evaluate on the way; the best model so far stays in best/."""
    metrics = measure(run, policy, held_out, score, "on_the_way") or {}
    if run.world.is_first and metrics:
        keep_some(run.out, step)
    # One number for all ranks: a judge that rounds differently on one of them must not send it to save alone.
    (value,) = run.world.all_reduce_max(score_of(metrics))
    if value > run.results.get("best", {"score": -1.0})["score"]:
        run.results["best"] = {"step": step, "score": value, "metrics": metrics}
        run.save_model(policy, "best")
        run.save_state()
    return metrics


KEPT_ANSWERS = 8  # of each task


def keep_some(out: Path, step: int) -> None:
    """Answers to the same few questions at every evaluation: tools/report.py shows how they change."""
    lines = list(map(json.loads, open(out / "predictions.on_the_way.jsonl", encoding="utf-8")))
    by_task: dict[str, list[dict]] = {}
    for line in lines:
        by_task.setdefault(line["task"], []).append(line)
    write_lines(out / f"predictions.step{step:06d}.jsonl", [line for of_task in by_task.values() for line in of_task[:KEPT_ANSWERS]])


# --- the whole run ----------------------------------------------------------------------------------------------------


def run_stages(run: Run, initial: str, train: list[dict], held_out: list[dict], score) -> None:
    """Evaluation, warm start, selection, GRPO: whatever the settings ask for and is not done yet."""
    config, world = run.config, run.world
    policy = load_model(config, world, initial)
    if config.sft_steps and "after_sft" not in run.results:
        check_target_lengths(config, policy, train)
    run.stage("before", lambda: measure(run, policy, held_out, score, "before"))
    start_of_grpo = initial  # the weights that GRPO is held to
    if config.sft_steps:
        start_of_grpo = str(run.out / "warm_start")
        if "after_sft" not in run.results:  # else the warm start is done, by an earlier part of this run
            warm_start(run, policy, train)
            learned = lora.adapter_state(policy.hf)
            lora.fold_adapters(policy.hf, config.seed)  # or the reference of GRPO would be the model before the warm start
            run.save_model(policy, "warm_start", learned)
        else:
            del policy  # before the next one is loaded: two may not fit
            policy = load_model(config, world, start_of_grpo)
        run.stage("after_sft", lambda: measure(run, policy, held_out, score, "after_sft"))
        tell(run, "warm start", "before", "after_sft")
    chosen = train
    if config.select_k:
        ids = set(run.stage("selected", lambda: select_samples(run, policy, train, score))["ids"])
        chosen = [sample for sample in train if sample["id"] in ids]
    if config.steps:
        reference = load_reference(config, world, policy, start_of_grpo)
        train_grpo(run, policy, reference, chosen, held_out, score)
        run.stage("after", lambda: measure(run, policy, held_out, score, "after"))
        tell(run, "GRPO", "after_sft" if config.sft_steps else "before", "after")
    run.save_model(policy, "final")
    run.progress.end()


def tell(run: Run, stage: str, before: str, after: str) -> None:
    """What a stage has changed: the first metric of each task."""
    old, new = run.results.get(before), run.results.get(after)
    if run.world.is_first and old and new:
        names = first_metrics(new)
        tqdm.write(f"{stage}: " + ", ".join(f"{name} {old[name]:.2f} → {new[name]:.2f}" for name in names)
                   + f" on {new['n']} held-out samples")


def load_model(config: Config, world: World, name: str, dtype: torch.dtype = torch.float32) -> VideoLM:
    """With LoRA the weights are frozen: then bfloat16, which the GPU computes in anyway, is enough for them."""
    world.phase(f"load {name}")
    choose_threads(world, name)
    if config.lora_rank and world.device.type == "cuda":
        dtype = torch.bfloat16
    model = VideoLM.load(name, world.device, dtype)
    model.pack_tokens, model.compile_decoding = config.pack_tokens, config.compile
    model.geometry = model.geometry.with_times(config.timestamps)
    if config.gradient_checkpointing:
        model.checkpoint_activations()
    if config.lora_rank:
        lora.add_adapters(model.hf, config.lora_rank, config.lora_alpha, list(lora.TARGETS), config.seed)
    elif worth_sharding(config.shard, config.offload, world, sum(p.numel() for p in model.hf.parameters())):
        if config.compile:
            raise ValueError("--compile compiles layers that are whole, and this model is sharded (--shard auto): leave out "
                             "--compile, or take --shard off")
        model.sharding = Sharding(world, model, offload=config.offload)
    return model


SMALL_MODEL = 50e6  # bytes of weights


def choose_threads(world: World, name: str) -> None:
    """One thread for a small model. A parallel region ends with its slowest thread: of operations that take microseconds
    a second thread saves nothing, and beside another busy process, which takes one of the cores, all threads spin and wait
    for the one without (a step of 1.5 s took 50 s). OMP_NUM_THREADS decides otherwise."""
    weights = sum(file.stat().st_size for file in Path(name).glob("*.safetensors"))
    if world.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ and 0 < weights < SMALL_MODEL:
        if torch.get_num_threads() > 1 and world.is_first:
            print(f"one thread: {name} is so small that more would wait for each other (OMP_NUM_THREADS sets another number)")
        torch.set_num_threads(1)


def load_reference(config: Config, world: World, policy: VideoLM, name: str) -> VideoLM | None:
    """What the KL is measured to: the weights GRPO starts from, frozen; None where beta is 0. With LoRA that is the
    policy itself, scored with its adapters off (`as_reference`)."""
    if config.beta == 0:
        return None
    if config.lora_rank:
        return policy
    # From the disk and not a copy of the policy: in half the precision, and sharded by its own.
    reference = load_model(config, world, name, torch.bfloat16 if world.device.type == "cuda" else torch.float32)
    reference.hf.requires_grad_(False)
    return reference


def main(arguments: list[str] | None = None) -> None:
    config = parse_config(arguments)
    world = start(config.device, config.wait_minutes)
    if config.dry_run:
        with tempfile.TemporaryDirectory() as folder:  # the first rank's serves all
            folder = world.all_gather([folder])[0]
            carry_out(replace(config, out=folder, resume=False, overwrite=False, frame_cache="", tensorboard=False), world)
            world.sync()
    else:
        if config.push_to_hub and world.is_first:
            hub.warn_without_token()
        carry_out(config, world)
    stop(world)  # nobody waits for the upload, and no upload ends the run
    if config.push_to_hub and world.is_first and not config.dry_run:
        hub.push(Path(config.out) / "final", config.push_to_hub)


def carry_out(config: Config, world: World) -> None:
    """The run, or its rehearsal."""
    began = time.time()
    # First: a name that leads nowhere, or a broken folder or file, must not cost an old run.
    if config.model:
        hf_folder.check_folder(Path(config.model))
    judge = load_judge(config.judge, world.device)
    score = partial(rewards.score, mix=config.reward, judge=judge)
    geometry = hf_folder.geometry_in(config.model) if config.model else toy.FAMILIES[config.toy_model].geometry
    geometry = geometry.with_times(config.timestamps)
    settings = VideoSettings(config.fps, config.max_frames, config.total_pixels, config.min_pixels, geometry.factor,
                             geometry.picture_limits(config.image_pixels))
    questions = questions_of(config, geometry, config.train_data, config.eval_data) if config.train_data else None
    if world.is_first and (note := shared_times(settings, geometry)):
        print(note)
    cache_bytes = 2**32 if config.model else 2**29  # of decoded clips in memory
    with VideoLoader(settings, num_workers=config.num_workers, cache_bytes=cache_bytes, frame_cache=config.frame_cache,
                     frame_cache_gb=config.frame_cache_gb) as loader, Run(config, world, loader) as run:
        if config.model and world.is_first:
            for name, value in read_asked(config.model).items():
                if getattr(config, name) != value:
                    print(f"--{name} {getattr(config, name)}: {config.model} was trained, or published, with {value}")
        initial, train_data, eval_data = config.model, config.train_data, config.eval_data
        if not config.model:
            initial, train_data, eval_data = toy.prepare(config, world)
        train, held_out = questions or questions_of(config, geometry, train_data, eval_data)
        if world.is_first:
            print("".join(f"{line}\n" for line in [*unread_keys(train + held_out), *trained_on(train, held_out)]), end="")
        run.progress = Progress(work_of_stages(config, len(train), len(held_out)), world.is_first)
        run.begin(train, held_out)
        if config.dry_run:
            from tools.dry_run import dry_run  # a rehearsal uses what is in this file, so it is above it

            dry_run(run, initial, train, held_out, score)
            return
        try:
            run_stages(run, initial, train, held_out, score)
        except torch.OutOfMemoryError as error:
            raise SystemExit(run.end_out_of_memory(error)) from None
        except PromptTooLong as error:
            raise SystemExit(f"{error}\n{run.save_begun()}") from None
        except KeyboardInterrupt:
            run.end_interrupted()
    run.seconds["total"] = round(run.seconds.get("total", 0.0) + time.time() - began, 2)
    if world.is_first:
        finish(run, held_out, judge)


def questions_of(config: Config, geometry, train_data: list[str], eval_data: list[str]) -> tuple[list[dict], list[dict]]:
    """What is trained on, and what is held out."""
    root = config.video_root or None
    train = load_samples(train_data, root, config.tasks, config.seed)
    held_out = load_samples(eval_data, root, config.tasks) if eval_data else []
    # Whether a thought is asked for is part of the sample from here on: prompt and format reward must agree.
    return tuple(with_style(samples, config.prompt, geometry.box_units) for samples in (train, held_out))


def finish(run: Run, held_out: list[dict], judge: rewards.Judge) -> None:
    """summary.json, the table, and three completions to look at."""
    results = run.results
    baselines = blind_baselines(held_out, judge) if held_out else {}
    selected = results.get("selected")
    summary = {name: results.get(name) for name in ("before", "after_sft", "after")}
    summary |= {"baselines": baselines, "seconds": run.seconds, "selected": selected and selected["report"]}
    summary |= {"best": results["best"]} if "best" in results else {}
    write_json(run.out / "summary.json", summary)
    run.save_state()
    last = next((name for name in ("after", "after_sft", "before") if results.get(name)), None)
    for line in open(run.out / f"predictions.{last}.jsonl", encoding="utf-8").readlines()[:3] if last else []:
        prediction = json.loads(line)
        sample = next(sample for sample in held_out if sample["id"] == prediction["id"])
        known = {name: value for name, value in sample.items() if name not in ("target", "think")}
        truth = target_text(known, "answer")  # of a thought there is no truth
        question, said, truth = map(printable, (sample["question"], prediction["completions"][0], truth))
        print(f"\n{sample['task']}: {question}\n  said     {said}\n  expected {truth}")
    print(f"\n{run.out}/summary.json, {run.out}/final; {run.seconds['total']:.0f} s in all")
    columns = {"before": summary["before"], "after SFT": summary["after_sft"], "after GRPO": summary["after"], **baselines}
    if held_out:
        print_table(METRICS, {name: column for name, column in columns.items() if column}, f"{len(held_out)} held-out samples")
    else:
        print("no --eval_data: nothing was evaluated")
    write_page(run, seconds=60)


def write_page(run: Run, seconds: float) -> None:
    """report.html of the run, with frames for which so many seconds are enough. Whatever goes wrong with it is one line:
    no page is worth a run."""
    if run.world.is_first:
        try:
            from tools.report import write_report  # it measures, so it is above this file

            write_report([run.out], run.out / "report.html", seconds=seconds)
        except Exception as error:
            tqdm.write(f"warning: {run.out}/report.html was not written: {type(error).__name__}: {error}".splitlines()[0])


if __name__ == "__main__":
    with errors_in_one_sentence():
        main()
