"""The decode workers against what real collections hold: files that hang or kill a decoder. Nothing is mocked."""

import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from video_files import pictures, which_frames, write_video

from data import VideoError, VideoSettings, read_sample
from loader import VideoLoader

ROOT = Path(__file__).parent.parent


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


@pytest.fixture
def videos(tmp_path):
    """Three good files, an unreadable one, and one that never answers: a pipe that nobody writes into."""
    for k in range(3):
        write_video(tmp_path / f"{k}.mp4", pictures(10 + 4 * k))
    (tmp_path / "bad.mp4").write_text("this is not a video")
    os.mkfifo(tmp_path / "hangs.mp4")
    return tmp_path


def test_a_file_that_hangs_costs_its_deadline_and_nothing_else(videos):
    """One bad file of 12,000 must not stop a training run at night; nor leave a child behind when it is over."""
    with VideoLoader(num_workers=1, deadline=1.0) as loader:
        first = loader.worker_pids()
        futures = [loader.submit(question(videos / name)) for name in ("0.mp4", "hangs.mp4", "bad.mp4", "1.mp4")]
        good, hung, bad, after = (future.exception() or future.result() for future in futures)
        second = loader.worker_pids()
    assert isinstance(hung, VideoError) and hung.path == str(videos / "hangs.mp4")
    assert hung.reason == "no answer in 1 s"
    assert isinstance(bad, VideoError) and str(videos / "bad.mp4") in str(bad) and "not a video" in bad.reason
    for clip, k in ((good, 0), (after, 1)):
        alone = read_sample(question(videos / f"{k}.mp4"))  # in this process, without a worker
        assert torch.equal(clip.frames, alone.frames) and torch.equal(clip.seconds, alone.seconds)
        assert clip.sample_fps == alone.sample_fps
    assert first != second
    for pid in first + second:
        assert not is_running(pid)
        with pytest.raises(ChildProcessError):  # reaped: no zombie
            os.waitpid(pid, os.WNOHANG)


def test_a_worker_that_is_killed_is_replaced(videos):
    """The kernel kills the largest process when memory is short, which a decoder of 4K video is."""
    with VideoLoader(num_workers=1, deadline=60) as loader:
        assert loader.load(question(videos / "0.mp4")) is not None  # it is ready now
        hanging = loader.submit(question(videos / "hangs.mp4"))
        (pid,) = loader.worker_pids()
        wait_for(hanging.running)
        time.sleep(0.2)  # it has the job by now, and for another minute
        os.kill(pid, signal.SIGKILL)
        error = hanging.exception(timeout=30)
        assert isinstance(error, VideoError) and "died (exit status -9)" in error.reason
        assert len(loader.load(question(videos / "1.mp4")).frames) > 0
        (pid,) = loader.worker_pids()
        os.kill(pid, signal.SIGKILL)  # between two jobs: the next video is not to blame
        # Dead with all its threads, and not yet reaped: its state in /proc is that of its first thread alone.
        wait_for(lambda: os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT))
        assert len(loader.load(question(videos / "2.mp4")).frames) > 0


def test_workers_end_with_their_parent_even_while_they_hang(videos):
    """A cluster job that is killed leaves a node full of decoders."""
    script = (f"import sys, time; sys.path.insert(0, {str(ROOT)!r})\n"
              "from loader import VideoLoader\n"
              "loader = VideoLoader(num_workers=1, deadline=60)\n"
              "sample = {'id': '', 'task': 'qa', 'video': sys.argv[1]}\n"
              "loader.load({**sample, 'video': sys.argv[2]})\n"
              "loader.submit(sample)\n"
              "print(loader.worker_pids()[0], flush=True)\n"
              "time.sleep(60)\n")
    parent = subprocess.Popen([sys.executable, "-c", script, str(videos / "hangs.mp4"), str(videos / "0.mp4")],
                              stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())
    parent.stdout.close()
    assert is_running(pid)
    parent.kill()
    parent.wait()
    wait_for(lambda: not is_running(pid))


def test_what_a_library_prints_does_not_get_between_the_answers(videos):
    """One line of a decoder on standard output, and every later clip is garbage or a wrong one."""
    script = (f"import os, sys; sys.path.insert(0, {str(ROOT)!r})\n"
              "import loader\n"
              "quiet = loader.run_job\n"
              "loader.run_job = lambda *job: (print('noise', flush=True), os.write(1, b'more'), quiet(*job))[-1]\n"
              "loader.serve()\n")
    child = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE)
    for name in ("bad.mp4", "absent.mp4"):
        pickle.dump(("read", str(videos / name), {}), child.stdin)
    child.stdin.flush()
    answers = [pickle.load(child.stdout) for _ in range(3)]
    assert answers[0] == "ready" and [answer[1] for answer in answers[1:]] == [
        str(videos / "bad.mp4"), str(videos / "absent.mp4")]
    _, noise = child.communicate()
    assert child.returncode == 0 and noise.count(b"noise\nmore") == 2


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


def test_closing_does_not_wait_for_files_that_hang(videos):
    """Ctrl-C during a bad file would otherwise take the deadline, times the files still queued."""
    loader = VideoLoader(num_workers=1, deadline=600)
    loader.load(question(videos / "0.mp4"))
    loader.submit(question(videos / "hangs.mp4"))
    waiting = loader.submit(question(videos / "1.mp4"))
    begin = time.time()
    loader.close()
    loader.close()  # twice does no harm
    assert time.time() - begin < 10 and waiting.cancelled()
