"""One process or many: the few things that know how many GPUs there are.

`torchrun --nproc_per_node=N train.py` starts N copies of the same program, and every copy takes its share of each
step's questions. There are two ways to hold the model, with one and the same training loop:

    replicated   every process has all of it; `sum_gradients` adds the gradients, all take the same optimiser step
    sharded      every process has 1/N of the weights, gradients and optimiser state (`shard`: FSDP2, PyTorch's
                 `fully_shard`). A layer is gathered just before it is used and forgotten behind it; its gradient is
                 summed and dealt out as the backward pass leaves it. While sampling, all is gathered (`gathered`).

Random numbers depend on the seed, the step and the question, never on the rank: the number of processes, and sharding,
change the speed and the memory of a run and not its result.

Every collective call is made by every rank, whatever happened to its share, or all would wait for ever. Between the
calls below that is easy to see. Inside a sharded model every pass is a chain of such calls, so all ranks make equally
many passes through the same parts: `even_out` adds passes of weight zero. Should a rank be lost nevertheless, `Watch`
says who waits for whom and ends the run.

Left out on purpose: tensor, pipeline and sequence parallelism; replicas of sharded groups (one mesh spans all ranks).
"""

import os
import shutil
import sys
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard,
                                    register_fsdp_forward_method)
from torch.distributed.tensor import DTensor

from data import Prompt

warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")  # one process


@dataclass(frozen=True)
class World:
    """Who am I among how many, and on which device."""

    rank: int
    size: int
    device: torch.device
    watch: "Watch | None" = None  # None where there is nobody to wait for

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def phase(self, name: str) -> None:
        """Say what this process does from now on; the others read it when they have waited too long."""
        if self.watch:
            self.watch.enter(name)

    def waiting(self):
        """A context in which this process may have to wait for others: it ends the run when that takes too long."""
        return self.watch.waiting() if self.watch else nullcontext()

    def share(self, items: list) -> list:
        """This rank's part of a list that all ranks hold: every item goes to exactly one rank."""
        return items[self.rank :: self.size]


class Watch:
    """A limit on waiting for other processes, and a message that says which of them is where.

    Without it a lost process is a run that stands still, on all GPUs, without a word. Phases lie in the key-value store
    by which the processes found each other. `seconds`: the longest wait, with what is computed in between.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, seconds: float):
        self.store, self.rank, self.size, self.seconds, self.phase = store, rank, size, seconds, "starting"
        self.enter("starting")

    def enter(self, name: str) -> None:
        self.phase = name
        self.store.set(f"phase/{self.rank}", f"{time.time():.0f} {name}")

    @contextmanager
    def waiting(self) -> Iterator[None]:
        timer = threading.Timer(self.seconds, self.give_up)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def report(self) -> str:
        lines = [self.complaint() + "; where they are:"]
        for rank in range(self.size):
            key = f"phase/{rank}"
            since, name = self.store.get(key).decode().split(" ", 1) if self.store.check([key]) else ("", "not started")
            ago = f", for {time.time() - float(since):.0f} s" if since else ""
            lines.append(f"    rank {rank}: {name!r}{ago}")
        lines.append("The rank that is in another phase, or no longer runs, is the one to look at. train.py goes on from the "
                     "newest checkpoint with --resume, and waits longer with --wait_minutes; eval.py goes on by itself.")
        return "\n".join(lines)

    def complaint(self) -> str:
        return f"rank {self.rank} has waited {self.seconds:.0f} s for other processes in {self.phase!r}"

    def give_up(self) -> None:
        """The main thread hangs inside a library call, where no exception reaches it: end the process."""
        try:
            message = self.report()
        except Exception as error:  # the store is gone with the process that held it
            message = f"{self.complaint()}, and cannot ask where they are: {error}"
        print(message, file=sys.stderr, flush=True)
        os._exit(1)


def start(device: str = "auto", wait_minutes: float = 60) -> World:
    """Join the other processes that torchrun started, if any. NCCL between GPUs, gloo between CPUs.

    A rank that waits longer than `wait_minutes` for the others ends the run (`Watch`).
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if device not in ("cpu", "cuda", "mps"):
        raise ValueError(f"--device {device}: it is auto, cuda, mps or cpu")
    if device == "cuda":
        device = f"cuda:{int(os.environ.get('LOCAL_RANK', 0))}"
        torch.cuda.set_device(device)
    if size == 1:
        return World(rank, size, torch.device(device))
    store, _, _ = next(dist.rendezvous("env://"))
    if not dist.is_initialized():
        # a minute more than ours: the library's own limits do not know what the program was doing
        join(device, store, rank, size, timedelta(minutes=wait_minutes + 1))
    watch = Watch(dist.PrefixStore("watch", store.clone()), rank, size, 60 * wait_minutes)
    return World(rank, size, torch.device(device), watch)


def join(device: str, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
    backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
    store = dist.PrefixStore("group", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


# --- numbers and gradients of all ranks -------------------------------------------------------------------------------


def total(world: World, numbers: list[float]) -> list[float]:
    """Sums over all ranks. float64 on the CPU: counts must come out exact."""
    if world.size == 1:
        return list(numbers)
    tensor = torch.tensor(numbers, dtype=torch.float64)
    with world.waiting():
        dist.all_reduce(tensor)
    return tensor.tolist()


def largest(world: World, numbers: list[float]) -> list[float]:
    """Maxima over all ranks."""
    if world.size == 1:
        return list(numbers)
    tensor = torch.tensor(numbers, dtype=torch.float64)
    with world.waiting():
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.tolist()


def gather(world: World, items: list) -> list:
    """The lists of all ranks, interleaved as `World.share` dealt them out; on every rank."""
    if world.size == 1:
        return list(items)
    lists: list = [None] * world.size
    with world.waiting():
        dist.all_gather_object(lists, items)
    longest = max(len(x) for x in lists)
    return [x[i] for i in range(longest) for x in lists if i < len(x)]


def wait_for_all(world: World) -> None:
    if world.size > 1:
        total(world, [0.0])  # over the CPUs: it waits for the processes, not for what they have queued on GPUs


def sum_gradients(world: World, parameters: Iterable[torch.nn.Parameter]) -> None:
    """Add the gradients of all ranks; FSDP has done it for those of a sharded model.

    A sum, not a mean: the loss already has the denominator of the whole step.

    A rank whose groups were all dropped has no gradients: it adds zeros, so that the calls below are made by everybody.
    What no rank has a gradient for (a vision tower in a batch of text) stays without: zeros would let momentum move it.
    """
    parameters = [p for p in parameters if p.requires_grad and not isinstance(p, DTensor)]
    if world.size == 1 or not parameters:
        return
    has_gradient = largest(world, [float(p.grad is not None) for p in parameters])
    parameters = [p for p, known in zip(parameters, has_gradient) if known]
    for bucket in buckets(parameters, most=2**27):  # 512 MB at a time: the copy below must not double the gradients
        flat = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in bucket])
        with world.waiting():
            dist.all_reduce(flat)
        for p, grad in zip(bucket, flat.split([p.numel() for p in bucket])):
            p.grad = grad.view_as(p)


def buckets(parameters: list[torch.nn.Parameter], most: int) -> list[list[torch.nn.Parameter]]:
    """Consecutive parameters with at most `most` numbers together; a larger one is alone."""
    groups: list[list] = [[]]
    for p in parameters:
        if groups[-1] and sum(q.numel() for q in groups[-1]) + p.numel() > most:
            groups.append([])
        groups[-1].append(p)
    return [group for group in groups if group]


def clip_gradients(world: World, parameters: list[torch.nn.Parameter], longest: float) -> float:
    """Shorten the gradient to `longest` where it is longer; returns its length before, that of all shards together."""
    if not any(isinstance(p, DTensor) for p in parameters):
        return float(torch.nn.utils.clip_grad_norm_(parameters, longest))
    mine = [p.grad.to_local() for p in parameters if p.grad is not None]
    (square,) = total(world, [float(torch.nn.utils.get_total_norm(mine)) ** 2])
    norm = square**0.5
    for grad in mine:
        grad.mul_(min(1.0, longest / (norm + 1e-6)))  # the formula of clip_grad_norm_
    return norm


# --- sharding ---------------------------------------------------------------------------------------------------------

BYTES_A_PARAMETER = 18  # float32 weight 4, gradient 4, AdamW 8; bfloat16 reference 2


def worth_sharding(choice: str, offload: bool, world: World, num_parameters: int, memory: float | None = None) -> bool:
    """What `--shard` on, off or auto means here; auto never shards on one GPU, where it saves nothing, or on CPUs.

    `memory`: bytes of one GPU; None asks the one that is here. tools.plan knows none and says what it plans for."""
    if choice != "auto" or offload:
        return choice == "on" or offload
    if world.size == 1 or world.device.type != "cuda":
        return False
    if memory is None:
        memory = torch.cuda.get_device_properties(world.device).total_memory
    return BYTES_A_PARAMETER * num_parameters > memory / 2  # the other half is for activations and keys and values


def shard(world: World, model, *, offload: bool = False) -> None:
    """Leave 1/N of `model` (model.VideoLM) on each of N ranks, by FSDP2. `offload`: on its CPU, with the optimiser.

    Decoder layers and vision blocks are gathered one at a time. What lies between them (embeddings, head, norms,
    merger) is called outside any forward method that FSDP knows; so `hf.inside(work)` is made one, which gathers those,
    runs `work`, and sees to their gradients. Weights are float32; on a GPU, what is gathered is bfloat16. Every rank
    has loaded the whole checkpoint and keeps its part of it.
    """
    if world.device.type == "mps":
        raise ValueError("--shard on: FSDP has no Apple GPUs; use --device cpu, or --shard off")
    if not dist.is_initialized():  # one process, for the sake of `offload`
        join(world.device.type, dist.HashStore(), 0, 1, timedelta(minutes=60))
    hf, on_gpu = model.hf, world.device.type == "cuda"
    settings = {"mesh": init_device_mesh(world.device.type, (world.size,))}
    if on_gpu:
        settings["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    if offload:
        settings["offload_policy"] = CPUOffloadPolicy(pin_memory=on_gpu)
    for part in (*model.visual.blocks, *model.text.layers, hf):
        fully_shard(part, **settings)
        # a sum, not a mean: the loss has the denominator of all ranks; gloo knows no other sum than the plain one
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)
    hf.inside = lambda work: [out.clone() for out in work()]  # FSDP hangs its work on what is returned: views lose it
    register_fsdp_forward_method(hf, "inside")
    model.is_sharded = True
    model.inside, model.even_out = partial(run_inside, hf), partial(even_out, world, model)
    with torch.no_grad(), world.waiting():
        model.inside(list)  # no pass at all; FSDP takes the first module that runs for the root of all


def run_inside(hf, work: Callable[[], list[Tensor]]) -> list[Tensor]:
    out = hf.inside(work)
    if not torch.is_grad_enabled():
        # FSDP notes the order of layers for a backward pass; without one the notes pile up, and the root stays gathered
        hf.reset_iter_state()
    return out


@contextmanager
def gathered(world: World, model) -> Iterator[None]:
    """All weights in one place for as long as this lasts: one gathering for a whole rollout, not one for each token.

    Inside, a model that was sharded makes no collective call, so ranks may run as many passes as they like. Without
    gradients only: what an optimiser knows are the shards. No effect on a model that is not sharded.
    """
    parts = [part for part in model.hf.modules() if isinstance(part, FSDPModule)]
    hooks = [(part._forward_pre_hooks, part._forward_hooks) for part in parts]
    with world.waiting():
        for part in parts:
            part.unshard()
            # FSDP's hooks would find nothing to do, for every layer and token; and they note each call as one that a
            # backward pass will follow, and would prefetch by these notes, on each rank by its own: a hang
            part._forward_pre_hooks, part._forward_hooks = OrderedDict(), OrderedDict()
        if world.device.type == "cuda":
            torch.cuda.synchronize()  # the gathering is only queued: wait for the other ranks here, where the watch is on
    try:
        yield
    finally:
        for part, (before, behind) in zip(parts, hooks):
            part._forward_pre_hooks, part._forward_hooks = before, behind
            part.reshard()


def even_out(world: World, model, packs: list[list], idle: Callable[[Prompt], object],
             videos: bool = True) -> list[list]:
    """As many packs on every rank, and a video in each of them if any rank has one: the same calls on all ranks.

    `packs`: lists of things that have a `prompt` (data.Prompt), each list one pass through the model. `idle` makes such
    a thing of weight zero out of a prompt. `videos=False`: the vision tower is not used in these passes.
    """
    has_video = [[item.prompt.patches is not None for item in pack] for pack in packs]
    passes, videos = largest(world, [len(packs), float(videos and any(map(any, has_video)))])
    packs = [[*pack] for pack in packs] + [[] for _ in range(int(passes) - len(packs))]
    for pack in packs:
        if not pack or (videos and all(item.prompt.patches is None for item in pack)):
            pack.append(idle(idle_prompt(model, bool(videos))))
    return packs


def idle_prompt(model, video: bool) -> Prompt:
    """The shortest prompt there is: one token, which with `video` stands for a black frame of four patches."""
    ids = torch.tensor([model.video_token_id if video else model.tokenizer.eos_token_id])
    patches, grid = (torch.zeros(4, 1176), (1, 2, 2)) if video else (None, None)
    return Prompt({"id": "idle"}, ids, patches, grid, torch.zeros(3, 1, dtype=torch.long), 1.0)


def full_weights(world: World, model) -> dict[str, Tensor] | None:
    """The weights of a sharded model by name, whole, on the first rank's CPU; {} on the others. None if not sharded."""
    if not isinstance(model.hf, FSDPModule):
        return None
    weights = {}
    with world.waiting():
        for name, p in model.hf.named_parameters():  # one at a time: no GPU needs room for all of them
            whole = p.detach().to(world.device).full_tensor()  # offloaded shards meet where the others are
            if world.is_first:
                weights[name] = whole.cpu()
    return weights


# --- checkpoints ------------------------------------------------------------------------------------------------------


def training_state(model, optimizer: torch.optim.Optimizer, **numbers: float) -> dict[str, Tensor]:
    """What a checkpoint holds, by name: weights that are trained, their averages and `numbers`. Nothing is copied.

    Names, not positions: a sharded run reads what a replicated one has written, on any number of ranks.
    """
    trained = {p for group in optimizer.param_groups for p in group["params"]}
    names = {p: name for name, p in model.hf.named_parameters() if p in trained}
    state = {f"model/{name}": p.detach() for p, name in names.items()}
    for p, averages in optimizer.state.items():
        state |= {f"optimizer/{names[p]}/{average}": value for average, value in averages.items()}
    return state | {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()}


def save_checkpoint(world: World, folder: Path, state: dict[str, Tensor], alone: bool = False) -> None:
    """Write `state`, each rank its part of it, under another name first: what has its final name is complete.

    Called on all ranks, or `alone` by one that holds all of it (a replicated model) and can no longer wait for the
    others. OSError, on all ranks, when one of them cannot write; what was saved before stays.
    """
    partial_folder = folder.with_name(f"partial-{folder.name}" + (f"-rank{world.rank}" if alone else ""))
    if world.is_first and not alone:
        for left in folder.parent.glob("partial-checkpoint-*"):  # of a run that was killed while it saved
            shutil.rmtree(left)
    if not alone:
        wait_for_all(world)
    with nullcontext() if alone else world.waiting():
        try:
            dcp.save(state, checkpoint_id=partial_folder, no_dist=alone)
        except CheckpointException as error:
            reasons = "; ".join(f"rank {rank}: {failure[0]}" for rank, failure in error.failures.items())
            free = shutil.disk_usage(folder.parent).free / 1e9
            raise OSError(f"{folder} could not be written, with {free:.1f} GB free ({reasons}). Earlier checkpoints "
                          "are whole: make room, then go on with --resume") from error
    if alone and (folder / ".metadata").exists():  # another rank was faster
        shutil.rmtree(partial_folder)
    elif world.is_first or alone:
        shutil.rmtree(folder, ignore_errors=True)  # of this name, and not complete, or the run had gone on from it
        partial_folder.rename(folder)
    if not alone:
        wait_for_all(world)


def newest_checkpoint(out: Path) -> Path | None:
    """Names carry phase and step with leading zeros, phases in the order of their names' first digit."""
    if old := sorted(out.glob("checkpoint-*/state.pt")):
        raise ValueError(f"{old[-1]} was written by an earlier version of this code, which can finish that run; this "
                         "one reads folders of torch.distributed.checkpoint")
    found = sorted(out.glob("checkpoint-*/.metadata"))
    return found[-1].parent if found else None


def names_in(folder: Path) -> list[str]:
    """Of what a checkpoint holds."""
    return list(dcp.FileSystemReader(folder).read_metadata().state_dict_metadata)


def load_checkpoint(folder: Path, model, optimizer: torch.optim.Optimizer, **numbers: float) -> dict[str, float]:
    """Weights and averages from `folder` into model and optimiser, and the saved values of `numbers`. On all ranks.

    ValueError where what was trained is not what `optimizer` trains: with or without LoRA, or the vision tower.
    """
    parameters, saved = dict(model.hf.named_parameters()), names_in(folder)
    here = {name for name in training_state(model, optimizer) if name.startswith("model/")}
    there = {name for name in saved if name.startswith("model/")}
    if here != there:
        name = min(here - there or there - here).removeprefix("model/")
        raise ValueError(f"{folder} does not hold what is trained now, and that only: {name}, for one; resume with the "
                         "settings of the run, or name another --out")
    for name in saved:
        kind, _, rest = name.partition("/")
        parameter, _, average = rest.partition("/")
        if kind == "optimizer":  # make room: loading fills tensors that exist
            p = parameters[parameter]
            # the fused AdamW counts its steps where the parameter is, the others on the CPU
            room = torch.zeros((), device=p.device if optimizer.defaults.get("fused") else "cpu")
            optimizer.state[p][average] = room if average == "step" else torch.zeros_like(p)
    state = training_state(model, optimizer, **numbers)
    dcp.load(state, checkpoint_id=folder)
    return {name: float(state[name]) for name in numbers}
