"""The decode workers against what real collections hold: files that hang or kill a decoder. Nothing is mocked."""

import os
import pickle
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from processes import read, run_ranks, start_ranks
from video_files import pictures, read_sample, which_frames, write_video

import lib.loader
from data import Clip, VideoSettings
from lib.loader import FrameCache, VideoLoader, read_arrays, seconds_of
from lib.readers import VideoError


def question(video, **fields):
    sample = {"task": "qa", "question": "?", "options": ["a", "b"], "answer": "A"}
    return {**sample, "id": str(video), "video": str(video), **fields}


def wait_for(condition, seconds=30):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "waited in vain"
        time.sleep(0.02)


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def pids(loader):
    return [worker.process.pid for worker in loader.pool.workers]


@pytest.fixture
def videos(tmp_path):
    """Three good files, an unreadable one, and one that never answers: a pipe that nobody writes into."""
    for k in range(3):
        write_video(tmp_path / f"{k}.mp4", pictures(10 + 4 * k))
    (tmp_path / "bad.mp4").write_text("this is not a video")
    os.mkfifo(tmp_path / "hangs.mp4")
    return tmp_path


@pytest.fixture(scope="module")
def loader():
    """One worker for several tests, because a worker needs a second or two to import torch. Where a test kills it, another
    one takes its place."""
    with VideoLoader(num_workers=1, deadline=60, cache_bytes=0) as loader:
        yield loader


def test_a_file_that_hangs_costs_its_deadline_and_nothing_else(videos, loader, monkeypatch):
    """One bad file of 12,000 must not stop a training run at night; nor leave a child behind. A long video may take as
    long to decode as to watch: with one deadline for all, the films of a data set would be its unreadable videos."""
    monkeypatch.setattr(loader.pool, "deadline", 1.0)
    (first,) = pids(loader)
    futures = [loader.submit(question(videos / name, **more)) for name, more in (
        ("0.mp4", {}), ("hangs.mp4", {"duration": 0.25}), ("bad.mp4", {}), ("1.mp4", {}))]
    good, hung, bad, after = (future.exception() or future.result() for future in futures)
    assert isinstance(hung, VideoError) and hung.path == str(videos / "hangs.mp4")
    assert hung.reason == "no answer in 1.25 s"
    assert isinstance(bad, VideoError) and str(videos / "bad.mp4") in str(bad) and "not a video" in bad.reason
    for clip, k in ((good, 0), (after, 1)):
        alone = read_sample(question(videos / f"{k}.mp4"))  # in this process, without a worker
        assert torch.equal(clip.frames, alone.frames) and torch.equal(clip.seconds, alone.seconds)
        assert clip.sample_fps == alone.sample_fps
    assert pids(loader) != [first]
    check_is_gone(first)


def check_is_gone(pid):
    assert not is_running(pid)
    with pytest.raises(ChildProcessError):  # reaped: no zombie
        os.waitpid(pid, os.WNOHANG)


def test_a_deadline_grows_with_the_seconds_that_a_sample_tells_of(videos, tmp_path, monkeypatch):
    """With a cache on the disk and without: there are two ways to the pool. A part of a file has its `end`, from the
    beginning of the file, in place of a duration."""
    assert seconds_of(question("a.mp4")) == 0 and seconds_of(question("a.mp4", duration=None)) == 0
    assert seconds_of(question("a.mp4", duration=7200.0)) == 7200
    assert seconds_of(question("a.mp4", start=50, end=55.5)) == 55.5
    assert seconds_of(question("a.mp4", start=50, end=55.5, duration=90)) == 90
    for folder in ("", tmp_path / "frames"):
        with VideoLoader(num_workers=0, frame_cache=folder) as loader:
            deadlines = []
            monkeypatch.setattr(loader.pool, "threads", ThreadPoolExecutor(1))
            monkeypatch.setattr(loader.pool, "_run", lambda job, finish, find, seconds: deadlines.append(seconds))
            for sample in (question(videos / "0.mp4"), question(videos / "1.mp4", duration=7200.0)):
                loader.submit(sample).result()
            assert deadlines == [None, 7200]  # None: the file is asked


def test_a_film_without_an_annotated_duration_is_given_its_own(videos, loader, monkeypatch):
    """Its deadline would be that of a clip of ten seconds, and every film of the data set unreadable."""
    worker, asked = loader.pool.workers[0], []
    real = worker.ask
    monkeypatch.setattr(worker, "ask", lambda job, seconds: asked.append((job[0].__name__, seconds)) or real(job, seconds))
    loader.load(question(videos / "2.mp4"))
    assert asked == [("length_of", 60), ("read_arrays", pytest.approx(61.8))]
    asked.clear()
    loader.load(question(videos / "2.mp4", duration=3.0))
    assert asked == [("read_arrays", 63)]


def test_a_worker_that_is_killed_is_replaced(videos, loader):
    """The kernel kills the largest process when memory is short, which a decoder of 4K video is."""
    assert loader.load(question(videos / "0.mp4")) is not None  # it is ready now
    hanging = loader.submit(question(videos / "hangs.mp4"))
    (pid,) = pids(loader)
    wait_for(hanging.running)
    time.sleep(0.2)  # it has the job by now, and for another minute
    os.kill(pid, signal.SIGKILL)
    error = hanging.exception(timeout=30)
    assert isinstance(error, VideoError) and "died (exit status -9)" in error.reason
    assert len(loader.load(question(videos / "1.mp4")).frames) > 0
    (pid,) = pids(loader)
    os.kill(pid, signal.SIGKILL)  # between two jobs: the next video is not to blame
    # Dead with all its threads, and not yet reaped: its state in /proc is that of its first thread alone.
    wait_for(lambda: os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT))
    assert len(loader.load(question(videos / "2.mp4")).frames) > 0


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_that_is_killed_or_stopped_while_it_starts_is_replaced(videos, monkeypatch, capsys, fault):
    """Killed, it ended the run; stopped, it held everything for ten minutes, and then ended the run."""
    monkeypatch.setattr("lib.loader.STARTUP_SECONDS", 20)
    with VideoLoader(num_workers=1, deadline=60) as loader:
        (pid,) = pids(loader)
        if fault == signal.SIGSTOP:
            monkeypatch.setattr("lib.loader.STARTUP_SECONDS", 1)
        os.kill(pid, fault)
        coming = loader.submit(question(videos / "0.mp4"))
        if fault == signal.SIGSTOP:
            wait_for(lambda: not is_running(pid))
            monkeypatch.setattr("lib.loader.STARTUP_SECONDS", 30)
        assert len(coming.result().frames) > 0 and pids(loader) != [pid]
        check_is_gone(pid)


def test_a_worker_that_never_starts_is_named(videos, monkeypatch, capfd):
    """After three times it is no accident: a library that is missing on this machine, say, and the message is the child's."""
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with VideoLoader(num_workers=1, deadline=60) as loader:
        with pytest.raises(ChildProcessError, match=r"did not start, 3 times; .*status 1, .*--num_workers 0"):
            loader.load(question(videos / "0.mp4"))
    assert capfd.readouterr().err.count("while it started") >= 2


def test_a_signal_for_all_of_a_rank_does_not_cost_the_videos_of_its_last_step(videos):
    """torchrun passes SIGTERM on to the whole session of a rank: workers that died of it made unreadable videos."""
    with VideoLoader(num_workers=1, deadline=60) as loader:
        assert os.getsid(pids(loader)[0]) != os.getsid(0)


def hang(videos):
    loader = VideoLoader(num_workers=1, deadline=60)
    loader.load(question(videos / "0.mp4"))
    loader.submit(question(videos / "hangs.mp4"))
    print(*pids(loader), flush=True)
    time.sleep(60)


def test_workers_end_with_their_parent_even_while_they_hang(videos):
    """A cluster job that is killed leaves a node full of decoders."""
    (parent,) = start_ranks(videos, 1, hang, videos)
    wait_for(lambda: (videos / "rank0.txt").exists() and read(videos, 0).endswith("\n"))
    pid = int(read(videos, 0))
    assert is_running(pid)
    parent.kill()
    parent.join()
    wait_for(lambda: not is_running(pid))


def test_what_a_library_prints_does_not_get_between_the_answers(videos):
    """One line of a decoder on standard output, and every later clip is garbage or a wrong one."""
    script = (f"import os, sys; sys.path.insert(0, {str(ROOT)!r})\n"
              "from lib import loader\n"
              "quiet = loader.run_job\n"
              "loader.run_job = lambda *job: (print('noise', flush=True), os.write(1, b'more'), quiet(*job))[-1]\n"
              "loader.serve()\n")
    child = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE)
    for name in ("bad.mp4", "absent.mp4"):
        pickle.dump((read_arrays, str(videos / name), {}), child.stdin)
    child.stdin.flush()
    answers = [pickle.load(child.stdout) for _ in range(3)]
    assert answers[0] == "ready" and [answer[1] for answer in answers[1:]] == [
        str(videos / "bad.mp4"), str(videos / "absent.mp4")]
    _, noise = child.communicate()
    assert child.returncode == 0 and noise.count(b"noise\nmore") == 2


def test_workers_are_ours_wherever_the_run_was_started(videos, monkeypatch):
    """A module named lib beside the user's data would be what `-m lib.loader` finds first. And closing does not wait for
    files that hang: Ctrl-C during a bad file would otherwise take the deadline, times the files still queued."""
    (videos / "lib").mkdir()
    (videos / "lib" / "__init__.py").write_text("raise SystemExit('not this one')")
    monkeypatch.chdir(videos)
    loader = VideoLoader(num_workers=1, deadline=600)
    assert len(loader.load(question("0.mp4")).frames) > 0
    (pid,) = pids(loader)
    loader.submit(question("hangs.mp4"))
    waiting = loader.submit(question("1.mp4"))
    begin = time.time()
    loader.close()
    loader.close()  # twice does no harm
    assert time.time() - begin < 10 and waiting.cancelled()
    check_is_gone(pid)


def test_any_function_of_a_module_can_be_a_job(videos, loader):
    """The loader knows no caller: what is done with a video is named by whoever asks for it. What a child cannot import
    fails at once."""
    pool = loader.pool
    assert pool.submit(os.path.getsize, str(videos / "0.mp4"), {}).result() == (videos / "0.mp4").stat().st_size
    start = time.time()
    unknown = pool.submit(pids, str(videos / "0.mp4"), {}).exception()  # the children have no tests on their path
    assert isinstance(unknown, VideoError) and "died (exit status 1)" in unknown.reason and time.time() - start < 30
    assert pool.submit(os.path.isfile, str(videos / "0.mp4"), {}).result() is True


def test_every_number_of_workers_gives_the_same_clips(videos):
    """Results that depend on who decodes cannot be reproduced on another machine."""
    samples = [question(videos / "2.mp4", start=0.5), question(videos / "1.mp4", end=1.0),
               {**question(videos / "0.mp4"), "task": "tracking"}, question(videos / "2.mp4")]
    settings = VideoSettings(target_fps=4, min_pixels=784)
    clips = []
    for num_workers in (0, 2):
        with VideoLoader(settings, num_workers=num_workers) as loader:
            clips.append([future.result() for future in [loader.submit(sample) for sample in samples]])
            assert loader.submit({"id": "t", "task": "qa", "question": "?"}).result() is None  # text only
    for one, other in zip(*clips):
        assert torch.equal(one.frames, other.frames) and torch.equal(one.seconds, other.seconds)
        assert one.sample_fps == other.sample_fps
    assert [which_frames(clip)[0] for clip in clips[0]] == [5, 0, 0, 0]


def test_a_clip_is_decoded_once_while_it_fits_and_its_file_stays_the_same(videos):
    """Forty questions about one video decode it forty times; a stale clip is worse."""
    file = videos / "0.mp4"
    with VideoLoader(num_workers=0) as loader:
        clip = loader.load(question(file))
        assert loader.load({**question(file), "question": "another"}) is clip
        assert loader.load(question(file, start=0.3)) is not clip
        assert loader.load({**question(file), "task": "tracking"}) is not clip  # other frames of the same file
        write_video(file, pictures(30)[20:])
        assert which_frames(loader.load(question(file)))[0] == 20


def test_the_cache_forgets_what_was_not_used_for_longest(videos):
    """A cache without a limit ends the run when the memory does."""
    names = [question(videos / f"{k}.mp4") for k in range(3)]
    size = sum(read_sample(sample).frames.nbytes for sample in names[:2])
    with VideoLoader(num_workers=0, cache_bytes=size) as loader:
        first, second = loader.load(names[0]), loader.load(names[1])
        assert loader.load(names[0]) is first and loader.cached_bytes == size
        third = loader.load(names[2])  # 1 is the oldest now
        assert loader.cached_bytes <= size
        assert loader.load(names[2]) is third and loader.load(names[1]) is not second
        assert loader.cached_bytes == sum(clip.frames.nbytes for clip in loader.cache.values()) <= size
    with VideoLoader(num_workers=0, cache_bytes=0) as loader:
        assert loader.load(names[0]) is not loader.load(names[0]) and loader.cached_bytes == 0


def test_what_was_decoded_ahead_waits_to_be_used(videos):
    """With a cache smaller than the next step, its clips would be decoded, thrown away and decoded again."""
    samples = [question(videos / f"{k}.mp4") for k in range(3)]
    with VideoLoader(num_workers=0, cache_bytes=0) as loader:
        futures = [loader.submit(sample) for sample in samples]
        for k, sample in enumerate(samples):  # two questions about one video share its clip
            assert loader.submit({**sample, "id": "another", "question": "and why?"}) is futures[k]
        assert [loader.load(sample) for sample in samples] == [future.result() for future in futures]
        assert not loader.ahead  # and is let go then


def test_a_file_that_fails_has_a_second_chance_and_no_third(videos):
    """A hanging file would cost its deadline in every epoch, or eight times in a step that asks eight things about it;
    and one hiccup of a network disk would lose a good file for the whole run."""
    bad, futures = question(videos / "bad.mp4"), []
    with VideoLoader(num_workers=0) as loader:
        for _ in range(4):
            futures.append(loader.submit(bad))
            with pytest.raises(VideoError, match="not a video"):
                loader.load(bad)
        assert futures[0] is not futures[1] is futures[2] is futures[3]
        write_video(videos / "bad.mp4", pictures(10))  # repaired: another file
        assert which_frames(loader.load(bad))[0] == 0


# --- the cache on the disk --------------------------------------------------------------------------------------------


def entries(folder):
    return sorted(folder.glob("*"))


def test_the_disk_gives_back_the_decoded_clip_without_decoding(videos, tmp_path):
    """Decoding is the slowest part of reading a video; the second epoch, or run, must not pay for it again, in a clip
    that is the same in every byte."""
    folder, sample = tmp_path / "frames", question(videos / "2.mp4", start=0.5)
    with VideoLoader(num_workers=1, frame_cache=folder) as loader:
        first = loader.load(sample)
        loader.cache.clear()
        assert torch.equal(loader.load(sample).frames, first.frames)
    (entry,) = entries(folder)
    content = videos.joinpath("2.mp4").read_bytes()
    times = os.stat(videos / "2.mp4")
    (videos / "2.mp4").write_bytes(bytes(len(content)))  # no decoder reads this; size and time of change stay
    os.utime(videos / "2.mp4", ns=(times.st_atime_ns, times.st_mtime_ns))
    for num_workers in (0, 1):
        with VideoLoader(num_workers=num_workers, frame_cache=folder) as loader:
            again = loader.load(sample)
            assert again.frames.dtype == torch.uint8 and torch.equal(again.frames, first.frames)
            assert again.seconds.dtype == first.seconds.dtype and torch.equal(again.seconds, first.seconds)
            assert again.sample_fps == first.sample_fps and type(again.sample_fps) is float
            assert num_workers == 0 or not loader.pool.workers[0].is_ready  # nobody was asked


def test_other_settings_and_a_replaced_file_are_other_entries(videos, tmp_path):
    """A stale clip is worse than a slow one: the answer would be about another video."""
    file, folder = videos / "0.mp4", tmp_path / "frames"

    def load(settings=VideoSettings(), **fields):
        with VideoLoader(settings, num_workers=0, frame_cache=folder) as loader:
            return loader.load(question(file, **fields))

    load()
    load(VideoSettings(total_pixels=100 * 784))
    assert len(entries(folder)) == 2
    load(start=0.3)
    load(task="tracking")
    assert len(entries(folder)) == 4
    load(question="another")
    assert len(entries(folder)) == 4  # the same frames
    write_video(file, pictures(30)[20:])
    assert which_frames(load())[0] == 20
    here = os.getcwd()
    os.chdir(videos)
    try:
        with VideoLoader(num_workers=0, frame_cache=folder) as loader:
            assert which_frames(loader.load(question("0.mp4")))[0] == 20 and len(entries(folder)) == 5
    finally:
        os.chdir(here)


def test_a_video_with_another_suffix_than_annotated_is_kept_and_its_replacement_is_read(videos, tmp_path):
    """ActivityNet's annotations say .mp4 where the file is an .mkv. Of such a video the folder kept nothing, so every run
    decoded it again; and the memory went on showing a file that had been replaced."""
    folder, file = tmp_path / "frames", write_video(videos / "v_abc.mkv", pictures(10))
    sample = question(videos / "v_abc.mp4")
    with VideoLoader(num_workers=0, frame_cache=folder) as loader:
        clip = loader.load(sample)
        (entry,) = entries(folder)
        write_video(file, pictures(30)[20:])
        assert which_frames(clip)[0] == 0 and which_frames(loader.load(sample))[0] == 20
    assert entry in entries(folder) and len(entries(folder)) == 2


@pytest.mark.parametrize("what", ["CACHE_VERSION", "READER"])
def test_frames_of_another_reader_are_not_taken_for_this_ones(videos, tmp_path, monkeypatch, what):
    """What decord decoded wrong would be shown for as long as the folder lives."""
    folder, sample = tmp_path / "frames", question(videos / "0.mp4")
    for value in ("old", "new"):
        monkeypatch.setattr(lib.loader, what, value)
        with VideoLoader(num_workers=0, frame_cache=folder) as loader:
            loader.load(sample)
    assert len(entries(folder)) == 2


def test_a_variable_rate_survives_the_disk(tmp_path):
    """Its seconds are its clock: from the cache, the same video would stand at other positions."""
    file = write_video(tmp_path / "v.mp4", pictures(20), times=[k * k / 40 for k in range(20)])
    for _ in range(2):
        with VideoLoader(num_workers=0, frame_cache=tmp_path / "frames") as loader:
            assert loader.load(question(file)).is_constant is False


@pytest.mark.parametrize("damage", ["cut", "emptied", "one byte", "another file"])
def test_a_damaged_entry_is_decoded_again(videos, tmp_path, damage):
    """A full disk or a crash leaves half a file; a flipped byte is a wrong picture that nobody would ever see."""
    folder, sample = tmp_path / "frames", question(videos / "1.mp4")
    with VideoLoader(num_workers=0, frame_cache=folder) as loader:
        clip = loader.load(sample)
    (entry,) = entries(folder)
    whole = entry.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    entry.write_bytes({"cut": whole[:-100], "emptied": b"", "one byte": flipped, "another file": b"not a zip"}[damage])
    with VideoLoader(num_workers=0, frame_cache=folder) as loader:
        assert torch.equal(loader.load(sample).frames, clip.frames)
    assert entry.read_bytes() == whole and entries(folder) == [entry]  # repaired


def test_the_disk_forgets_what_was_not_used_for_longest(tmp_path):
    """A cache that fills the disk ends the run, and that of everybody else on it."""
    clip = clip_of_noise(frames=8, side=56)
    cache = FrameCache(tmp_path / "frames", 10.5 * (clip.frames.nbytes + 1000))
    for k in range(9):
        cache.keep((k,), clip)
        os.utime(cache._path((k,)), (k + 1, k + 1))
    assert [cache.find((k,)) is not None for k in range(2)] == [True, True]  # 0 and 1 are the youngest now
    for k in range(9, 30):
        cache.keep((k,), clip)
        assert sum(file.stat().st_size for file in entries(cache.folder)) <= cache.most_bytes
        if k == 10:
            assert [k for k in range(11) if cache._path((k,)).exists()] == [0, 1, *range(4, 11)]
    assert len(entries(cache.folder)) >= 8 and cache.find((29,)) is not None and cache.find((2,)) is None
    cache.keep(("large",), clip_of_noise(frames=8 * 6, side=56))  # would drive out more than half of them
    assert cache.find(("large",)) is None and len(entries(cache.folder)) >= 8


def test_what_a_killed_process_has_left_is_cleared_away(tmp_path):
    """Half-written files are no entries, so nothing would count them, nor ever delete them."""
    clip = clip_of_noise(frames=2, side=28)
    old, new = tmp_path / "partial-1-2-a.npz", tmp_path / "partial-1-2-b.npz"
    old.write_bytes(b"x")
    new.write_bytes(b"x")
    os.utime(old, (1, 1))
    FrameCache(tmp_path, 1e9).keep((0,), clip)
    assert not old.exists() and new.exists()  # somebody may be writing that one


def test_a_disk_that_cannot_be_written_costs_the_cache_and_not_the_run(videos, tmp_path, capsys):
    """/scratch is full every other night."""
    folder = tmp_path / "frames"
    with VideoLoader(num_workers=0, frame_cache=folder) as loader:
        folder.rmdir()
        folder.touch()  # nothing can be written below a file
        assert len(loader.load(question(videos / "0.mp4")).frames) > 0
        assert len(loader.load(question(videos / "1.mp4")).frames) > 0
    assert capsys.readouterr().out.count(f"--frame_cache {folder}") == 1


def test_several_processes_share_the_folder(tmp_path):
    """The ranks of a machine write the same clips at the same time, while others delete them: every clip that is found
    is whole, and the limit holds."""
    folder = tmp_path / "frames"
    run_ranks(tmp_path, 2, use_a_cache, folder)
    assert all(file.suffix == ".npz" for file in entries(folder))
    assert sum(file.stat().st_size for file in entries(folder)) <= 40_000


def use_a_cache(folder):
    cache, found = FrameCache(folder, 40_000), 0
    for k in random.Random(0).choices(range(7), k=400):  # in turn, the one that is needed next would have left just before
        clip = cache.find((k,))
        assert clip is None or (clip.frames == k).all() and clip.frames.shape == (2, 3, 28, 28)
        found += clip is not None
        cache.keep((k,), Clip(torch.full((2, 3, 28, 28), k, dtype=torch.uint8), torch.zeros(2), 2.0))
    assert not cache.is_broken and found


def clip_of_noise(frames, side):
    pixels = torch.randint(0, 256, (frames, 3, side, side), dtype=torch.uint8)
    return Clip(pixels, torch.arange(frames) / 2, 2.0)
