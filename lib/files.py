"""Files that are whole or not there: written under another name beside the place, then renamed. And files that one holds."""

import json
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

PARTIAL, REPLACED = "partial-", "replaced-"  # what a killed process may leave behind begins so


@contextmanager
def write_whole(path: str | Path) -> Iterator[Path]:
    """A path to write to, a file or a folder; what is there at the end takes the name `path`, in place of what had it.

    When the writing fails, what was written goes and what had the name before stays. Several processes and threads may
    write the same path: the last one to finish keeps it.
    """
    path, own = Path(path), f"{os.getpid()}-{threading.get_ident()}-"
    partial, replaced = (path.with_name(f"{prefix}{own}{path.name}") for prefix in (PARTIAL, REPLACED))
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        if path.is_dir():
            if not partial.is_dir():
                raise IsADirectoryError(f"{path} is a folder; a file of this name would take its place")
            path.rename(replaced)  # a folder takes no other's place in one go
        try:
            partial.replace(path)
        except OSError:
            if replaced.exists():  # what had the name gets it back
                replaced.rename(path)
            raise
    finally:
        remove(partial)
    remove(replaced)


def clear_leftovers(folder: Path) -> None:
    """What a killed process has left in its own folder: half-written files and folders go. One that was just being
    replaced gets its name back, if nothing has it yet."""
    for left in folder.glob(f"{REPLACED}*"):
        name = left.name.removeprefix(REPLACED).split("-", 2)[2]
        if not (folder / name).exists():
            left.rename(folder / name)
    for left in (*folder.glob(f"{PARTIAL}*"), *folder.glob(f"{REPLACED}*")):
        remove(left)


def remove(path: Path) -> None:
    """A file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def read_json(file: Path) -> dict:
    """The object in `file`. ValueError that names the file, where a crash of the machine has torn it."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
        problem = "" if isinstance(value, dict) else "no object in braces"
    except ValueError as error:  # no JSON, or no UTF-8
        problem = str(error)
    if problem:
        raise ValueError(f"{file} is damaged ({problem}): put back a copy of it, or start again (--overwrite, or another --out)")
    return value


def hold(file: Path, alone: bool) -> TextIO:
    """`file`, held until it is closed or this process ends, in whatever way: the kernel lets go of it. `alone`, or together
    with others that hold it so. BlockingIOError where somebody else's hold does not allow it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    held = open(file, "a+", encoding="utf-8")
    try:
        change_hold(held, alone)
    except BlockingIOError:
        held.close()
        raise
    return held


def change_hold(held: TextIO, alone: bool) -> None:
    """A file system that knows no locks holds nothing, and refuses nobody."""
    try:
        if fcntl:
            fcntl.flock(held, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        pass
