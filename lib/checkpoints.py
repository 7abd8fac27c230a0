"""Checkpoints by `torch.distributed.checkpoint`: what a run needs to go on, written by any number of processes, read by any.

A folder `checkpoint-PHASE-STEP` under its final name is complete.
"""

import shutil
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from lib.distributed import World


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
        world.sync()
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
        world.sync()


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
