"""One process or many: the few things that know how many there are.

`torchrun --nproc_per_node=N train.py` starts N copies of the same program, and every copy takes its share of each
step's questions. The model is either replicated (every process has all of it; `sum_gradients` adds the gradients, and
all take the same optimiser step) or sharded (lib/sharding.py). The training loop is the same.

Random numbers depend on the seed, the step and the question's place in the stream, never on the rank: the number of
processes changes the speed and the memory of a run and not its result.

Every collective call is made by every rank, whatever happened to its share, or all would wait for ever. Should a rank
be lost nevertheless, `Watch` says who waits for whom and ends the run.

Left out on purpose: tensor, pipeline and sequence parallelism.
"""

import os
import sys
import threading
import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")  # one process


@dataclass(frozen=True)
class World:
    """Who am I among how many, on which device; and what all of them find out together."""

    rank: int
    size: int
    device: torch.device
    watch: "Watch | None" = None  # None where there is nobody to wait for

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def phase(self, name: str) -> None:
        """Say what this process does from now on. One that stays in a phase too long ends the run (`Watch`)."""
        if self.watch:
            self.watch.enter(name)

    def share(self, items: list) -> list:
        """This rank's part of a list that all ranks hold: every item goes to exactly one rank."""
        return items[self.rank :: self.size]

    def all_reduce_sum(self, *numbers: float) -> list[float]:
        """Sums over all ranks. float64 on the CPU: counts must come out exact."""
        return self._all_reduce(numbers, dist.ReduceOp.SUM)

    def all_reduce_max(self, *numbers: float) -> list[float]:
        return self._all_reduce(numbers, dist.ReduceOp.MAX)

    def _all_reduce(self, numbers: tuple[float, ...], operation: dist.ReduceOp) -> list[float]:
        if self.size == 1:
            return list(numbers)
        tensor = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(tensor, op=operation)
        return tensor.tolist()

    def all_gather(self, items: list) -> list:
        """The lists of all ranks, interleaved as `share` dealt them out; on every rank."""
        if self.size == 1:
            return list(items)
        lists: list = [None] * self.size
        dist.all_gather_object(lists, items)
        longest = max(len(x) for x in lists)
        return [x[i] for i in range(longest) for x in lists if i < len(x)]

    def sync(self) -> None:
        """Wait for all processes: over the CPUs, so not for what they have queued on their GPUs."""
        self.all_reduce_sum(0.0)


class Watch:
    """A limit on how long a phase may take, and a message that says which process is where.

    Without it a lost process is a run that stands still, on all GPUs, without a word. A thread looks at how long this
    process has been in its phase. The phases of all lie in the key-value store by which the processes found each other.
    `seconds`: the longest phase, computing and waiting together.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, seconds: float):
        self.store, self.rank, self.size, self.seconds = store, rank, size, seconds
        self.is_over = threading.Event()
        self.enter("starting")
        self.thread = threading.Thread(target=self._look, daemon=True)
        self.thread.start()

    def enter(self, name: str) -> None:
        self.phase, self.since = name, time.time()
        self.store.set(f"phase/{self.rank}", f"{self.since:.0f} {name}")

    def stop(self) -> None:
        self.is_over.set()
        self.thread.join(5)  # a thread that is left running while the interpreter ends may abort the process

    def _look(self) -> None:
        while not self.is_over.wait(min(1.0, self.seconds / 4)):
            if time.time() - self.since > self.seconds:
                self.give_up()

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
        return f"rank {self.rank} has been in {self.phase!r} for more than {self.seconds:g} s, at work or waiting for others"

    def give_up(self) -> None:
        """The main thread may hang inside a library call, where no exception reaches it: end the process."""
        try:
            message = self.report()
        except Exception as error:  # the store is gone with the process that held it
            message = f"{self.complaint()}, and cannot ask where they are: {error}"
        print(message, file=sys.stderr, flush=True)
        os._exit(1)


def start(device: str = "auto", wait_minutes: float = 60) -> World:
    """Join the other processes that torchrun started, if any. NCCL between GPUs, gloo between CPUs.

    A rank that stays in a phase for longer than `wait_minutes` ends the run (`Watch`).
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if device not in ("cpu", "cuda", "mps"):
        raise ValueError(f"--device {device}: it is auto, cuda, mps or cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch sees no CUDA GPU here; leave it out, or take --device cpu")
    if device == "mps" and not torch.backends.mps.is_available():
        raise ValueError("--device mps: PyTorch sees no Apple GPU here; leave it out, or take --device cpu")
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


def stop(world: World) -> None:
    if world.watch:
        world.watch.stop()
    if dist.is_initialized():
        dist.destroy_process_group()


# --- gradients of all ranks -------------------------------------------------------------------------------------------


def sum_gradients(world: World, parameters: Iterable[torch.nn.Parameter]) -> None:
    """Add the gradients of all ranks; FSDP has done it for those of a sharded model.

    A sum, not a mean: the loss already has the denominator of the whole step.

    A rank whose groups were all dropped has no gradients: it adds zeros, so that the calls below are made by everybody.
    What no rank has a gradient for (a vision tower in a batch of text) stays without: zeros would let momentum move it.
    """
    parameters = [p for p in parameters if p.requires_grad and not isinstance(p, DTensor)]
    if world.size == 1 or not parameters:
        return
    has_gradient = world.all_reduce_max(*(float(p.grad is not None) for p in parameters))
    parameters = [p for p, known in zip(parameters, has_gradient) if known]
    for bucket in buckets(parameters, most=2**27):  # 512 MB at a time: the copy below must not double the gradients
        flat = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in bucket])
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


def clip_gradients(world: World, parameters: list[torch.nn.Parameter], max_norm: float) -> float:
    """Shorten the gradient to `max_norm` where it is longer; returns its norm before, that of all shards together."""
    if not any(isinstance(p, DTensor) for p in parameters):
        return float(torch.nn.utils.clip_grad_norm_(parameters, max_norm))
    mine = [p.grad.to_local() for p in parameters if p.grad is not None]
    (square,) = world.all_reduce_sum(float(torch.nn.utils.get_total_norm(mine)) ** 2)
    norm = square**0.5
    for grad in mine:
        grad.mul_(min(1.0, max_norm / (norm + 1e-6)))  # the formula of clip_grad_norm_
    return norm
