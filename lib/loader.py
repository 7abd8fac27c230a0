"""Videos decoded ahead, in worker processes of our own, while the model computes.

Real video collections hold files that make a decoder hang or crash. A hanging decoder must cost its own video a few
seconds and nothing else, so each worker is a plain child process behind two pipes: it gets one job, has a deadline, and
is killed and replaced when it misses it. (A `DataLoader` dies with its worker, and a fork may hang where a library had
threads before.) Read `_Worker.ask` first, the rest is who waits for whom:

    VideoLoader.submit(sample)  ->  a thread of DecodePool  ->  _Worker.ask  ==pipe==>  serve (python -m lib.loader)

A job is (function, path, arguments). The function travels by name, so it must be one that a module defines, and it must
return plain values; what it does with a video is its caller's business (`read_arrays` here, an inspection in
tools/check.py).

Clips are kept in memory (VideoLoader) and, where a folder is named for it, on the disk (FrameCache), for the epochs and the
runs to come.

Left out: shared memory. A clip is a few megabytes after the resize, which the worker does; as numpy arrays 12 MB of them
take 2 ms through a pipe (as tensors 97 ms).
"""

import functools
import hashlib
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import Clip, VideoSettings, picture_arguments, read_picture, read_video, video_arguments
from lib.files import PARTIAL, write_whole
from lib.readers import READER, VideoError, find_video, length_of
from lib.samples import files_of

ROOT = Path(__file__).resolve().parent.parent
STARTUP_SECONDS = 120  # to import torch, which the parent has just read from the same disk; the deadline counts from after it
STARTS = 3  # of a worker, before it is given up
CACHE_VERSION = 2  # of the frames on the disk: raise it when the same file, settings and READER give other frames
ATTEMPTS = 2  # at a file that fails: a busy disk is no bad file, and a bad file must not cost its deadline every epoch


# ---------------------------------------------------------------------------------------------------------------------
# The child's side


def serve() -> None:
    """Answer jobs from standard input on standard output until it closes; `python -m lib.loader` runs this."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not get between the answers
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers itself
    torch.set_num_threads(1)  # there are as many workers as cores
    jobs = queue.SimpleQueue()
    threading.Thread(target=_read_jobs, args=(jobs,), daemon=True).start()
    _send(answers, "ready")
    while True:
        _send(answers, run_job(*jobs.get()))


def _read_jobs(jobs: queue.SimpleQueue) -> None:
    """In a thread, so that the parent's end is seen also while a decoder hangs."""
    try:
        while True:
            jobs.put(pickle.load(sys.stdin.buffer))
    except EOFError:
        os._exit(0)
    except Exception:  # a function that is not there: say so, and do not wait for the deadline
        traceback.print_exc()
        os._exit(1)


def run_job(function: Callable, path: str, arguments: dict) -> tuple:
    """("value", what the function returns) or ("error", path, reason)."""
    try:
        return "value", function(path, **arguments)
    except VideoError as error:
        return "error", error.path, error.reason


def read_arrays(path: str, **arguments) -> tuple[np.ndarray, np.ndarray, float, bool]:
    """The clip as plain values: frames, seconds, sample_fps, is_constant."""
    clip = read_video(path, **arguments)
    return clip.frames.numpy(), clip.seconds.numpy(), clip.sample_fps, clip.is_constant


def picture_arrays(path: str, **arguments) -> tuple[np.ndarray, np.ndarray, float, bool]:
    """The same of a picture."""
    clip = read_picture(path, **arguments)
    return clip.frames.numpy(), clip.seconds.numpy(), clip.sample_fps, clip.is_constant


def _send(pipe, message: object) -> None:
    pickle.dump(message, pipe, protocol=5)
    pipe.flush()


# ---------------------------------------------------------------------------------------------------------------------
# The parent's side


class _Worker:
    """One child process and its replacement when it hangs or dies."""

    def __init__(self):
        self.lock = threading.Lock()  # between start() in a thread of the pool and close() in the caller's
        self.closed = False
        self.start()

    def start(self) -> None:
        """Returns at once; the child imports torch while others work, and says "ready" before its first job."""
        with self.lock:
            if not self.closed:
                path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
                # -P: what lies in the folder that the run was started in must not take the place of our modules
                # a session of its own: torchrun sends SIGTERM to all of a rank's session, and the rank's last step needs videos
                self.process = subprocess.Popen([sys.executable, "-P", "-m", "lib.loader"], stdin=subprocess.PIPE,
                                                stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path},
                                                start_new_session=True)
                self.is_ready = False

    def ask(self, job: tuple, seconds: float) -> tuple:
        """The child's answer to one job. VideoError if it takes longer than `seconds` or dies over it."""
        if self.process.poll() is not None:  # killed while it was idle: not this job's fault
            self.end()
            self.start()
        if not self.is_ready:
            self._wait_until_ready()
        try:
            _send(self.process.stdin, job)
        except OSError:  # it died just now; what follows says so
            pass
        answer = self._receive(seconds)
        if isinstance(answer, tuple):
            return answer
        status = self.end()
        self.start()
        path = job[1]
        raise VideoError(path, f"no answer in {seconds:g} s" if answer == "late"
                         else f"the decoder died (exit status {status})")

    def _wait_until_ready(self) -> None:
        """A child that was killed, or stopped, while it started gets a successor; ChildProcessError when that does not help."""
        for attempt in range(1, STARTS + 1):
            message = self._receive(STARTUP_SECONDS)
            if message == "ready":
                self.is_ready = True
                return
            pid, status = self.process.pid, self.end()
            what = f"was not ready after {STARTUP_SECONDS:g} s" if message == "late" else f"ended with status {status}"
            if self.closed:
                break
            self.start()
            tqdm.write(f"decode worker (process {pid}) {what} while it started; start {attempt} of {STARTS}", file=sys.stderr)
        raise ChildProcessError(f"a decode worker did not start, {STARTS} times; the last one {what}, and its message is above "
                                "(--num_workers 0 decodes without workers)")

    def _receive(self, seconds: float) -> object:
        """One message; "late" if the child had to be killed for it, "dead" if it ended by itself."""
        late = threading.Event()
        timer = threading.Timer(seconds, lambda: (late.set(), self.process.kill()))
        timer.daemon = True
        timer.start()
        try:
            message = pickle.load(self.process.stdout)
        except (EOFError, OSError, ValueError, pickle.UnpicklingError):  # ValueError: close() shut the pipe
            message = "dead"
        timer.cancel()
        timer.join()  # it may be just past the point of no return: then the child is dead, whatever it said
        return "late" if late.is_set() else message

    def end(self) -> int:
        """Kill the child, reap it (no zombie) and return its exit status."""
        self.process.kill()
        status = self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            try:
                pipe.close()
            except OSError:  # an unsent job in the buffer of a broken pipe
                pass
        return status

    def close(self) -> None:
        with self.lock:
            self.closed = True
        self.process.kill()  # a thread that waits for an answer sees the pipe close


class DecodePool:
    """`num_workers` children that answer jobs in parallel; 0 runs them in the calling process, without a deadline."""

    def __init__(self, num_workers: int, deadline: float = 60.0):
        self.deadline = deadline
        self.workers = [_Worker() for _ in range(num_workers)]
        self.idle = queue.SimpleQueue()
        for worker in self.workers:
            self.idle.put(worker)
        self.threads = ThreadPoolExecutor(num_workers, thread_name_prefix="decode") if num_workers else None

    def submit(self, function: Callable, path: str, arguments: dict, finish: Callable = lambda value: value,
               find: Callable[[], object | None] = lambda: None, extra_seconds: float | None = 0.0) -> Future:
        """Future of what `find` finds, else of `finish(function(path, **arguments))`; `find` and `finish` are called in the
        thread that would wait for the child. A video that cannot be read is the future's exception, a VideoError.
        `extra_seconds` are added to the deadline of a long one; None: as many as its header says that it lasts."""
        job = function, path, arguments
        if self.threads:
            return self.threads.submit(self._run, job, finish, find, extra_seconds)
        future, found = Future(), find()
        try:
            future.set_result(finish(_value_of(run_job(*job))) if found is None else found)
        except VideoError as error:
            future.set_exception(error)
        return future

    def _run(self, job: tuple, finish: Callable, find: Callable[[], object | None], extra_seconds: float | None) -> object:
        if (found := find()) is not None:
            return found
        worker = self.idle.get()  # as many threads as workers: there always is one
        try:
            if extra_seconds is None:
                extra_seconds = _value_of(worker.ask((length_of, job[1], {}), self.deadline))
            return finish(_value_of(worker.ask(job, self.deadline + extra_seconds)))
        finally:
            self.idle.put(worker)

    def close(self) -> None:
        """End the children, whatever they are doing; futures that were not begun are cancelled."""
        if self.threads:
            self.threads.shutdown(wait=False, cancel_futures=True)
        for worker in self.workers:
            worker.close()
        if self.threads:
            self.threads.shutdown()
        for worker in self.workers:
            worker.end()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def _value_of(answer: tuple) -> object:
    if answer[0] == "error":
        raise VideoError(*answer[1:])
    return answer[1]


class FrameCache:
    """A folder of decoded clips, of at most `most_bytes`, that any number of processes and runs share.

    A clip is found by all it depends on: file, size, time of change, settings, and the versions of what decodes it. Nothing is
    locked: an entry appears whole, by being renamed, or not at all; whoever finds it damaged decodes the video. Reading an
    entry makes it young, and the oldest ones leave. One clip of the published budget is 8 MB.
    """

    def __init__(self, folder: str | Path, most_bytes: float):
        self.folder, self.most_bytes = Path(folder), most_bytes
        self.written = float("inf")  # by this process since it has looked at the folder: it looks at its first entry
        self.lock = threading.Lock()  # several threads of this process come to tidy up
        self.is_broken = False
        self.folder.mkdir(parents=True, exist_ok=True)

    def find(self, key: tuple) -> Clip | None:
        """The clip, None where there is none that can be read."""
        path = self._path(key)
        try:
            with np.load(path, allow_pickle=False) as entry:  # a zip file: its checksums notice every damaged byte
                clip = _to_clip((entry["frames"], entry["seconds"], float(entry["sample_fps"]), bool(entry["is_constant"])))
            os.utime(path)  # used just now
            return clip
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None  # damaged: decoded again, and written over

    def keep(self, key: tuple, clip: Clip) -> None:
        """Write the clip. A disk that is full, or read-only, costs the cache and not the run."""
        path, size = self._path(key), clip.frames.nbytes
        if self.is_broken or size > self.most_bytes / 2:  # one that would drive all others out
            return
        try:
            with write_whole(path) as partial, open(partial, "wb") as file:
                np.savez(file, frames=clip.frames.numpy(), seconds=clip.seconds.numpy(), sample_fps=clip.sample_fps,
                         is_constant=clip.is_constant)
        except OSError as error:
            self.is_broken = True
            tqdm.write(f"--frame_cache {self.folder}: nothing more is written to it, {error}")
            return
        with self.lock:
            self.written += size
            if self.written > self.most_bytes / 64:
                self._tidy()
                self.written = 0

    def _tidy(self) -> None:
        """Delete the least recently used down to 7/8 of the limit: so eight processes that look after each 1/64 that they
        have written stay below it together, without listing a folder of 10,000 files for every clip."""
        entries = []
        for entry in os.scandir(self.folder):
            try:
                status = entry.stat()
            except FileNotFoundError:  # another process is faster
                continue
            if not entry.name.startswith(PARTIAL):
                entries.append((status.st_mtime_ns, status.st_size, entry.path))
            elif time.time() - status.st_mtime > 3600:  # of a killed process
                Path(entry.path).unlink(missing_ok=True)
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if total > 7 / 8 * self.most_bytes:
                Path(path).unlink(missing_ok=True)
                total -= size

    def _path(self, key: tuple) -> Path:
        return self.folder / f"{hashlib.sha256(repr((CACHE_VERSION, READER, *key)).encode()).hexdigest()}.npz"


class VideoLoader:
    """Clips of samples, decoded ahead: `submit` the next step's samples, then `load` this step's.

    The result does not depend on the number of workers. What was submitted waits for its `load`, clip or failure, so
    no file is decoded, or waited for, twice. Loaded clips are kept up to `cache_bytes` of memory, the least recently
    used ones leave first: a small data set is decoded once and a large one streams through. `frame_cache` names a folder
    that keeps up to `frame_cache_gb` (10^9 bytes) of them on the disk. Clips are shared: do not write into them. Not for
    several threads.
    """

    def __init__(self, settings: VideoSettings = VideoSettings(), *, num_workers: int = 4, deadline: float = 60.0,
                 cache_bytes: int = 2**30, frame_cache: str | Path = "", frame_cache_gb: float = 50.0):
        self.settings, self.cache_bytes = settings, cache_bytes
        self.disk = FrameCache(frame_cache, frame_cache_gb * 1e9) if frame_cache else None
        self.pool = DecodePool(num_workers, deadline)
        self.ahead: dict[tuple, Future] = {}  # submitted and not yet loaded
        self.cache: OrderedDict[tuple, Clip] = OrderedDict()  # loaded, least recently used first
        self.cached_bytes = 0
        self.failures: Counter[tuple] = Counter()

    def submit(self, sample: dict) -> Future | list[Future]:
        """Begin to decode. Future of the sample's Clip, of None for a text-only sample; a VideoError is its exception. Of
        pictures a list, one for each.

        Samples that show the same part of the same file share a future.
        """
        futures = [self._submit(key, job) for key, job in self._shown(sample)]
        return futures if "image" in sample else futures[0] if futures else _finished(None)

    def _shown(self, sample: dict) -> list[tuple[tuple, tuple]]:
        """(key of the clip, (function, arguments, extra seconds to decode)) of each file that it shows."""
        if "image" in sample:
            arguments = picture_arguments(self.settings)
            return [(_clip_key(file, arguments), (picture_arrays, arguments, 0.0)) for file in files_of(sample)]
        if "video" not in sample:
            return []
        arguments = video_arguments(sample, self.settings)
        return [(_clip_key(sample["video"], arguments), (read_arrays, arguments, seconds_of(sample) or None))]

    def _submit(self, key: tuple, job: tuple) -> Future:
        if key not in self.ahead:
            self.ahead[key] = _finished(self.cache[key]) if key in self.cache else self._read(key, *job)
        return self.ahead[key]

    def _read(self, key: tuple, function: Callable, arguments: dict, seconds: float | None) -> Future:
        """From the disk, where it has the clip, else from the file. Which of the two, its result does not tell."""
        file, version, _ = key
        if self.disk is None or version is None:
            return self.pool.submit(function, file, arguments, _to_clip, extra_seconds=seconds)
        key = (os.path.abspath(file), *key[1:])  # runs that start in different folders share the entries

        def finish(arrays: tuple) -> Clip:
            clip = _to_clip(arrays)
            self.disk.keep(key, clip)
            return clip

        return self.pool.submit(function, file, arguments, finish, functools.partial(self.disk.find, key), seconds)

    def load(self, sample: dict) -> Clip | list[Clip] | None:
        """The sample's clip, one of one frame for each picture, None for a text-only sample. Raises VideoError."""
        self.submit(sample)
        loaded = {}
        for key, job in self._shown(sample):  # all of them, also behind one that fails: each was submitted for this
            if key not in loaded:  # the same picture twice in a sample
                loaded[key] = self._load(key, job)
        clips = [loaded[key] for key, _ in self._shown(sample)]
        for clip in clips:
            if isinstance(clip, VideoError):
                raise clip
        return clips if "image" in sample else clips[0] if clips else None

    def _load(self, key: tuple, job: tuple) -> Clip | VideoError:
        try:
            clip = self._submit(key, job).result()
        except VideoError as error:
            self.failures[key] += 1
            if self.failures[key] < ATTEMPTS:  # otherwise it stays, and fails at once from now on
                del self.ahead[key]
            return error
        del self.ahead[key]
        self._keep(key, clip)
        return clip

    def _keep(self, key: tuple, clip: Clip) -> None:
        """Put the clip at the young end of the cache, and let clips go at the old end while there are too many."""
        if key not in self.cache:
            self.cached_bytes += clip.frames.nbytes
        self.cache[key] = clip
        self.cache.move_to_end(key)
        while self.cached_bytes > self.cache_bytes:
            self.cached_bytes -= self.cache.popitem(last=False)[1].frames.nbytes

    def close(self) -> None:
        """End the workers. Also done on leaving a `with` block."""
        self.pool.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def seconds_of(sample: dict) -> float:
    """Seconds of the file, as far as the sample (or what is told of it to a decoder) tells: a video may take as long to
    decode as to watch."""
    return max(float(sample.get(key) or 0.0) for key in ("duration", "end"))


def _to_clip(arrays: tuple) -> Clip:
    frames, seconds, sample_fps, is_constant = arrays
    return Clip(torch.from_numpy(frames), torch.from_numpy(seconds), sample_fps, is_constant)


def _finished(result: Clip | None) -> Future:
    future = Future()
    future.set_result(result)
    return future


def _clip_key(file: str, arguments: dict) -> tuple:
    """All that a clip depends on. A file that was replaced in the meantime is another file."""
    try:
        status = os.stat(find_video(file))  # what is decoded: it may have another suffix than the annotated name
        version = (status.st_size, status.st_mtime_ns)
    except (VideoError, OSError):  # no such file: decoding says so better
        version = None
    return file, version, repr(arguments)


if __name__ == "__main__":
    serve()
