"""The folder of a training run: its settings, logs, checkpoints and models, and what is written down of each step.

    config.json  metrics.jsonl  completions.jsonl  state.json  summary.json  checkpoint-*/  warm_start/  best/  final/
    and, with --tensorboard, tensorboard/

A run that was interrupted goes on from its newest checkpoint; what the logs hold behind it is written again. A run that is
asked to end (SIGTERM) saves first. While it goes on its processes hold the file `lock`, and no other run may have the folder.
"""

import hashlib
import json
import math
import os
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

import torch
from tqdm import tqdm

from lib import checkpoints, hub, lora, memory
from lib.answers import write_asked
from lib.distributed import World
from lib.files import change_hold, clear_leftovers, hold, read_json, remove, write_whole
from lib.progress import Progress
from lib.questions import Questions
from rewards import CONTINUOUS, DISCRETE

PARTS = (*CONTINUOUS, *DISCRETE, "format")  # of the reward, as the log shows them
PHASES = ("sft", "grpo")  # in this order
KEEP_CHECKPOINTS = 2
BAD_STEPS = 5  # so many steps in a row without a finite gradient end a run
ENOUGH_VIDEOS = 100  # from so many on the share of unreadable ones counts
LOCK = "lock"  # the file that says who has the folder
HOPELESS_STEPS = 3  # after so many in which no completion got any reward, something is said


@dataclass
class Begun:
    """A step that has begun, and what stands behind the steps before it."""

    phase: str
    step: int
    model: object  # model.VideoLM
    optimizer: torch.optim.AdamW
    questions: Questions
    cursor: int
    updates: int  # how often the optimiser had stepped


class Run:
    """What every stage needs: the settings, the world, the video loader, and the folder `--out` with its logs,
    checkpoints and the results of the stages that are done."""

    def __init__(self, config, world: World, loader):
        self.config, self.world, self.loader, self.out = config, world, loader, Path(config.out)
        self.begun: Begun | None = None
        self.progress = Progress({}, world.is_first)  # `train.carry_out` knows the work of all stages
        self.samples = {"train": Counter(), "eval": Counter()}  # how many of each task
        self.bad_steps = self.hopeless_steps = 0
        self.videos: dict[str, str] = {}  # those that were tried, of all ranks: why each cannot be read, or ""
        self.is_in_steps = self.asked_to_end = False
        if config.resume and not (self.out / "config.json").exists():
            raise SystemExit(f"--resume: {self.out} holds no run (there is no config.json); --out names the folder of the run, "
                             "and a new run is started without --resume")
        if (self.out / "config.json").exists() and not (config.resume or config.overwrite):
            raise SystemExit(f"{self.out} holds a run already: --resume goes on with it, --overwrite deletes it, "
                             "--out names another folder")
        self.lock = self.take_folder()  # nobody deletes or writes before everybody has looked
        if config.overwrite and not config.resume and world.is_first and (self.out / "config.json").exists():
            for path in self.out.iterdir():  # only ever a folder that a run has written
                if path.name != LOCK:
                    remove(path)
        world.sync()
        self.checkpoint, damaged = checkpoints.find_checkpoints(self.out) if config.resume else (None, [])
        if damaged and world.is_first:
            tqdm.write(f"damaged: {'; '.join(damaged)}. Going on from the checkpoint before, {self.checkpoint.name}")
        state = self.out / "state.json"
        self.results: dict = read_json(state) if config.resume and state.exists() else {}
        self.seconds: dict = self.results.setdefault("seconds", {})
        if world.is_first:
            clear_leftovers(self.out)
            if not config.resume:  # else in `begin`: settings that turn out to be wrong must not replace those that work
                write_json(self.out / "config.json", asdict(config))
            for name in ("metrics.jsonl", "completions.jsonl"):
                cut_log(self.out / name, self.position() if config.resume else None)
        self.board = open_board(self.out) if config.tensorboard and world.is_first else None
        world.sync()

    def begin(self, train: list[dict], held_out: list[dict]) -> None:
        """With these questions. SystemExit where a run goes on and has others than it was begun with: its place in their order
        would mean nothing, and its tables would have columns about different questions."""
        begun_with = self.results.setdefault("samples", {})
        for name, flag, data in (("train", "--train_data", train), ("eval", "--eval_data", held_out)):
            self.samples[name] = Counter(sample["task"] for sample in data)  # for the model card
            ids = hashlib.sha256(json.dumps([sample["id"] for sample in data]).encode()).hexdigest()[:16]
            count, known = begun_with.get(name, (0, ids))
            if count and known != ids:
                raise SystemExit(f"--resume: {self.out} was begun with {count} other questions in {flag} (now {len(data)}): go on with "
                                 "the files as they were, or start another run; eval.py measures a model on other data")
            begun_with[name] = [len(data), ids]
        if self.world.is_first:
            write_json(self.out / "config.json", asdict(self.config))
        self.save_state()

    def take_folder(self) -> TextIO | None:
        """Nobody else may write here while one process of this run lives: after `kill -9` of torchrun its ranks go on."""
        file, world, holders = self.out / LOCK, self.world, ""
        me = f"rank {world.rank}: process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}"
        try:
            held = hold(file, alone=True) if world.is_first else None
        except BlockingIOError:
            held, holders = None, file.read_text(encoding="utf-8").strip().replace("\n", ", ")
        if holders := world.all_gather([holders])[0]:
            raise SystemExit(f"{self.out} is in use by a run ({holders}): wait for its end, end these processes, or name "
                             "another --out")
        if world.is_first:
            held.truncate(0)
            change_hold(held, alone=False)  # the other ranks hold it too: it is free when the last of them has ended
        world.sync()
        held = held or hold(file, alone=False)
        print(me, file=held, flush=True)
        world.sync()
        return held

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            self.old_handler = signal.signal(signal.SIGTERM, self.end_soon)
        return self

    def __exit__(self, *_):
        """Somebody else may have the folder."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self.old_handler)
        if self.board:
            self.board.close()
        self.lock.close()

    # --- stages and steps ---

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

    def steps(self, phase: str, total: int, model, optimizer: torch.optim.AdamW, questions: Questions) -> Iterator[int]:
        """The 0-based steps of a phase that are still to do: from the newest checkpoint on, with a clock of its own
        for each step (`self.clock`), and a checkpoint every `save_every` steps."""
        self.is_in_steps = True
        first = self.first_step = self.restore(phase, model, optimizer, questions)
        if first < total and phase == "grpo":  # a finished run that is given more steps: its end is no longer the end
            self.results.pop("after", None)
        if 0 < total <= first and self.world.is_first:
            tqdm.write(f"all {total} {phase} steps were done before; with a larger number of them --resume goes on")
        self.progress.begin(phase, total, first)
        self.text = ""  # what the step says of itself beside the bar
        for step in range(first, total):
            self.begun = Begun(phase, step, model, optimizer, questions, questions.cursor, number_of_updates(optimizer))
            self.clock = Clock(self.world, f"{phase} step {step + 1}")
            yield step
            self.progress.update(1, self.text)
            # one answer for all ranks: the signal comes to each of them at another moment
            is_last = self.world.all_reduce_max(self.asked_to_end)[0] > 0
            if is_last or (step + 1) % self.config.save_every == 0 or step + 1 == total:
                self.save(phase, step + 1, model, optimizer, questions.cursor)
            if is_last:
                self.end(f"the state behind {phase} step {step + 1} has been saved: --resume goes on from there")
        self.is_in_steps, self.begun = False, None
        if self.asked_to_end:
            self.end(f"the state behind {phase} step {total} has been saved: --resume goes on from there")
        self.progress.close()

    # --- the end before the end ---

    def end_soon(self, *_) -> None:
        """SIGTERM: behind the step that has begun, on all ranks; where there is no step, now."""
        is_new, self.asked_to_end = not self.asked_to_end, True  # it may come twice, from a scheduler and from torchrun
        if is_new and self.is_in_steps and self.world.is_first:
            tqdm.write("SIGTERM: this step will be the last one; then its state is saved")
        if is_new and not self.is_in_steps:
            self.end(self.what_is_saved())

    def end(self, text: str) -> None:
        self.progress.end()
        if self.world.is_first:
            tqdm.write(f"ended by SIGTERM: {text}", file=sys.stderr)
        raise SystemExit(128 + signal.SIGTERM)

    def end_interrupted(self) -> None:
        """Ctrl-C, which is for those who do not want to wait for the end of a step."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # torchrun passes it on, so it comes twice
        self.progress.end()
        if self.world.is_first:
            tqdm.write(f"interrupted: {self.what_is_saved()}", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT)

    def what_is_saved(self) -> str:
        newest = checkpoints.newest_checkpoint(self.out)
        if newest:
            return f"--resume goes on from {newest.name}"
        return "no step had been saved yet; --resume goes on from the last stage that was done"

    def end_saved(self, text: str) -> None:
        """On all ranks together, before the step that has begun has changed anything."""
        begun = self.begun
        if begun and begun.step:
            begun.optimizer.zero_grad(set_to_none=True)
            self.save(begun.phase, begun.step, begun.model, begun.optimizer, begun.cursor)
        self.progress.end()
        raise SystemExit(text + (f". The state behind {begun.phase} step {begun.step} has been saved" if begun and begun.step else ""))

    # --- logs ---

    def log(self, line: dict, completions: list[dict] = ()) -> None:
        """One line of metrics.jsonl, the same for TensorBoard, and of completions.jsonl one line for each completion."""
        if self.world.is_first:
            line = {name: finite(value) for name, value in line.items()}
            append_lines(self.out / "metrics.jsonl", [line])
            append_lines(self.out / "completions.jsonl", completions)
            if self.board:
                write_scalars(self.board, line)
                self.board.flush()

    def log_sft(self, step: int, batch, tokens: float, stats: Counter, grad_norm: float, lr: float) -> None:
        self.clock.stop()
        self.seconds["sft"] = round(self.seconds.get("sft", 0.0) + sum(self.clock.seconds.values()), 4)
        nll, unreadable = self.world.all_reduce_sum(stats["nll_sum"], batch.unreadable)
        line = {"phase": "sft", "step": step + 1, "loss": nll / max(tokens, 1), "tokens": int(tokens),
                "unreadable": int(unreadable), "wait_share": self.clock.share("wait"), "grad_norm": finite(grad_norm), "lr": lr}
        self.log(line)
        self.text = f"loss {line['loss']:.3f}, waiting for videos {line['wait_share']:.0%}"
        self.check_gradient(line, [prompt.sample["id"] for prompt in batch.prompts])

    def log_grpo(self, step: int, total: int, sampled, stats: Counter, grad_norm: float, lr: float,
                 evaluation: dict | None = None) -> None:
        """metrics.jsonl, completions.jsonl, a line on the screen. Stops a run without finite gradients."""
        clock, world = self.clock, self.world
        clock.stop()
        self.seconds["grpo"] = round(self.seconds.get("grpo", 0.0) + sum(clock.seconds.values()), 4)
        line = {"phase": "grpo", "step": step + 1, **describe(world, sampled), **means_of_sums(world, stats),
                **logp_gaps(world, sampled.groups), "grad_norm": finite(grad_norm), "lr": lr,
                "seconds": clock.rounded(), "wait_share": clock.share("wait")}
        line["sampled_per_second"] = round(line["sampled"] / max(clock.seconds["sample"], 1e-9), 1)
        if evaluation is not None:
            line["evaluation"] = evaluation
        groups = sampled.groups + sampled.replaced
        records = world.all_gather([records_of(group, step + 1) for group in groups])
        self.log(line, [record for group in records for record in group])
        if world.is_first:
            if step == self.first_step:
                tqdm.write(LEGEND)
            tqdm.write(log_line(line, total))
            warn_of_gap(line, world.device)
            self.warn_if_hopeless(line)
        self.check_gradient(line, [group.prompt.sample["id"] for group in groups])

    def warn_if_hopeless(self, line: dict) -> None:
        """No reward at all means no gradient at all: hours of it look like training."""
        self.hopeless_steps = 0 if line["reward"] > 0 or not line["groups"] else self.hopeless_steps + 1
        if self.hopeless_steps == HOPELESS_STEPS:
            tqdm.write(f"warning: not one completion of {HOPELESS_STEPS} steps got any reward, so there is nothing to learn from. "
                       "The commonest causes: completions are cut before their answer (`truncated`; raise --max_new_tokens), the "
                       "model does not know the answer's format (--sft_steps, or another --prompt), or the answers are read "
                       "otherwise than they are written (look at `reason` in completions.jsonl)")

    def check_gradient(self, line: dict, ids: list[str]) -> None:
        """A step without a finite loss and gradient is skipped (by `optimizer_step`), and its questions are named; five in a
        row are not bad luck. `ids`: of this rank's questions."""
        if line["grad_norm"] is not None and math.isfinite(line["loss"]):
            self.bad_steps = 0
            return
        self.bad_steps += 1
        ids = self.world.all_gather(ids)
        if self.world.is_first:
            tqdm.write(f"{line['phase']} step {line['step']}: no finite loss or gradient, nothing is learned; questions: {ids}")
        if self.bad_steps == BAD_STEPS:
            begun = self.begun  # the weights are those of the last good step; the next run goes on after these questions
            self.save(begun.phase, line["step"], begun.model, begun.optimizer, begun.questions.cursor)
            self.progress.end()
            raise SystemExit(f"{line['phase']} step {line['step']}: {BAD_STEPS} steps in a row without a finite loss and "
                             f"gradient; last questions: {ids}. The state is saved: --resume goes on after them")

    def check_videos(self, tried: list[tuple[str, str]]) -> None:
        """End a run, with its state, that has lost too many of its videos: what is left is another data set. `tried`: video and
        problem, "" without one, of this rank's questions. On all ranks together."""
        self.videos |= dict(self.world.all_gather(tried))
        bad = [problem for problem in self.videos.values() if problem]
        if len(self.videos) < ENOUGH_VIDEOS or len(bad) <= self.config.max_bad_share * len(self.videos):
            return
        if self.world.is_first:
            tqdm.write("\n".join(["unreadable:", *bad[:10], *(["..."] if len(bad) > 10 else [])]))
        self.end_saved(f"{len(bad)} of the {len(self.videos)} videos tried so far cannot be read, more than --max_bad_share "
                       f"{self.config.max_bad_share:g}: python data.py check keeps the good ones; --resume with another "
                       "--max_bad_share goes on with what can be read")

    # --- what a resumed run needs ---

    def position(self) -> tuple[str, int]:
        """Phase and step that the newest checkpoint stands behind."""
        if self.checkpoint is None:
            return "", 0
        _, _, phase, step = self.checkpoint.name.split("-")
        return phase, int(step)

    def save_state(self) -> None:
        if self.world.is_first:
            write_json(self.out / "state.json", self.results)

    def save(self, phase: str, step: int, model, optimizer: torch.optim.AdamW, cursor: int, alone: bool = False) -> None:
        """All that a resumed run needs. Frozen weights are those that the run was started from, so they are not saved
        again. On all ranks, or by one of them `alone`."""
        self.world.phase(f"{phase} step {step}: save")
        state = checkpoints.training_state(model, optimizer, cursor=cursor, seconds=self.seconds.get(phase, 0.0))
        checkpoints.save_checkpoint(self.world, self.out / checkpoint_name(phase, step), state, alone)
        if self.world.is_first:
            for old in sorted(self.out.glob("checkpoint-*"))[:-KEEP_CHECKPOINTS]:
                shutil.rmtree(old)

    def restore(self, phase: str, model, optimizer: torch.optim.AdamW, questions: Questions) -> int:
        """Load the newest checkpoint if it is of this phase; returns the number of steps that are done."""
        if self.position()[0] != phase:
            return 0
        numbers = checkpoints.load_checkpoint(self.checkpoint, model, optimizer, cursor=0, seconds=0.0)
        self.seconds[phase] = numbers["seconds"]
        questions.skip(int(numbers["cursor"]))
        return self.position()[1]

    def save_begun(self) -> str:
        """Save the state behind the steps before the one that has begun, if it is still there; says in a sentence what
        --resume goes on from."""
        begun, from_newest = self.begun, self.what_is_saved()
        if begun is None or begun.step == 0:
            return from_newest
        if (self.out / checkpoint_name(begun.phase, begun.step)).exists():
            return f"the state behind step {begun.step} is saved: --resume goes on from there"
        if number_of_updates(begun.optimizer) != begun.updates or (self.world.size > 1 and begun.model.sharding):
            # a policy between two updates on the same completions, or one of which this process has a part
            return from_newest
        begun.optimizer.zero_grad(set_to_none=True)
        self.save(begun.phase, begun.step, begun.model, begun.optimizer, begun.cursor, alone=self.world.size > 1)
        return f"the state behind step {begun.step} has been saved: --resume goes on from there"

    def end_out_of_memory(self, error: torch.OutOfMemoryError) -> str:
        """Save what there is, and say what happened."""
        where = f" in {self.begun.phase} step {self.begun.step + 1}" if self.begun else ""
        text = memory.message(error, self.world.device, where)
        traceback.clear_frames(error.__traceback__)  # they hold the activations, and saving needs room too
        return text + "\n" + self.save_begun()

    # --- models ---

    def save_model(self, model, name: str, learned: dict | None = None) -> None:
        """A Hugging Face folder of the run, with a model card, its adapters if it has some, and a note of how the model was
        asked; eval.py asks it in the same way. `learned`: adapters that have been folded into the weights just now."""
        self.world.phase(f"save {name}")
        weights = model.full_weights()  # on all ranks
        if self.world.is_first:
            # warm_start/ is the reference of GRPO, and where a resumed run goes on: what it holds is never rounded.
            dtype = torch.bfloat16 if self.config.save_dtype == "bfloat16" and name != "warm_start" else None
            with write_whole(self.out / name) as folder:  # a kill in the middle must not cost the best model so far
                model.save(folder, weights, dtype)
                write_asked(folder, asdict(self.config))
                text = hub.card(self.config, self.results, self.samples, self.world.size, name,
                                model.hf.config.model_type)
                (folder / hub.CARD).write_text(text, encoding="utf-8")
                if self.config.lora_rank:
                    self.write_adapter(folder / "adapter", model, learned)
        self.world.sync()

    def write_adapter(self, folder: Path, model, learned: dict | None) -> None:
        """In PEFT's layout. It belongs to the weights that it was trained beside: those of the start for the warm start's
        (`learned`), those of the warm start, if there is one, for GRPO's."""
        warm = self.out / "warm_start" if self.config.sft_steps else None
        if learned or not warm:
            lora.write_adapter(folder, learned or lora.adapter_state(model.hf), self.config.lora_alpha, model.source)
        elif self.config.steps:
            lora.write_adapter(folder, lora.adapter_state(model.hf), self.config.lora_alpha, str(warm))
        elif (warm / folder.name).exists():  # nothing has been learned behind the warm start
            shutil.copytree(warm / folder.name, folder)


def checkpoint_name(phase: str, step: int) -> str:
    """Names sort in the order of time."""
    return f"checkpoint-{PHASES.index(phase)}-{phase}-{step:06d}"


def number_of_updates(optimizer: torch.optim.AdamW) -> int:
    """How often AdamW has stepped: as it counts for the first parameter that has had a gradient."""
    return next((int(state["step"]) for state in optimizer.state.values() if "step" in state), 0)


def write_json(file: Path, value: dict) -> None:
    with write_whole(file) as partial:
        partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def append_lines(file: Path, lines: list[dict]) -> None:
    with open(file, "a", encoding="utf-8") as out:
        out.writelines(json.dumps(line) + "\n" for line in lines)


def cut_log(file: Path, position: tuple[str, int] | None) -> None:
    """Drop the lines behind a checkpoint: the resumed run writes them again."""
    text = file.read_text(encoding="utf-8", errors="replace") if position and file.exists() else ""
    order = {"": -1} | {phase: i for i, phase in enumerate(PHASES)}
    keep = []
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        if line.endswith("\n"):  # else the kill came while it was written
            try:
                record = json.loads(line)
                is_behind = (order[record["phase"]], record["step"]) > (order[position[0]], position[1])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{file} line {number} is damaged ({error!r}): delete it, and --resume goes on") from None
            if not is_behind:
                keep.append(line)
    with write_whole(file) as partial:
        partial.write_text("".join(keep), encoding="utf-8")


# --- TensorBoard ------------------------------------------------------------------------------------------------------


def open_board(out: Path):
    """A SummaryWriter that has written what metrics.jsonl holds. In a resumed run these are the steps up to its checkpoint, so
    every step is there once, also when an earlier part of the run has not asked for TensorBoard."""
    from torch.utils.tensorboard import SummaryWriter

    # purge_step: TensorBoard, one that is open already too, forgets what earlier files say of these steps. The files stay: of
    # one that is deleted under it, it never sees the successor.
    board = SummaryWriter(str(out / "tensorboard"), purge_step=0)
    with open(out / "metrics.jsonl", encoding="utf-8") as lines:
        for line in lines:
            write_scalars(board, json.loads(line))
    board.flush()
    return board


def write_scalars(board, line: dict) -> None:
    for tag, value in scalars_of(line).items():
        board.add_scalar(tag, value, line["step"])


def scalars_of(line: dict) -> dict[str, float]:
    """The numbers of a line of metrics.jsonl by their tags: its phase, then the name. What is null there is left out.

    >>> scalars_of({"phase": "grpo", "step": 3, "reward": 1.5, "grad_norm": None, "evaluation": {"grounding/mIoU": 0.5}})
    {'grpo/reward': 1.5, 'grpo/evaluation/grounding/mIoU': 0.5}
    """
    numbers = {}
    for name, value in line.items():
        numbers |= {f"{name}/{key}": part for key, part in value.items()} if isinstance(value, dict) else {name: value}
    return {f"{line['phase']}/{name}": value for name, value in numbers.items()
            if name != "step" and isinstance(value, (int, float))}


# --- what is written down of a step -----------------------------------------------------------------------------------


class Clock:
    """Seconds of a step by phase: `clock("sample")` says that what follows until the next call is sampling."""

    def __init__(self, world: World, title: str):
        self.world, self.title = world, title
        self.seconds: Counter = Counter()
        self.phase, self.since = None, time.time()
        world.phase(title)

    def __call__(self, phase: str | None) -> None:
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()  # a GPU works on when Python has gone on: its time would land in the next phase
        now = time.time()
        if self.phase:
            self.seconds[self.phase] += now - self.since
        if phase:
            self.world.phase(f"{self.title}: {phase}")
        self.phase, self.since = phase, now

    def stop(self) -> None:
        self(None)

    def share(self, phase: str) -> float:
        """Of all that was measured."""
        return round(self.seconds[phase] / max(sum(self.seconds.values()), 1e-9), 4)

    def rounded(self) -> dict[str, float]:
        return {name: round(value, 4) for name, value in self.seconds.items()}


def finite(value):
    """JSON has no nan: None in its place."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def describe(world: World, sampled) -> dict:
    """Means over the completions of all ranks: the reward, each part over the tasks that have it, length, truncation."""
    sums: Counter = Counter()
    for group in sampled.groups + sampled.replaced:
        for score, reason in zip(group.scores, group.reasons):
            sums["reward"] += score.total
            sums["truncated"] += reason == "truncated"
            for name, value in score.parts.items():
                sums[name] += value
                sums[f"n/{name}"] += 1
        sums["completions"] += len(group.texts)
        sums["tokens"] += group.num_tokens
    sums |= {"groups": len(sampled.groups), "dead_groups": sum(not group.is_live for group in sampled.groups),
             "unreadable": sampled.unreadable}
    names = ["reward", "truncated", "completions", "tokens", "groups", "dead_groups", "unreadable"]
    names += [name for part in PARTS for name in (part, f"n/{part}")]
    sums = dict(zip(names, world.all_reduce_sum(*(float(sums[name]) for name in names))))
    completions = max(sums["completions"], 1)
    return {"reward": sums["reward"] / completions,
            **{part: sums[part] / sums[f"n/{part}"] for part in PARTS if sums[f"n/{part}"]},
            "length": sums["tokens"] / completions, "sampled": int(sums["tokens"]), "truncated": int(sums["truncated"]),
            "groups": int(sums["groups"]), "dead_groups": int(sums["dead_groups"]), "unreadable": int(sums["unreadable"]),
            "resampled": sampled.resampled}


def means_of_sums(world: World, stats: Counter) -> dict[str, float]:
    """What `grpo.accumulate_gradients` adds up over this rank's tokens, as means over all ranks' tokens."""
    names = ["loss", "tokens", "kl_sum", "ratio_sum", "clipped_tokens", "entropy_sum", "has_entropy"]
    stats = {**stats, "has_entropy": "entropy_sum" in stats}
    sums = dict(zip(names, world.all_reduce_sum(*(float(stats.get(name, 0)) for name in names))))
    tokens = max(sums["tokens"], 1)
    entropy = {"entropy": sums["entropy_sum"] / tokens} if sums["has_entropy"] else {}
    return {"loss": sums["loss"], "kl": sums["kl_sum"] / tokens, "clip_fraction": sums["clipped_tokens"] / tokens,
            "ratio": sums["ratio_sum"] / tokens, **entropy}


def logp_gaps(world: World, groups: list) -> dict[str, float]:
    """How far log-probabilities when scored, before any update, are from those when sampled: both mean the same policy."""
    total, count, largest = 0.0, 0, 0.0
    for group in groups:
        if group.old_logps is not None:  # a group without spread was not scored
            gap = torch.where(group.mask, group.old_logps - group.sampled_logps, 0.0).abs()  # (G, C)
            total, count, largest = total + float(gap.sum()), count + group.num_tokens, max(largest, float(gap.max()))
    total, count = world.all_reduce_sum(total, count)
    return {"logp_gap_mean": total / max(count, 1), "logp_gap_max": world.all_reduce_max(largest)[0]}


def records_of(group, step: int) -> list[dict]:
    """Lines of completions.jsonl: what was said, what it was worth, and how it compared to its siblings."""
    return [{"phase": "grpo", "step": step, "id": group.prompt.sample["id"], "completion": text, "reward": score.total,
             "parts": score.parts, "reason": reason, "advantage": round(float(advantage), 6)}
            for text, score, reason, advantage in zip(group.texts, group.scores, group.reasons, group.advantages)]


LEGEND = """\
Each line below is a step of GRPO: means over all completions of the reward and its parts; kl: how far the policy is from where
GRPO began; dead: groups whose completions got equal rewards, which teach nothing; truncated: completions cut at
--max_new_tokens; length in tokens; grad: norm of the gradient; gap: largest difference of a log-probability when sampled and
when scored, rounding alone; then seconds: wait for videos, sample, sync with other processes, score and learn, step of the
optimiser. docs/log.md says what is healthy"""


def log_line(line: dict, steps: int) -> str:
    parts = " ".join(f"{n} {line[n]:.3f}" for n in PARTS if n in line)
    spent = " ".join(f"{name} {value:.2f}" for name, value in line["seconds"].items())
    return (f"step {line['step']}/{steps} reward {line['reward']:.3f} {parts} kl {line['kl']:.3f} "
            f"dead {line['dead_groups']}/{line['groups']} truncated {line['truncated']} length {line['length']:.1f} "
            f"grad {math.nan if line['grad_norm'] is None else line['grad_norm']:.2f} gap {line['logp_gap_max']:.0e} | {spent} s, "
            f"waiting for videos {line['wait_share']:.0%}, {line['sampled_per_second']:.0f} tokens/s sampled")


def warn_of_gap(line: dict, device: torch.device) -> None:
    """Sampling and scoring must mean the same policy. In bfloat16 single tokens differ by rounding; the mean does not."""
    limit = 0.05 if device.type == "cuda" else 1e-4
    if line["logp_gap_mean"] > limit:
        tqdm.write(f"warning: log-probabilities when sampled and when scored differ by {line['logp_gap_mean']:.1e} on "
                   f"average, more than {limit:g}: a position, mask or temperature is not the same in both")
