"""Files that are whole or not there: written under another name beside the place, then renamed."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def write_whole(path: str | Path) -> Iterator[Path]:
    """A path to write to, a file or a folder; what is there at the end takes the name `path`, in place of what had it.

    When the writing fails, what was written goes and what had the name before stays.
    """
    path = Path(path)
    partial, replaced = path.with_name(f"partial-{path.name}"), path.with_name(f"replaced-{path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in (partial, replaced):  # of a process that was killed
        remove(left)
    try:
        yield partial
    except BaseException:
        remove(partial)
        raise
    if path.is_dir():  # a folder takes no other's place in one go
        path.rename(replaced)
    partial.replace(path)
    remove(replaced)


def remove(path: Path) -> None:
    """A file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
