"""The loop: from a checkpoint and questions about videos to a model that answers them better.

    torchrun train.py                                            the synthetic task, from random weights, on a laptop
    torchrun --nproc_per_node=8 train.py --model Qwen/Qwen2.5-VL-3B-Instruct --train_data a.jsonl --eval_data b.jsonl

Four stages, in the order of the file; a step count of 0 skips one:

    warm start   imitate `target` (SFT): the prompt is masked, the completion alone is learned
    selection    K answers to every training question; keep those whose answers differ (Temporal-RLT)
    GRPO         sample, score, compare, step (VideoChat-R1); the main loop is `train_grpo`
    evaluation   before, between and after, beside what blind answers score

All settings are the fields of `Config`, right below; the flags are made from them. Everything that can be random is a
function of (seed, step, question), so a run that is resumed, or split over more processes, is the same run.

Left out on purpose: callbacks, trainer classes, experiment trackers. metrics.jsonl has one line a step; plot that.
"""

import argparse
import json
import math
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from tqdm import tqdm

from data import STYLES, Prompt, VideoSettings, build_prompt, target_text
from eval import answer_all, blind_baselines, compute_metrics
from grpo import Group, accumulate_gradients, encode_videos, rollout
from lib import distributed as scale
from lib import lora, memory, toy
from lib.answers import SamplingSettings, claim, fingerprint, write_asked
from lib.judge import load_judge
from lib.loader import VideoLoader
from lib.questions import load_prompts, sampling_seed, with_style
from lib.samples import TASKS, load_samples
from lib.selection import report_text, select
from lib.tables import METRICS, print_table
from model import VideoLM
from rewards import CONTINUOUS, DISCRETE, MIXES

# --- settings ---------------------------------------------------------------------------------------------------------

PARTS = (*CONTINUOUS, *DISCRETE, "format")  # of the reward, as the log shows them
FULL_PASS = -1  # as a number of steps: once through the training data; -3 is three times


def flag(default, help: str, *, paper=None, choices: tuple = ()):
    """A setting: its value for the synthetic run, its value with --model (VideoChat-R1's, where it differs), its help."""
    return field(default=default, metadata={"help": help, "paper": default if paper is None else paper, "choices": choices})


@dataclass
class Config:
    # what is trained on what
    model: str = flag("", "Hugging Face folder or hub id; without it a tiny random model and synthetic videos are made")
    train_data: list[str] = flag((), "samples: FILE[@VIDEO_ROOT][:N] or FILE[@VIDEO_ROOT][:P%]")
    eval_data: list[str] = flag((), "held-out samples, likewise; without them nothing is evaluated")
    video_root: str = flag("", "where the videos lie, unless the entry says so; else the folder of its file")
    tasks: list[str] = flag(("grounding", "qa", "gqa"), "only these tasks", paper=TASKS, choices=TASKS)
    out: str = flag("runs/toy", "folder of the run", paper="runs/run")
    seed: int = flag(0, "decides order, sampling and, in the synthetic run, clips and weights")
    toy_train: int = flag(600, "synthetic training clips")
    toy_eval: int = flag(200, "synthetic held-out clips")
    # what the model sees and is asked
    prompt: str = flag("think", "with thought, without, or Temporal-R1's JSON", choices=STYLES)
    reward: str = flag("sum", "sum of the parts; half task and half format; or format and one half of the dual reward",
                       choices=MIXES)
    judge: str = flag("", "causal LM that says which events a caption tells; without it word rules do")
    fps: float = flag(2.0, "frames looked at, for each second of video")
    max_frames: int = flag(768, "most frames of one video")
    total_pixels: int = flag(3584 * 784, "pixel budget of a whole video; 784 pixels of two frames make a token")
    min_pixels: int = flag(4 * 784, "least pixels of a frame", paper=16 * 784)
    max_prompt_tokens: int = flag(16384, "a longer prompt is an error, never cut")
    # warm start
    sft_steps: int = flag(400, "steps of supervised fine-tuning before GRPO; -1: once through the data, -3: three times",
                          paper=0)
    sft_questions: int = flag(16, "questions a step in it, over all ranks", paper=8)
    sft_lr: float = flag(2e-3, "its peak learning rate; falls linearly", paper=2e-5)
    # selection
    select_k: int = flag(8, "answers to every training question for variance-aware selection; 0: train on all", paper=0)
    select_min_std: float = flag(0.1, "least spread of the task score (grounding, gqa, tracking, captioning)")
    select_min_mean: float = flag(0.1, "least mean of it")
    # GRPO
    steps: int = flag(300, "GRPO steps; -1: once through the (selected) data, -3: three times", paper=FULL_PASS)
    questions: int = flag(16, "questions a step, over all ranks", paper=8)
    group_size: int = flag(8, "completions of each question (G)")
    max_new_tokens: int = flag(64, "longest completion, in tokens", paper=1024)
    temperature: float = flag(1.0, "of sampling and of scoring")
    lr: float = flag(4e-4, "peak learning rate", paper=1e-6)
    lr_schedule: str = flag("linear", "after the warm-up: fall linearly to 0, or stay", choices=("linear", "constant"))
    warmup_steps: int = flag(20, "steps in which the rate rises from 0, here and in the warm start", paper=0)
    weight_decay: float = flag(0.0, "of AdamW")
    adam_beta2: float = flag(0.99, "how long AdamW remembers squared gradients: 0.99 suits short runs", paper=0.999)
    max_grad_norm: float = flag(1.0, "longer gradients are shortened to this")
    beta: float = flag(0.01, "weight of the KL to the reference; 0 loads no reference", paper=0.04)
    entropy_bonus: float = flag(0.0, "reward for an undecided next token, in loss per nat; Temporal-R1's code has 0.001")
    loss_norm: str = flag("sequence", "mean over each completion's tokens first, or over all tokens at once",
                          choices=("sequence", "token"))
    adv_scale: str = flag("group", "divide advantages by the group's standard deviation, or not", choices=("group", "none"))
    clip_low: float = flag(0.2, "the ratio to the old policy is clipped at 1 - this")
    clip_high: float = flag(0.2, "... and at 1 + this")
    inner_steps: int = flag(1, "optimiser steps on the same completions; with 1 nothing is ever clipped")
    resample: int = flag(0, "rounds in which groups without spread are replaced by further questions")
    keep_dead_groups: bool = flag(False, "pay for the KL of groups without spread too, as both papers do")
    freeze_vision: bool = flag(False, "train the language model only")
    # LoRA, in the warm start and in GRPO
    lora_rank: int = flag(0, "rank of adapters that are trained in place of the model, which is frozen, vision tower "
                             "included, and kept in bfloat16 on a GPU; 0: train the model itself")
    lora_alpha: float = flag(32.0, "their output is multiplied by this / rank")
    lora_targets: list[str] = flag(lora.TARGETS, "matrices of the language model that get one", choices=lora.TARGETS)
    # the run
    eval_every: int = flag(0, "GRPO steps between evaluations on the way; the best model is kept in best/")
    save_every: int = flag(100, "steps between checkpoints", paper=50)
    keep_checkpoints: int = flag(2, "how many of them stay")
    resume: bool = flag(False, "go on from the newest checkpoint of --out")
    overwrite: bool = flag(False, "delete the run that --out holds")
    dry_run: bool = flag(False, "one step on the longest prompts, with completions of full length: print peak memory "
                                "and the time of the whole run, and leave nothing behind")
    sft_equal_time: bool = flag(False, "control: SFT that goes on from the warm start for as many seconds as GRPO took")
    # the machine
    shard: str = flag("auto", "deal weights, gradients and optimiser out over the processes (FSDP2); auto: on several GPUs, "
                      "when 18 bytes a parameter are more than half of the memory of one, and without LoRA", choices=("auto", "on", "off"))
    offload: bool = flag(False, "shard, and keep the shards of policy, optimiser and reference in CPU memory")
    wait_minutes: float = flag(60.0, "a process that waits longer for the others ends the run, and says who is where")
    device: str = flag("auto", "auto takes CUDA, then MPS, then the CPU")
    gradient_checkpointing: bool = flag(False, "recompute activations backward: less memory, more time", paper=True)
    compile: bool = flag(False, "sample with one decoder layer compiled by torch.compile: faster steps, after a minute of "
                         "compiling (a GPU and its compiler; not with --shard)")
    pack_tokens: int = flag(8192, "questions share a pass through the model up to this many tokens", paper=1)
    num_workers: int = flag(2, "processes that decode videos ahead; 0 decodes in this one", paper=4)
    decode_seconds: float = flag(60.0, "a video that takes longer is given up")
    cache_mb: int = flag(512, "decoded clips kept in memory", paper=4096)
    frame_cache: str = flag("", "folder that keeps decoded clips for later epochs and runs; several processes may share it")
    frame_cache_gb: float = flag(50.0, "its size, in 10^9 bytes; clips that were not used for longest leave")


def parse_config(arguments: list[str] | None = None) -> Config:
    """Flags to a Config. A flag left out takes the synthetic run's value, or with --model the published one."""
    parser = argparse.ArgumentParser(description="GRPO for video language models.", allow_abbrev=False)
    for f in fields(Config):
        paper, choices = f.metadata["paper"], f.metadata["choices"] or None
        listed = isinstance(f.default, tuple)
        kind = {"type": str, "nargs": "+", "choices": choices} if listed else {"type": type(f.default), "choices": choices}
        if isinstance(f.default, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        shown = [" ".join(x) if listed else x for x in (f.default, paper)]
        text = f"{f.metadata['help']} (default: {shown[0]}{'' if paper == f.default else f'; with --model: {shown[1]}'})"
        parser.add_argument(f"--{f.name}", default=None, help=text.replace("%", "%%"), **kind)
    given = {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None}
    if given.get("resume"):
        given = settings_of_the_run(given, parser)
    if given.get("lora_rank"):
        given.setdefault("freeze_vision", True)
    for f in fields(Config):
        default = f.metadata["paper"] if given.get("model") else f.default
        given.setdefault(f.name, list(default) if isinstance(default, tuple) else default)
    config = Config(**given)
    if problem := find_problem(config):
        parser.error(problem)
    return config


# What decides which question comes when, and how it is sampled: another value would make a resumed run another run.
FIXED = ("model", "train_data", "tasks", "seed", "toy_train", "toy_eval", "prompt", "questions", "sft_questions",
         "lora_rank", "lora_alpha", "lora_targets")


def settings_of_the_run(given: dict, parser: argparse.ArgumentParser) -> dict:
    """With --resume, flags left out keep the values of the run; those that cannot change are refused."""
    out = next(f for f in fields(Config) if f.name == "out")
    file = Path(given.get("out") or (out.metadata["paper"] if given.get("model") else out.default)) / "config.json"
    if not file.exists():
        return given
    saved = json.loads(file.read_text())
    for name in FIXED:
        if name in given and given[name] != saved.get(name):
            parser.error(f"--resume: this run has --{name} {saved.get(name)}, not {given[name]}; name another --out")
    return {**{f.name: saved[f.name] for f in fields(Config) if f.name in saved and f.name != "overwrite"}, **given}


def find_problem(config: Config) -> str | None:
    """What is wrong with the settings, in words that name the flag and the remedy."""
    if config.model and not config.train_data:
        return "--model needs --train_data (samples as jsonl; python data.py convert makes them)"
    if not config.model and (config.train_data or config.eval_data):
        return "--train_data and --eval_data need --model; without it the synthetic task is run"
    for name in ("questions", "sft_questions", "group_size", "max_new_tokens", "inner_steps", "pack_tokens", "save_every",
                 "keep_checkpoints"):
        if getattr(config, name) < 1:
            return f"--{name} is {getattr(config, name)}; it must be at least 1"
    if config.steps and config.group_size < 2:
        return "--group_size is 1: a completion without siblings has no advantage; take 2 or more"
    if config.select_k == 1:
        return "--select_k is 1: one answer has no spread; take 2 or more, or 0 to train on everything"
    if config.sft_equal_time and not config.steps:
        return "--sft_equal_time lasts as long as GRPO; with --steps 0 there is nothing to compare with"
    if config.model and config.eval_every and not config.eval_data:
        return "--eval_every needs --eval_data"
    if config.offload and config.shard == "off":
        return "--offload keeps shards on the CPU; with --shard off there are none"
    if config.compile and (config.shard == "on" or config.offload):
        return "--compile compiles layers that are whole: leave it out, or --shard on and --offload"
    if config.wait_minutes <= 0:
        return f"--wait_minutes is {config.wait_minutes}; it must be more than 0"
    sources = (config.model, *config.train_data, *config.eval_data)
    if config.overwrite and any(is_inside(path, config.out) for path in sources):
        return f"--overwrite would delete the model or the data: they lie in --out {config.out}"
    if config.lora_rank < 0 or config.lora_alpha <= 0:
        return f"--lora_rank {config.lora_rank} --lora_alpha {config.lora_alpha}: a rank is 0 (off) or more, alpha over 0"
    if config.lora_rank and not config.freeze_vision:
        return "--lora_rank freezes the vision tower: leave --no-freeze_vision out, or train all of it (--lora_rank 0)"
    if config.lora_rank and (config.shard == "on" or config.offload):
        return "--lora_rank leaves little to shard: every GPU holds the frozen model; leave --shard on and --offload out"
    if config.frame_cache and config.frame_cache_gb <= 0:
        return f"--frame_cache_gb is {config.frame_cache_gb}; leave --frame_cache out to keep nothing on the disk"
    if config.temperature <= 0:
        return f"--temperature is {config.temperature}; sampling needs more than 0 (evaluation is greedy anyway)"
    return None


def is_inside(path: str, folder: str) -> bool:
    return bool(path) and Path(path).exists() and Path(path).resolve().is_relative_to(Path(folder).resolve())


# --- the folder of a run ----------------------------------------------------------------------------------------------


class Run:
    """What every stage needs: the settings, the world, the video loader, and the folder `--out` with its logs,
    checkpoints and the results of the stages that are done."""

    def __init__(self, config: Config, world: scale.World, loader: VideoLoader):
        self.config, self.world, self.loader, self.out = config, world, loader, Path(config.out)
        self.begun: Begun | None = None
        self.checkpoint = scale.newest_checkpoint(self.out) if config.resume else None
        state = self.out / "state.json"
        if (self.out / "config.json").exists() and not (config.resume or config.overwrite):
            raise SystemExit(f"{self.out} holds a run already: --resume goes on with it, --overwrite deletes it, "
                             "--out names another folder")
        self.judge = load_judge(config.judge, world.device)  # a name that leads nowhere must not cost an old run
        scale.wait_for_all(world)  # nobody deletes or writes before everybody has looked
        if config.overwrite and not config.resume and world.is_first and (self.out / "config.json").exists():
            shutil.rmtree(self.out)  # only ever a folder that a run has written
        scale.wait_for_all(world)
        self.results: dict = json.loads(state.read_text()) if config.resume and state.exists() else {}
        self.seconds: dict = self.results.setdefault("seconds", {})
        if world.is_first:
            self.out.mkdir(parents=True, exist_ok=True)
            (self.out / "config.json").write_text(json.dumps(asdict(config), indent=1) + "\n")
            for name in ("metrics.jsonl", "completions.jsonl"):
                cut_log(self.out / name, self.position() if config.resume else None)
        scale.wait_for_all(world)

    def position(self) -> tuple[str, int]:
        """Phase and step that the newest checkpoint stands behind."""
        if self.checkpoint is None:
            return "", 0
        _, _, phase, step = self.checkpoint.name.split("-")
        return phase, int(step)

    def stage(self, name: str, work: Callable[[], dict | None]) -> dict | None:
        """Do a stage unless an earlier part of this run has done it; remember its result and seconds."""
        if name not in self.results:
            self.world.phase(name)
            start = time.time()
            result = work()
            self.seconds[name] = round(time.time() - start, 2)
            self.results[name] = result
            self.save_state()
        return self.results[name]

    def load_prompts(self, samples: list[dict], next_samples: list[dict], model: VideoLM) -> tuple[list, dict[str, str]]:
        """The prompts of the samples whose videos can be read, and the problems of the others, which are also printed.
        Meanwhile the videos of `next_samples` are decoded."""
        for sample in samples + next_samples:
            self.loader.submit(sample)
        prompts, problems = load_prompts(model, self.loader, samples, self.config.prompt, self.config.max_prompt_tokens)
        for problem in problems.values():
            tqdm.write(f"unreadable, left out: {problem}")
        return [prompt for prompt in prompts if prompt is not None], problems

    def save_state(self) -> None:
        if self.world.is_first:
            partial = self.out / "state.json.partial"
            partial.write_text(json.dumps(self.results))
            partial.rename(self.out / "state.json")

    def log(self, line: dict, groups: list[dict] = ()) -> None:
        """One line of metrics.jsonl, and of completions.jsonl one for each completion."""
        if self.world.is_first:
            with open(self.out / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            with open(self.out / "completions.jsonl", "a", encoding="utf-8") as file:
                file.writelines(json.dumps(group) + "\n" for group in groups)

    def save(self, phase: str, step: int, model: VideoLM, optimizer: torch.optim.Optimizer, cursor: int,
             alone: bool = False) -> None:
        """All that a resumed run needs; a partial one never has a checkpoint's name. Frozen weights are those that the
        run was started from, so they are not saved again. On all ranks, or by one of them `alone`."""
        self.world.phase(f"{phase} step {step}: save")
        state = scale.training_state(model, optimizer, cursor=cursor, seconds=self.seconds.get(phase, 0.0))
        scale.save_checkpoint(self.world, self.out / checkpoint_name(phase, step), state, alone)
        if self.world.is_first:
            for old in sorted(self.out.glob("checkpoint-*"))[: -self.config.keep_checkpoints]:
                shutil.rmtree(old)

    def begin_step(self, phase: str, step: int, model: VideoLM, optimizer: torch.optim.AdamW, cursor: int) -> None:
        """Note what a run that has to end within 0-based `step` can save: the state behind the steps before it."""
        self.begun = Begun(phase, step, model, optimizer, cursor, number_of_updates(optimizer))

    def save_begun(self) -> str:
        """Save that state, if it is still there; says in a sentence what --resume goes on from."""
        begun, newest = self.begun, newest_name(self.out)
        if begun is None or begun.step == 0:
            return f"--resume goes on from {newest}" if newest else "nothing had been trained yet"
        name = checkpoint_name(begun.phase, begun.step)
        if (self.out / name).exists():
            return f"the state behind step {begun.step} is saved: --resume goes on from there"
        if number_of_updates(begun.optimizer) != begun.updates or (self.world.size > 1 and begun.model.is_sharded):
            # a policy between two updates on the same completions, or one of which this process has a part
            return f"--resume goes on from {newest}" if newest else "nothing had been saved yet"
        begun.optimizer.zero_grad(set_to_none=True)
        self.save(begun.phase, begun.step, begun.model, begun.optimizer, begun.cursor,
                  alone=self.world.size > 1)
        return f"the state behind step {begun.step} has been saved: --resume goes on from there"

    def restore(self, phase: str, model: VideoLM, optimizer: torch.optim.Optimizer) -> tuple[int, int]:
        """Load the newest checkpoint if it is of this phase: (steps done, position in the data)."""
        if self.position()[0] != phase:
            return 0, 0
        numbers = scale.load_checkpoint(self.checkpoint, model, optimizer, cursor=0, seconds=0.0)
        self.seconds[phase] = numbers["seconds"]
        return self.position()[1], int(numbers["cursor"])


@dataclass
class Begun:
    """A step that has begun, and what stands behind the steps before it."""

    phase: str
    step: int
    model: VideoLM
    optimizer: torch.optim.AdamW
    cursor: int
    updates: int  # how often the optimiser had stepped


def checkpoint_name(phase: str, step: int) -> str:
    return f"checkpoint-{('sft', 'grpo').index(phase)}-{phase}-{step:06d}"


def newest_name(out: Path) -> str | None:
    newest = scale.newest_checkpoint(out)
    return newest and newest.name


def number_of_updates(optimizer: torch.optim.AdamW) -> int:
    """How often AdamW has stepped: as it counts for the first parameter that has had a gradient."""
    return next((int(state["step"]) for state in optimizer.state.values() if "step" in state), 0)


def cut_log(file: Path, position: tuple[str, int] | None) -> None:
    """Drop the lines behind a checkpoint: the resumed run writes them again."""
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if position and file.exists() else []
    order = {"": -1, "sft": 0, "grpo": 1}
    keep = []
    for line in lines:
        if line.endswith("\n"):  # else the kill came while it was written
            record = json.loads(line)
            if (order[record["phase"]], record["step"]) <= (order[position[0]], position[1]):
                keep.append(line)
    file.write_text("".join(keep), encoding="utf-8")


# --- what all stages share --------------------------------------------------------------------------------------------


def order_of(samples: list[dict], seed: int) -> Iterator[dict]:
    """The samples for ever, each epoch in an order of its own, the same on every rank: epoch e is seeded by (seed, e)."""
    epoch = 0
    while True:
        generator = torch.Generator().manual_seed(sampling_seed(seed, epoch, "order"))
        yield from (samples[i] for i in torch.randperm(len(samples), generator=generator).tolist())
        epoch += 1


class Stream:
    """A position in that endless order, the same on every rank; of the next samples each rank gets its share.

    Which rank gets a sample depends on its position alone. So a video that was decoded ahead, after `peek`, is decoded
    by the rank that will need it, however many samples are taken at a time.
    """

    def __init__(self, samples: list[dict], seed: int, cursor: int, world: scale.World):
        self.source, self.ahead, self.cursor, self.world = order_of(samples, seed), [], cursor, world
        for _ in range(cursor):
            next(self.source)

    def peek(self, count: int) -> list[dict]:
        """This rank's share of the next `count` samples, without moving on."""
        while len(self.ahead) < count:
            self.ahead.append(next(self.source))
        numbered = enumerate(self.ahead[:count], self.cursor)
        return [sample for i, sample in numbered if i % self.world.size == self.world.rank]

    def take(self, count: int) -> list[dict]:
        mine = self.peek(count)
        self.ahead, self.cursor = self.ahead[count:], self.cursor + count
        return mine


def number_of_steps(asked: int, samples: list[dict], questions: int) -> int:
    """-E means E epochs. Epochs follow each other without a gap, so only the last step reaches into a further one."""
    return asked if asked >= 0 else math.ceil(-asked * len(samples) / questions)


def learning_rate(peak: float, step: int, steps: int, warmup: int, schedule: str) -> float:
    """Rate of 0-based `step`: a linear rise over `warmup` steps, then constant, or linear to 0 behind the last one."""
    rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
    fall = (steps - step) / max(steps - warmup, 1) if schedule == "linear" else 1.0
    return peak * min(rise, fall)


def make_optimizer(config: Config, model: VideoLM, lr: float) -> torch.optim.AdamW:
    model.visual.requires_grad_(not config.freeze_vision)
    parameters = [p for p in model.hf.parameters() if p.requires_grad]
    # Without `fused` PyTorch updates all parameters of a GPU at once, with temporary copies of 4 bytes a parameter.
    fused = bool(parameters) and parameters[0].device.type == "cuda"
    return torch.optim.AdamW(parameters, lr=lr, betas=(0.9, config.adam_beta2), weight_decay=config.weight_decay, fused=fused)


def optimizer_step(config: Config, world: scale.World, optimizer: torch.optim.AdamW, lr: float) -> float:
    """Sum the gradients over the ranks, clip, step; returns the norm before clipping.

    Without a finite gradient there is no step, and without any either: momentum alone would move the policy, on an
    evidence of nothing, when all groups of a step are dead.
    """
    parameters = optimizer.param_groups[0]["params"]
    scale.sum_gradients(world, parameters)
    with world.waiting():
        norm = scale.clip_gradients(world, parameters, config.max_grad_norm)
    optimizer.param_groups[0]["lr"] = lr
    if math.isfinite(norm) and norm > 0:
        with memory.note_if_out_of_memory("the optimiser's step"):
            optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


class Clock:
    """Seconds of a step by phase: `clock("sample")` says that what follows until the next call is sampling."""

    def __init__(self, world: scale.World, title: str):
        self.world, self.title = world, title
        self.seconds: Counter = Counter()
        self.phase, self.since = None, time.time()

    def __call__(self, phase: str | None) -> None:
        if self.world.device.type == "cuda":
            with self.world.waiting():
                torch.cuda.synchronize()  # a GPU works on when Python has gone on: its time would land in the next phase
        now = time.time()
        if self.phase:
            self.seconds[self.phase] += now - self.since
        if phase:
            self.world.phase(f"{self.title}: {phase}")
        self.phase, self.since = phase, now

    def share(self, phase: str) -> float:
        """Of all that was measured."""
        return round(self.seconds[phase] / max(sum(self.seconds.values()), 1e-9), 4)

    def rounded(self) -> dict[str, float]:
        return {name: round(value, 4) for name, value in self.seconds.items()}


def load_model(config: Config, world: scale.World, name: str, dtype: torch.dtype = torch.float32) -> VideoLM:
    """With LoRA the weights are frozen: then bfloat16, which the GPU computes in anyway, is enough for them."""
    if config.lora_rank and world.device.type == "cuda":
        dtype = torch.bfloat16
    model = VideoLM.load(name, world.device, dtype)
    model.pack_tokens = config.pack_tokens
    if config.gradient_checkpointing:
        model.hf.gradient_checkpointing_enable({"use_reentrant": False})
    if config.lora_rank:
        lora.add_adapters(model.hf, config.lora_rank, config.lora_alpha, config.lora_targets, config.seed)
    elif scale.worth_sharding(config.shard, config.offload, world, sum(p.numel() for p in model.hf.parameters())):
        if config.compile:
            raise ValueError("--compile compiles layers that are whole, and this model is sharded (--shard auto): leave out "
                             "--compile, or take --shard off")
        scale.shard(world, model, offload=config.offload)
    model.compile_decoding = config.compile
    return model


def load_reference(config: Config, world: scale.World, model: VideoLM, start: str) -> VideoLM | None:
    """What the KL is measured to: the weights GRPO starts from, frozen; None where beta is 0. With LoRA that is the
    policy itself, scored with its adapters off (by `accumulate_gradients`)."""
    if config.beta == 0:
        return None
    if config.lora_rank:
        return model
    reference = load_model(config, world, start, torch.bfloat16 if world.device.type == "cuda" else torch.float32)
    reference.hf.requires_grad_(False)
    return reference


NOTHING_READABLE = "not one video of the first step can be read (the reasons are above): check --video_root"

# --- stage 1: warm start ----------------------------------------------------------------------------------------------


def warm_start(run: Run, model: VideoLM, samples: list[dict]) -> None:
    """Supervised fine-tuning: imitate each sample's `target`."""
    config, world = run.config, run.world
    check_target_lengths(config, model, samples)
    optimizer = make_optimizer(config, model, config.sft_lr)
    steps = number_of_steps(config.sft_steps, samples, config.sft_questions)
    first, cursor = run.restore("sft", model, optimizer)
    stream = Stream(samples, config.seed, cursor, world)
    start = time.time() - run.seconds.get("sft", 0.0)
    bar = tqdm(total=steps, initial=first, desc="SFT", unit="step", disable=not world.is_first)
    for step in range(first, steps):
        world.phase(f"sft step {step + 1}")
        lr = learning_rate(config.sft_lr, step, steps, config.warmup_steps, "linear")
        run.begin_step("sft", step, model, optimizer, stream.cursor)
        line = sft_gradients(run, model, stream, Clock(world, f"sft step {step + 1}"))
        norm = optimizer_step(config, world, optimizer, lr)
        if step == 0 and line["tokens"] == 0:
            raise SystemExit(NOTHING_READABLE)
        run.seconds["sft"] = round(time.time() - start, 2)
        run.log({"phase": "sft", "step": step + 1, **line, "grad_norm": norm, "lr": lr})
        bar.set_postfix_str(f"loss {line['loss']:.3f} waiting for videos {line['wait_share']:.0%}")
        bar.update()
        if (step + 1) % config.save_every == 0 or step + 1 == steps:
            run.save("sft", step + 1, model, optimizer, stream.cursor)
    bar.close()


def sft_for_seconds(run: Run, model: VideoLM, samples: list[dict], seconds: float) -> None:
    """The control for GRPO: imitation that goes on for as long, its learning rate falling linearly over that time."""
    config = run.config
    optimizer = make_optimizer(config, model, config.sft_lr)
    stream = Stream(samples, config.seed + 1, 0, run.world)  # another order than the warm start's
    (seconds,) = scale.largest(run.world, [seconds])
    start, spent = time.time(), 0.0
    while spent < seconds:
        sft_gradients(run, model, stream, Clock(run.world, "sft, equal time"))
        optimizer_step(config, run.world, optimizer, config.sft_lr * (1 - spent / seconds))
        (spent,) = scale.largest(run.world, [time.time() - start])  # one clock, or ranks would stop at different steps


def sft_gradients(run: Run, model: VideoLM, stream: "Stream", clock: Clock) -> dict:
    """Gradient of the mean negative log-likelihood of the next questions' target tokens; what to log."""
    config, world = run.config, run.world
    clock("wait")
    batch = stream.take(config.sft_questions)
    prompts, problems = run.load_prompts(batch, stream.peek(config.sft_questions), model)
    clock("learn")
    targets = [encode_target(model, target_text(prompt.sample, config.prompt)) for prompt in prompts]
    tokens, unreadable = scale.total(world, [sum(t.numel() for t in targets), len(problems)])
    loss = 0.0
    examples = [Example(prompt, target) for prompt, target in zip(prompts, targets)]
    packs = [[examples[i] for i in pack] for pack in model.pack([len(e.prompt.ids) + e.target.numel() for e in examples])]
    for pack in model.even_out(packs, partial(idle_example, model)):
        described = partial(memory.sizes, [e.prompt for e in pack], f"targets of up to {max(e.target.numel() for e in pack)} tokens")
        with world.waiting(), memory.note_if_out_of_memory("scoring", described):
            logps = model.inside(partial(score_targets, model, pack))
            part = -sum(e.weight * lp.sum() for e, lp in zip(pack, logps)) / tokens
            part.backward()
            loss += float(part.detach())
    clock(None)
    return {"loss": scale.total(world, [loss])[0], "tokens": int(tokens), "unreadable": int(unreadable),
            "wait_share": clock.share("wait")}


@dataclass
class Example:
    prompt: Prompt
    target: torch.Tensor  # (1, C)
    weight: float = 1.0  # 0: it is there for the sake of even_out


def idle_example(model: VideoLM, prompt: Prompt) -> Example:
    return Example(prompt, torch.tensor([[model.tokenizer.eos_token_id]]), weight=0.0)


def score_targets(model: VideoLM, examples: list[Example]) -> list[torch.Tensor]:
    """(1, C) log-probabilities of each target. Temperature 1: imitation is likelihood, whatever is sampled at later."""
    prompts = [example.prompt for example in examples]
    targets = [example.target for example in examples]
    embeds, fed = model.embed_groups([p.ids for p in prompts], encode_videos(model, prompts), targets)
    return model.logprobs_packed(embeds, [p.positions for p in prompts], targets, 1.0, fed=fed)


def encode_target(model: VideoLM, text: str) -> torch.Tensor:
    """(1, C): the completion to imitate, with the end token that the policy has to learn to say."""
    ids = model.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return torch.tensor([ids + [model.tokenizer.eos_token_id]])


def check_target_lengths(config: Config, model: VideoLM, samples: list[dict]) -> None:
    """What is imitated must be sayable later: otherwise GRPO cuts every completion before its answer."""
    longest = max(samples, key=lambda sample: len(target_text(sample, config.prompt)))
    length = encode_target(model, target_text(longest, config.prompt)).numel()
    if length > config.max_new_tokens:
        raise SystemExit(f"sample {longest['id']}: its target has {length} tokens, more than a completion may have; "
                         f"raise --max_new_tokens ({config.max_new_tokens}) or leave the task out (--tasks)")


# --- stage 2: variance-aware selection --------------------------------------------------------------------------------


def select_samples(run: Run, model: VideoLM, samples: list[dict]) -> dict:
    """Answer every training question `select_k` times and keep those that are worth training on: {ids, report}."""
    config = run.config
    asking = SamplingSettings(config.prompt, config.max_new_tokens, config.max_prompt_tokens, config.select_k,
                              config.temperature, config.reward, config.seed, judge=run.judge)
    partial = run.out / "selecting"  # an interrupted selection goes on there
    decisive = fingerprint("the policy before GRPO", config.judge, asking, run.loader.settings, samples)
    claim(run.world, partial, decisive)
    with scale.gathered(run.world, model):
        predictions = answer_all(model, run.loader, samples, run.world, asking, "selecting", partial)
    ids, report = select(samples, {p["id"]: p for p in predictions}, min_std=config.select_min_std,
                         min_mean=config.select_min_mean, seed=config.seed)
    if run.world.is_first:
        (run.out / "selected.report.json").write_text(json.dumps(report, indent=1) + "\n")
        print("\n" + report_text(report))
    scale.wait_for_all(run.world)
    if run.world.is_first:
        shutil.rmtree(partial)
    if not ids:
        raise SystemExit("the selection kept nothing: the answers to a question do not differ, by --select_min_std, or "
                         "are too poor, by --select_min_mean. See selected.report.json; --resume --select_k 0 goes on "
                         "with everything")
    return {"ids": ids, "report": report}


# --- stage 3: GRPO ----------------------------------------------------------------------------------------------------


def train_grpo(run: Run, model: VideoLM, reference: VideoLM | None, samples: list[dict], held_out: list[dict]) -> None:
    """The main loop. `reference` is the policy as it is now, frozen; None when beta is 0."""
    config, world = run.config, run.world
    optimizer = make_optimizer(config, model, config.lr)
    steps = number_of_steps(config.steps, samples, config.questions)
    first, cursor = run.restore("grpo", model, optimizer)
    stream = Stream(samples, config.seed, cursor, world)
    if first < steps:  # a finished run that is given more steps: what was measured behind its end is no longer true
        for name in ("after", "sft_equal_time"):
            run.results.pop(name, None)
    bar = tqdm(total=steps, initial=first, desc="GRPO", unit="step", disable=not world.is_first)
    nowhere = 0
    for step in range(first, steps):
        clock = Clock(world, f"grpo step {step + 1}")
        run.begin_step("grpo", step, model, optimizer, stream.cursor)
        # 1. Ask: sample a group of completions for each question, score them, compare siblings.
        groups, replaced, counts = collect_groups(run, model, stream, step, clock)
        if step == 0 and counts["groups"] == 0:
            raise SystemExit(NOTHING_READABLE)
        # 2. Groups without spread have no policy gradient. They are left out, but stay in the denominator.
        trained = groups if config.keep_dead_groups else [group for group in groups if group.is_live]
        denominator = counts["completions"] if config.loss_norm == "sequence" else counts["tokens"]
        # 3. Learn: policy and reference score the completions, the loss is differentiated, the optimiser steps.
        lr = learning_rate(config.lr, step, steps, config.warmup_steps, config.lr_schedule)
        gaps = None
        for _ in range(config.inner_steps):
            clock("score")
            with world.waiting():
                sums = grpo_gradients(config, model, reference, trained, denominator)
            gaps = gaps or {name: sums[name] for name in ("gap_sum", "gap_max")}  # before the policy has moved
            clock("step")
            norm = optimizer_step(config, world, optimizer, lr)
        clock(None)
        # 4. Say what happened.
        run.seconds["grpo"] = round(run.seconds.get("grpo", 0.0) + sum(clock.seconds.values()), 4)
        line = {"phase": "grpo", "step": step + 1, **describe(world, groups + replaced, counts),
                **mean_sums(world, sums | gaps), "grad_norm": norm if math.isfinite(norm) else None, "lr": lr,
                "seconds": clock.rounded(), "wait_share": clock.share("wait")}
        line["sampled_per_second"] = round(line["sampled"] / max(clock.seconds["sample"], 1e-9), 1)
        if config.eval_every and (step + 1) % config.eval_every == 0:
            line["evaluation"] = keep_best(run, model, held_out, step + 1)
        said = scale.gather(world, [records(group, step + 1) for group in groups + replaced])
        run.log(line, [record for group in said for record in group])
        bar.update()
        if world.is_first:
            bar.write(log_line(line, steps))
            warn_of_gap(line, world.device)
        # 5. A gradient that is not finite is skipped; five in a row are no accident.
        nowhere = 0 if math.isfinite(norm) else nowhere + 1
        if nowhere == 5:
            raise SystemExit(f"step {step + 1}: five steps in a row without a finite gradient; last questions: "
                             f"{[group.prompt.sample['id'] for group in groups]}")
        if (step + 1) % config.save_every == 0 or step + 1 == steps:
            run.save("grpo", step + 1, model, optimizer, stream.cursor)
    bar.close()


def grpo_gradients(config: Config, model: VideoLM, reference: VideoLM | None, groups: list[Group],
                   denominator: float) -> dict[str, float]:
    return accumulate_gradients(model, reference, groups, temperature=config.temperature, beta=config.beta,
                                clip_low=config.clip_low, clip_high=config.clip_high, norm=config.loss_norm,
                                denominator=max(denominator, 1), reuse_video=config.freeze_vision,
                                entropy_bonus=config.entropy_bonus)


def collect_groups(run: Run, model: VideoLM, stream: "Stream", step: int,
                   clock: "Clock") -> tuple[list[Group], list[Group], dict[str, int]]:
    """This rank's groups of a step, those they have replaced, and counts over all ranks.

    An unreadable video costs its group, never the run. With `--resample`, groups without spread give their places to
    further questions. How many is counted over all ranks together, so that all take part in the same number of rounds.
    """
    config, world = run.config, run.world
    groups: list[Group] = []
    replaced: list[Group] = []
    counts = {"unreadable": 0, "resampled": 0}
    places = config.questions
    for attempt in range(config.resample + 1):
        clock("wait")
        mine = stream.take(places)
        prompts, problems = run.load_prompts(mine, stream.peek(config.questions), model)
        clock("sample")
        seeds = [sampling_seed(config.seed, step, prompt.sample["id"]) for prompt in prompts]
        with scale.gathered(world, model):
            new = rollout(model, prompts, group_size=config.group_size, max_new_tokens=config.max_new_tokens,
                          temperature=config.temperature, seeds=seeds, mix=config.reward, scale=config.adv_scale,
                          judge=run.judge)
        clock("meet")  # the other ranks: not the videos
        dead, unreadable = scale.total(world, [sum(not group.is_live for group in new), len(problems)])
        counts["unreadable"] += int(unreadable)
        if attempt == config.resample or dead == 0:
            groups += new
            break
        groups += [group for group in new if group.is_live]
        replaced += [group for group in new if not group.is_live]
        counts["resampled"] += int(dead)
        places = int(dead)
    mine = [sum(len(g.texts) for g in groups), sum(g.num_tokens for g in groups), len(groups),
            sum(not g.is_live for g in groups)]
    names = ("completions", "tokens", "groups", "dead")
    return groups, replaced, {**counts, **dict(zip(names, map(int, scale.total(world, mine))))}


def describe(world: scale.World, groups: list[Group], counts: dict) -> dict:
    """Means over the completions of all ranks: the reward, each part over the tasks that have it, length, truncation."""
    sums: Counter = Counter()
    for group in groups:
        for score, reason in zip(group.scores, group.reasons):
            sums["reward"] += score.total
            sums["truncated"] += reason == "truncated"
            for name, value in score.parts.items():
                sums[name] += value
                sums[f"n/{name}"] += 1
        sums["completions"] += len(group.texts)
        sums["tokens"] += group.num_tokens
    names = [name for part in PARTS for name in (part, f"n/{part}")]
    names = ["reward", "truncated", "completions", "tokens", *names]
    sums = dict(zip(names, scale.total(world, [float(sums[name]) for name in names])))
    completions = max(sums["completions"], 1)
    line = {"reward": sums["reward"] / completions}
    line |= {name: sums[name] / sums[f"n/{name}"] for name in names[4::2] if sums[f"n/{name}"]}
    return line | {"length": sums["tokens"] / completions, "sampled": int(sums["tokens"]), "truncated": int(sums["truncated"]),
                   "groups": counts["groups"], "dead_groups": counts["dead"], "unreadable": counts["unreadable"],
                   "resampled": counts["resampled"]}


def mean_sums(world: scale.World, sums: dict[str, float]) -> dict[str, float]:
    """Sums over this rank's tokens to means over all ranks' tokens."""
    names = ["loss", "tokens", "kl_sum", "ratio_sum", "clipped_tokens", "gap_sum"]
    names += ["entropy_sum"] if "entropy_sum" in sums else []
    added = dict(zip(names, scale.total(world, [sums[name] for name in names])))
    tokens = max(added["tokens"], 1)
    entropy = {"entropy": added["entropy_sum"] / tokens} if "entropy_sum" in added else {}
    return {"loss": added["loss"], "kl": added["kl_sum"] / tokens, "clip_fraction": added["clipped_tokens"] / tokens,
            "ratio": added["ratio_sum"] / tokens, **entropy, "logp_gap_mean": added["gap_sum"] / tokens,
            "logp_gap_max": scale.largest(world, [sums["gap_max"]])[0]}


def records(group: Group, step: int) -> list[dict]:
    """Lines of completions.jsonl: what was said, what it was worth, and how it compared to its siblings."""
    return [{"phase": "grpo", "step": step, "id": group.prompt.sample["id"], "completion": text, "reward": score.total,
             "parts": score.parts, "reason": reason, "advantage": round(float(advantage), 6)}
            for text, score, reason, advantage in zip(group.texts, group.scores, group.reasons, group.advantages)]


def log_line(line: dict, steps: int) -> str:
    parts = " ".join(f"{n} {line[n]:.3f}" for n in PARTS if n in line)
    spent = " ".join(f"{name} {value:.2f}" for name, value in line["seconds"].items())
    return (f"step {line['step']}/{steps} reward {line['reward']:.3f} {parts} kl {line['kl']:.3f} "
            f"dead {line['dead_groups']}/{line['groups']} truncated {line['truncated']} length {line['length']:.1f} "
            f"grad {line['grad_norm'] or math.nan:.2f} gap {line['logp_gap_max']:.0e} | {spent} s, "
            f"waiting for videos {line['wait_share']:.0%}, {line['sampled_per_second']:.0f} tokens/s sampled")


def warn_of_gap(line: dict, device: torch.device) -> None:
    """Sampling and scoring must mean the same policy. In bfloat16 single tokens differ by rounding; the mean does not."""
    limit = 0.05 if device.type == "cuda" else 1e-4
    if line["logp_gap_mean"] > limit:
        tqdm.write(f"warning: log-probabilities when sampled and when scored differ by {line['logp_gap_mean']:.1e} on "
                   f"average, more than {limit:g}: a position, mask or temperature is not the same in both")


# --- before a long run: one step, as large as they get ----------------------------------------------------------------

CANDIDATES = 64  # videos that are decoded in search of the longest prompts


def dry_run(run: Run, initial: str, samples: list[dict], held_out: list[dict]) -> dict:
    """A step of the warm start and one of GRPO on the longest prompts, with completions of full length. Prints and
    returns tokens, peak bytes, seconds of a step and of the run: an upper bound, as no step of the run does more."""
    config, world = run.config, run.world
    model = load_model(config, world, initial)
    model.eos_ids = model.banned_ids[:1]  # never sampled: nothing ends a completion before its limit
    clock = Clock(world, "dry run")
    try:
        clock("decode")
        longest = longest_prompts(run, model, samples, max(config.questions, config.sft_questions))
        if config.sft_steps:
            clock("sft")
            check_target_lengths(config, model, samples)
            dry_sft_step(run, model, [sample for _, sample in longest[: config.sft_questions]])
        if config.steps:
            dry_grpo_step(run, model, initial, [sample for _, sample in longest[: config.questions]], clock)
        clock(None)
    except torch.OutOfMemoryError as error:
        raise SystemExit(f"the run does not fit: out of memory in phase {clock.phase!r}. What helps: "
                         "--gradient_checkpointing, --freeze_vision, --lora_rank or --shard on, smaller "
                         f"--pack_tokens, --max_new_tokens, --group_size or --total_pixels ({error})") from error
    clock.seconds["decode"] /= min(len(samples), max(CANDIDATES, config.questions, config.sft_questions))  # a video
    cost = dict(zip(clock.seconds, scale.largest(world, list(clock.seconds.values()))))
    (peak,) = scale.largest(world, [peak_memory(world.device)])
    result = {"tokens": [tokens for tokens, _ in longest], "peak_bytes": peak, "seconds": cost,
              "run": predict_seconds(config, cost, samples, held_out)}
    if world.is_first:
        print_dry_run(config, world, result)
    return result


def longest_prompts(run: Run, model: VideoLM, samples: list[dict], count: int) -> list[tuple[int, dict]]:
    """(tokens, sample) of the `count` longest prompts, longest first, among the candidates that promise most.

    How many tokens a video has is known once it is open; until then its seconds and the text must do. A sample that
    does not say how long its video is may be the longest of all, and goes first."""

    def promise(sample: dict) -> tuple[float, int]:
        text = len(str(build_prompt(sample, run.config.prompt)))
        if "video" not in sample:
            return 0.0, text
        whole = sample.get("duration", math.inf)
        return sample.get("end", whole) - sample.get("start", 0.0), text

    shuffled = islice(order_of(samples, run.config.seed), len(samples))  # where nothing is known, a fair draw
    candidates = sorted(shuffled, key=promise, reverse=True)[: max(CANDIDATES, count)]
    mine, found = run.world.share(list(enumerate(candidates))), []
    bar = tqdm(mine, "looking for long prompts", unit="video", disable=not run.world.is_first, leave=False)
    for i, (place, sample) in enumerate(bar):
        prompts, _ = run.load_prompts([sample], [s for _, s in mine[i + 1: i + 9]], model)
        found += [(len(prompt.ids), place) for prompt in prompts]
    found = sorted(scale.gather(run.world, found), key=lambda pair: (-pair[0], pair[1]))[:count]
    if not found:
        raise SystemExit(NOTHING_READABLE)
    return [(tokens, candidates[place]) for tokens, place in found]


def dry_sft_step(run: Run, model: VideoLM, samples: list[dict]) -> None:
    optimizer = make_optimizer(run.config, model, run.config.sft_lr)
    sft_gradients(run, model, Stream(samples, run.config.seed, 0, run.world), Clock(run.world, "dry run, warm start"))
    optimizer_step(run.config, run.world, optimizer, run.config.sft_lr)


def dry_grpo_step(run: Run, model: VideoLM, initial: str, samples: list[dict], clock: Clock) -> None:
    """As in `train_grpo`, but every group is trained on: cut completions all score alike, and without a gradient
    AdamW would not even make room for its moments."""
    config, world = run.config, run.world
    reference = load_reference(config, world, model, initial)
    optimizer = make_optimizer(config, model, config.lr)
    groups, _, counts = collect_groups(run, model, Stream(samples, config.seed, 0, world), 0, clock)
    for group in groups:
        group.advantages = torch.linspace(-1, 1, len(group.texts), device=group.tokens.device)  # (G,)
    for _ in range(config.inner_steps):
        clock("score")
        with world.waiting():
            grpo_gradients(config, model, reference, groups, counts["completions"])
        clock("step")
        optimizer_step(config, world, optimizer, config.lr)
    clock(None)


def peak_memory(device: torch.device) -> int:
    """Bytes: allocated on the GPU, else resident in this process (loading and Python included)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def predict_seconds(config: Config, cost: dict[str, float], samples: list[dict], held_out: list[dict]) -> dict:
    """Seconds of each stage of the run, given those of one step by phase and of decoding one video.

    Videos are decoded while the model works, so the slower of the two counts. Loading and saving models is not in it;
    without a GRPO step nothing was sampled, and evaluation is not in it either."""
    sft_steps = number_of_steps(config.sft_steps, samples, config.sft_questions)
    steps = number_of_steps(config.steps, samples, config.questions)
    a_step = sum(cost.get(name, 0.0) for name in ("wait", "sample", "score", "step"))
    a_step = max(a_step, config.questions * cost["decode"])
    asking = (cost["wait"] + cost["sample"]) / config.questions if "sample" in cost else 0.0  # a group of one question
    asking = max(asking, cost["decode"])
    evaluations = 1 + bool(sft_steps) + bool(steps) + config.sft_equal_time
    evaluations += steps // config.eval_every if config.eval_every else 0
    return {"warm start": sft_steps * max(cost.get("sft", 0.0), config.sft_questions * cost["decode"]),
            "selection": len(samples) * asking * max(1.0, config.select_k / config.group_size) * bool(config.select_k),
            "GRPO": steps * a_step, "evaluation": evaluations * len(held_out) * asking,
            "SFT, equal time": steps * a_step * config.sft_equal_time}


def print_dry_run(config: Config, world: scale.World, result: dict) -> None:
    tokens, cost, stages = result["tokens"], result["seconds"], result["run"]
    memory, where = result["peak_bytes"] / 1e9, "resident in a process"
    if world.device.type == "cuda":
        where = f"allocated, of {torch.cuda.get_device_properties(world.device).total_memory / 1e9:.1f} GB on the GPU"
    print(f"\ndry run: prompts of {tokens[-1]} to {tokens[0]} tokens, {config.group_size} completions of "
          f"{config.max_new_tokens} each")
    print(f"peak memory: {memory:.2f} GB {where}")
    print("seconds: " + ", ".join(f"{name} {value:.2f}" for name, value in cost.items()) + " (decode: a video)")
    print("the run, at most: " + ", ".join(f"{name} {value / 3600:.2f} h" for name, value in stages.items() if value)
          + f"; in all {sum(stages.values()) / 3600:.2f} h")


# --- stage 4: the whole run -------------------------------------------------------------------------------------------


def prepare_toy(config: Config, world: scale.World) -> tuple[str, list[str], list[str]]:
    """Synthetic clips and a tiny random model, written as files like any others: (model, train_data, eval_data)."""
    folder = Path("toy") / f"seed{config.seed}-{config.toy_train}-{config.toy_eval}"
    if world.is_first:
        toy.write_dataset(folder, config.toy_train, config.toy_eval, config.seed)
        samples = [s for name in ("train", "eval") for s in load_samples([str(folder / f"{name}.jsonl")])]
        # The tokenizer learns from these texts; a run without captions keeps the one it had before there were any.
        samples = [s for s in samples if s["task"] != "captioning" or "captioning" in config.tasks]
        texts = [part["text"] for s in samples for style in STYLES for message in build_prompt(s, style)
                 for part in (message["content"] if message["role"] == "user" else []) if "text" in part]
        texts += [target_text(s, config.prompt) for s in samples]
        if not (Path(config.out) / "initial" / "preprocessor_config.json").exists():
            toy.write_model(Path(config.out) / "initial", texts, config.seed)
    scale.wait_for_all(world)
    return str(Path(config.out) / "initial"), [str(folder / "train.jsonl")], [str(folder / "eval.jsonl")]


def score_of(metrics: dict) -> float:
    """One number to tell the best model by: the mean of each task's first metric."""
    names = [name for name in reversed(METRICS) if "/" in name and metrics.get(name) is not None]
    first = {name.split("/")[0]: metrics[name] for name in names}
    return sum(first.values()) / max(len(first), 1)


def measure(run: Run, model: VideoLM, held_out: list[dict], name: str) -> dict | None:
    """Metrics of greedy answers to the held-out samples; the answers go to predictions.NAME.jsonl."""
    if not held_out:
        return None
    config = run.config
    asking = SamplingSettings(config.prompt, config.max_new_tokens, config.max_prompt_tokens, judge=run.judge)
    with scale.gathered(run.world, model):
        predictions = answer_all(model, run.loader, held_out, run.world, asking, name)
    metrics = compute_metrics(held_out, [prediction["completions"][0] for prediction in predictions], run.judge)
    if run.world.is_first:
        with open(run.out / f"predictions.{name}.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(prediction) + "\n" for prediction in predictions)
    return metrics


def save_model(run: Run, model: VideoLM, name: str) -> None:
    """A Hugging Face folder of the run, with a note of how the model was asked; eval.py asks it in the same way.

    Written under another name first: a kill in the middle must not cost the best model so far.
    """
    run.world.phase(f"save {name}")
    weights = scale.full_weights(run.world, model)
    if run.world.is_first:
        partial_folder, replaced = run.out / f"partial-{name}", run.out / f"replaced-{name}"
        for left in (partial_folder, replaced):
            shutil.rmtree(left, ignore_errors=True)
        model.save(partial_folder, weights)
        write_asked(partial_folder, asdict(run.config))
        if (run.out / name).exists():
            (run.out / name).rename(replaced)
        partial_folder.rename(run.out / name)
        shutil.rmtree(replaced, ignore_errors=True)
    scale.wait_for_all(run.world)


def keep_best(run: Run, model: VideoLM, held_out: list[dict], step: int) -> dict:
    """Evaluate on the way; the best model so far stays in best/."""
    metrics = measure(run, model, held_out, "on_the_way") or {}
    # One number for all ranks: a judge that rounds differently on one of them must not send it to save alone.
    (score,) = scale.largest(run.world, [score_of(metrics)])
    if score > run.results.get("best", {"score": -1.0})["score"]:
        save_model(run, model, "best")
        run.results["best"] = {"step": step, "score": score, "metrics": metrics}
        run.save_state()
    return metrics


def run_stages(run: Run, initial: str, train: list[dict], held_out: list[dict]) -> None:
    """Evaluation, warm start, selection, GRPO, the control: whatever the settings ask for and is not done yet."""
    config, world = run.config, run.world
    model = load_model(config, world, initial)
    run.stage("before", lambda: measure(run, model, held_out, "before"))
    start = initial  # the weights that GRPO starts from and is held to
    if config.sft_steps:
        start = str(run.out / "warm_start")
        if "after_sft" not in run.results:
            warm_start(run, model, train)
            lora.fold_adapters(model.hf, config.seed)
            save_model(run, model, "warm_start")
        else:
            del model  # before the next one is loaded: two may not fit
            model = load_model(config, world, start)
        run.stage("after_sft", lambda: measure(run, model, held_out, "after_sft"))
    chosen = train
    if config.select_k:
        ids = set(run.stage("selected", lambda: select_samples(run, model, train))["ids"])
        chosen = [sample for sample in train if sample["id"] in ids]
    if config.steps:
        train_grpo(run, model, load_reference(config, world, model, start), chosen, held_out)
        run.stage("after", lambda: measure(run, model, held_out, "after"))
    save_model(run, model, "final")
    if config.sft_equal_time and "sft_equal_time" not in run.results:
        del model
        model = load_model(config, world, start)
        sft_for_seconds(run, model, train, run.seconds["grpo"])
        run.stage("sft_equal_time", lambda: measure(run, model, held_out, "sft_equal_time"))


def main(arguments: list[str] | None = None) -> None:
    config = parse_config(arguments)
    world = scale.start(config.device, config.wait_minutes)
    if config.dry_run:
        with tempfile.TemporaryDirectory() as folder:  # the first rank's serves all
            folder = scale.gather(world, [folder])[0]
            carry_out(replace(config, out=folder, resume=False, overwrite=False, frame_cache=""), world)
            scale.wait_for_all(world)
    else:
        carry_out(config, world)
    scale.stop()


def carry_out(config: Config, world: scale.World) -> None:
    """The run, or its rehearsal."""
    began = time.time()
    settings = VideoSettings(config.fps, config.max_frames, config.total_pixels, config.min_pixels)
    with VideoLoader(settings, num_workers=config.num_workers, deadline=config.decode_seconds,
                     cache_bytes=config.cache_mb * 2**20, frame_cache=config.frame_cache,
                     frame_cache_gb=config.frame_cache_gb) as loader:
        run = Run(config, world, loader)
        initial, train_data, eval_data = config.model, config.train_data, config.eval_data
        if not config.model:
            initial, train_data, eval_data = prepare_toy(config, world)
        root = config.video_root or None
        train = with_style(load_samples(train_data, root, config.tasks, config.seed), config.prompt)
        held_out = with_style(load_samples(eval_data, root, config.tasks), config.prompt) if eval_data else []
        if config.dry_run:
            dry_run(run, initial, train, held_out)
            return
        try:
            run_stages(run, initial, train, held_out)
        except torch.OutOfMemoryError as error:
            raise SystemExit(end_out_of_memory(run, error)) from None
    run.seconds["total"] = round(run.seconds.get("total", 0.0) + time.time() - began, 2)
    if world.is_first:
        finish(run, held_out)


def end_out_of_memory(run: Run, error: torch.OutOfMemoryError) -> str:
    """Save what there is, and say what happened."""
    where = f" in {run.begun.phase} step {run.begun.step + 1}" if run.begun else ""
    text = memory.message(error, run.world.device, where)
    traceback.clear_frames(error.__traceback__)  # they hold the activations, and saving needs room too
    return text + "\n" + run.save_begun()


def finish(run: Run, held_out: list[dict]) -> None:
    """summary.json, the table, and three completions to look at."""
    results = run.results
    baselines = blind_baselines(held_out) if held_out else {}
    selected = results.get("selected")
    summary = {name: results.get(name) for name in ("before", "after_sft", "after")}
    summary |= {"baselines": baselines, "seconds": run.seconds, "selected": selected and selected["report"]}
    summary |= {name: results[name] for name in ("best", "sft_equal_time") if name in results}
    (run.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    run.save_state()
    last = next((name for name in ("after", "after_sft", "before") if results.get(name)), None)
    for line in open(run.out / f"predictions.{last}.jsonl", encoding="utf-8").readlines()[:3] if last else []:
        prediction = json.loads(line)
        sample = next(sample for sample in held_out if sample["id"] == prediction["id"])
        truth = target_text({k: v for k, v in sample.items() if k != "target"}, run.config.prompt)
        print(f"\n{sample['task']}: {sample['question']}\n  said     {prediction['completions'][0]}\n  expected {truth}")
    print(f"\n{run.out}/summary.json, {run.out}/final; {run.seconds['total']:.0f} s in all")
    columns = {"before": summary["before"], "after SFT": summary["after_sft"], "after GRPO": summary["after"],
               "SFT, equal time": results.get("sft_equal_time"), **baselines}
    print_table({name: column for name, column in columns.items() if column}, f"{len(held_out)} held-out samples")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:  # a wrong file or value, named in the message
        raise SystemExit(f"error: {error}") from error
