"""Checkpoints by `torch.distributed.checkpoint`: what a run needs to go on, written by any number of processes, read by any.

A folder `checkpoint-PHASE-STEP` under its final name is complete, as far as this code can help it: one that a crash of the
machine, or a copy, has torn is named and passed over. A checkpoint may come from a stranger, so nothing in it is run.
"""

import pickle
import shutil
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

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
        for reason, _ in error.failures.values():
            if not isinstance(reason, Exception):  # Ctrl-C, which the library has caught: no fault of the disk
                raise reason from None
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


# --- which of them can be read ----------------------------------------------------------------------------------------

# All that the table of contents (.metadata) of a checkpoint is made of. It is a pickle, and a pickle calls what it names:
# `os.system` in the folder of a stranger would be run by --resume.
KNOWN = {("torch", "Size"), ("torch.serialization", "_get_layout"), ("pathlib", "PosixPath"), ("pathlib", "WindowsPath"),
         ("pathlib._local", "PosixPath"), ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
         *(("torch", str(kind).removeprefix("torch.")) for kind in vars(torch).values() if isinstance(kind, torch.dtype)),
         *(("torch.distributed.checkpoint.metadata", name) for name in (
             "Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
             "_MEM_FORMAT_ENCODING"))}


class _TableReader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in KNOWN:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint does")
        return super().find_class(module, name)


class Reader(dcp.FileSystemReader):
    """Reads checkpoints without running anything in them: the library reads the numbers with `weights_only`, and the table
    of contents without."""

    def read_metadata(self, *args, **named) -> Metadata:
        with open(self.path / ".metadata", "rb") as file:
            metadata = _TableReader(file).load()
        for name, entry in metadata.state_dict_metadata.items():
            if not isinstance(entry, TensorStorageMetadata):  # the library would unpickle it
                raise pickle.UnpicklingError(f"{name} is no tensor")
        metadata.storage_meta.load_id = self.load_id
        return metadata


def find_damage(folder: Path) -> str:
    """What is wrong with a checkpoint, in words that name the file; "" where nothing is missing."""
    try:
        parts = Reader(folder).read_metadata().storage_data.values()
        ends = {part.relative_path: 0 for part in parts}
        for part in parts:
            ends[part.relative_path] = max(ends[part.relative_path], part.offset + part.length)
    except Exception as error:  # torn bytes may mean anything to pickle
        return f"{folder / '.metadata'} cannot be read ({error})"
    for name, end in ends.items():
        size = (folder / name).stat().st_size if (folder / name).exists() else 0
        if size < end:
            return f"{folder / name} has {size} bytes of {end}"
    return ""


def find_checkpoints(out: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, and what is wrong with newer ones. Names carry phase and step with leading
    zeros, phases in the order of their names' first digit. ValueError where there are some and none is whole."""
    if old := sorted(out.glob("checkpoint-*/state.pt")):
        raise ValueError(f"{old[-1]} was written by an earlier version of this code, which can finish that run; this "
                         "one reads folders of torch.distributed.checkpoint")
    problems: list[str] = []
    for table in sorted(out.glob("checkpoint-*/.metadata"), reverse=True):
        problem = find_damage(table.parent)
        if not problem:
            return table.parent, problems
        problems.append(problem)
    if problems:
        raise ValueError(f"no checkpoint is whole: {'; '.join(problems)}. Put back a copy, or start again (--overwrite, or "
                         "another --out)")
    return None, []


def newest_checkpoint(out: Path) -> Path | None:
    return find_checkpoints(out)[0]


def names_in(folder: Path) -> list[str]:
    """Of what a checkpoint holds."""
    return list(Reader(folder).read_metadata().state_dict_metadata)


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
    try:
        dcp.load(state, storage_reader=Reader(folder))
    except CheckpointException as error:
        # their kinds alone: the library's text advises to load what is damaged without `weights_only`
        reasons = "; ".join(f"rank {rank}: {type(failure[0]).__name__}" for rank, failure in error.failures.items())
        raise ValueError(f"{folder} is damaged ({reasons}): delete it, and --resume goes on from the one before") from error
    return {name: float(state[name]) for name in numbers}
