"""One process or many: the few things that know how many GPUs there are.

`torchrun --nproc_per_node=N train.py` starts N copies of the same program. Every copy holds the whole model and takes its
share of each step's questions; gradients are summed, so that all copies take the same optimiser step. Nothing else is
shared: random numbers depend on the seed, the step and the question, never on the rank, so the number of processes
changes the speed of a run and not its result.

Every collective call below is made by every rank, whatever happened to its share: no rank waits for another for ever.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class World:
    """Who am I among how many, and on which device."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, items: list) -> list:
        """This rank's part of a list that all ranks hold: every item goes to exactly one rank."""
        return items[self.rank :: self.size]


def start(device: str = "auto", timeout_minutes: float = 60) -> World:
    """Join the other processes that torchrun started, if any. NCCL between GPUs, gloo between CPUs."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if device not in ("cpu", "cuda", "mps"):
        raise ValueError(f"--device {device}: it is auto, cuda, mps or cpu")
    if device == "cuda":
        device = f"cuda:{int(os.environ.get('LOCAL_RANK', 0))}"
        torch.cuda.set_device(device)
    if size > 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=timeout_minutes))
    return World(rank, size, torch.device(device))


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def total(world: World, numbers: list[float]) -> list[float]:
    """Sums over all ranks. float64 on the CPU: counts must come out exact."""
    if world.size == 1:
        return list(numbers)
    tensor = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(tensor)
    return tensor.tolist()


def largest(world: World, numbers: list[float]) -> list[float]:
    """Maxima over all ranks."""
    if world.size == 1:
        return list(numbers)
    tensor = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.tolist()


def gather(world: World, items: list) -> list:
    """The lists of all ranks, interleaved as `World.share` dealt them out; on every rank."""
    if world.size == 1:
        return list(items)
    lists: list = [None] * world.size
    dist.all_gather_object(lists, items)
    longest = max(len(x) for x in lists)
    return [x[i] for i in range(longest) for x in lists if i < len(x)]


def wait_for_all(world: World) -> None:
    if world.size > 1:
        dist.barrier()


def sum_gradients(world: World, parameters: Iterable[torch.nn.Parameter]) -> None:
    """Add the gradients of all ranks. A sum, not a mean: the loss already has the denominator of the whole step.

    A rank whose groups were all dropped has no gradients: it adds zeros, so that the calls below are made by everybody.
    What no rank has a gradient for (a vision tower in a batch of text) stays without: zeros would let momentum move it.
    """
    if world.size == 1:
        return
    parameters = [p for p in parameters if p.requires_grad]
    has_gradient = largest(world, [float(p.grad is not None) for p in parameters])
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


# --- checkpoints ------------------------------------------------------------------------------------------------------


def save_checkpoint(folder: Path, state: dict) -> None:
    """Write `folder`/state.pt under another name first: what exists under its final name is complete."""
    partial = folder.with_name(f"partial-{folder.name}")
    partial.mkdir(parents=True, exist_ok=True)
    torch.save(state, partial / "state.pt")
    partial.rename(folder)


def newest_checkpoint(out: Path) -> Path | None:
    """Names carry phase and step with leading zeros, phases in the order of their names' first digit."""
    found = sorted(out.glob("checkpoint-*/state.pt"))
    return found[-1].parent if found else None


def load_checkpoint(folder: Path) -> dict:
    return torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
