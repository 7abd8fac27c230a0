"""The ranks of a test: processes that find each other as those of torchrun do, forked from one that has the libraries.

A process that imports torch and transformers takes five seconds of a core before its first line; a fork of one that has
done so takes none. That one is started by the first test that needs it and knows nothing of pytest's process: a fork of
pytest itself would inherit the threads of autograd and of the decoders, which fork does not allow.
"""

import multiprocessing
import multiprocessing.forkserver
import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["pytest", "conftest", "shard_steps", "tools.evaluate"])


def start_ranks(log: Path, size: int, function: Callable, *arguments) -> list[multiprocessing.Process]:
    """`size` processes that run `function(*arguments)`, a function of a module. No agent ends one for another's failure.
    What rank r prints is in `log`/rank{r}.txt."""
    log.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"  # where the one that is forked looks for modules
    multiprocessing.forkserver.ensure_running()
    os.environ.pop("PYTHONPATH")
    if before is not None:
        os.environ["PYTHONPATH"] = before
    ranks = [CONTEXT.Process(target=_run, args=(log / f"rank{rank}.txt", rank, size, port, function, arguments), daemon=True)
             for rank in range(size)]
    for rank in ranks:
        rank.start()
    return ranks


def run_ranks(log: Path, size: int, function: Callable, *arguments, seconds: float = 120) -> None:
    """The same, to their end, which must be a good one."""
    ranks = start_ranks(log, size, function, *arguments)
    for rank in ranks:
        rank.join(seconds)
    codes = [rank.exitcode for rank in ranks]
    for rank in ranks:
        rank.kill()
    assert codes == [0] * size, f"{codes}\n" + "\n".join(read(log, rank)[-3000:] for rank in range(size))


def read(log: Path, rank: int) -> str:
    """What it has printed."""
    return (log / f"rank{rank}.txt").read_text()


def _run(log: Path, rank: int, size: int, port: int, function: Callable, arguments: tuple) -> None:
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "localhost",
                   "MASTER_PORT": str(port)}
    try:
        function(*arguments)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
