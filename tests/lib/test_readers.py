"""Video files as people have them: the right frames at the right times, or which file and why not."""

import os
import pickle
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from made_samples import QA
from PIL import Image
from strange_videos import make, numbered, read_number
from video_files import CORNER, pictures, read_sample, set_rotation, which_frames, write_folder, write_video

from data import frame_indices, read_video
from lib import readers
from lib.readers import IndexIsWrong, VideoError, find_video, open_video

READERS = ("decord", "pyav", "decoding")


@pytest.fixture(scope="module")
def strange(tmp_path_factory):
    """{name: (file, [(second, number of the frame)] or None)}."""
    return make(tmp_path_factory.mktemp("strange"))


def wrong_frames(clip, shown, start=0.0):
    """The frames of a clip that are not shown at their second, to a thousandth: .mkv rounds to that."""
    frames = zip(clip.seconds.tolist(), map(read_number, clip.frames.numpy()))
    return [(second, number) for second, number in frames
            if number not in [own for at, own in shown if abs(at - second - start) < 0.0015]]


WAYS = {"two a second": {}, "all": {"target_fps": 30}, "a few": {"frames": [3, 20, 21, 30]}, "part": {"start": 3.0, "end": 5.5},
        "last": {"frames": [1, 28]}}


def test_every_frame_is_the_one_at_its_time_in_every_kind_of_file(strange):
    """decord, jumping, shows 33 of 40 frames of an open GOP three frames off, of a copied cut 3 s, of .ts 10 s, and nobody is
    told. What this reader cannot be sure of it must refuse, and no more than that."""
    for name, (file, shown) in strange.items():
        for way, arguments in WAYS.items():
            if shown is None:
                with pytest.raises(VideoError):
                    read_video(file, min_pixels=784, **arguments)
                continue
            try:
                clip = read_video(file, min_pixels=784, **arguments)
            except VideoError as error:
                assert name.startswith("flipped") or error.reason.startswith("0 of its"), f"{name}, {way}: {error}"
                continue
            assert not wrong_frames(clip, shown, arguments.get("start", 0.0)), f"{name}, {way}"


@pytest.mark.parametrize("reader", ["decord", "earlier", "decoding"])
def test_other_ways_to_the_frames_show_the_same_or_refuse(strange, reader):
    """`check` compares with them: a second reader that is wrong makes good files bad."""
    read = 0
    for name, (file, shown) in strange.items():
        try:
            clip = read_video(file, min_pixels=784, reader=reader)
        except VideoError:
            continue
        if reader != "decord" or not name.startswith("flipped"):  # it knows of no damage
            assert shown and not wrong_frames(clip, shown), name
        read += 1
    assert read >= (12 if reader == "decord" else 30)


def test_a_jump_is_used_where_it_is_right_and_only_there(strange, monkeypatch):
    """Without jumps a part of a long film costs the whole film; by the flags of a header that is wrong, frames."""
    shown = []  # frames decoded, one list for each jump
    real = readers._decode

    def counted(container, stream):
        shown.append([])
        return (shown[-1].append(frame.pts) or frame for frame in real(container, stream))

    monkeypatch.setattr(readers, "_decode", counted)
    for name in ("closed.mp4", "open.mp4", "open.mkv", "open.mov", "fragments.mp4", "hevc.mp4", "hevc.mkv", "mpeg2.mp4", "vp9.webm"):
        shown.clear()
        read_video(strange[name][0], frames=[1, 76], min_pixels=784)
        # from the key frame before frame 76, and not from the one before that
        assert len(shown) == 2 and len(shown[1]) < 24, (name, [len(frames) for frames in shown])
    shown.clear()
    read_video(strange["open.ts"][0], frames=[1, 76], min_pixels=784)
    assert len(shown) == 1
    with pytest.raises(IndexIsWrong):  # the header calls every frame a key frame, the decoder knows better
        list(open_video(strange["all_keys_refresh.mp4"][0]).fetch([1, 70]))


def test_what_is_hidden_in_a_seekable_file_is_noticed_by_the_frames_that_come(strange):
    """A time stamp alone would do until a file promises frames that no decoder shows: the counting would be off from there."""
    file = strange["closed.mp4"][0]
    container, stream = readers._open_container(file)
    with container:
        times = sorted(packet.pts for packet in readers._packets(container, stream))
        half = (times[0] + times[1]) // 2
        container.seek(0, stream=stream)
        with pytest.raises(IndexIsWrong):
            list(readers._fetch_in_order(container, stream, [times[0], half, *times[1:]], {}, [20], 0))


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("ffmpeg"), reason="needs the program ffmpeg")
def test_an_hour_is_read_in_bounded_time_and_memory(tmp_path):
    """A part of a long film must not cost the film, and the whole film not more than the machine has."""
    minute = np.concatenate([numbered(k)[None] for k in range(1800)])
    raw = "-f rawvideo -pix_fmt rgb24 -s 112x84 -r 30 -i - -vf scale=640:480:flags=neighbor".split()
    encode = "-c:v libx264 -preset veryfast -pix_fmt yuv420p".split()
    subprocess.run(["ffmpeg", "-loglevel", "error", *raw, *encode, str(tmp_path / "minute.mp4")], input=minute.tobytes(), check=True)
    subprocess.run(["ffmpeg", "-loglevel", "error", "-stream_loop", "59", "-i", str(tmp_path / "minute.mp4"), "-c", "copy",
                    str(tmp_path / "hour.mp4")], check=True)
    code = """if True:
        import resource, sys, time
        from data import read_video
        from strange_videos import read_number
        for arguments, limit in (({"start": 3000.0, "end": 3010.0}, 20), ({"frames": [5, 50000, 107000]}, 20), ({}, 300)):
            began = time.process_time()
            clip = read_video(sys.argv[1], **arguments)
            used = time.process_time() - began
            for second, frame in zip(clip.seconds.tolist(), clip.frames.numpy()):
                assert read_number(frame) == round((second + arguments.get("start", 0)) * 30) % 1800, (arguments, second)
            print(arguments, len(clip.frames), f"{used:.1f} s", file=sys.stderr)
            assert used < limit, (arguments, used)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 1.5 * 2**20  # KiB
    """
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "hour.mp4")], check=True, cwd=ROOT,
                   env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "OMP_NUM_THREADS": "1"})


@pytest.mark.parametrize("degrees, corner", [(90, (0, 1)), (180, (1, 1)), (270, (1, 0))])
def test_a_phone_held_sideways_shows_the_same_to_all_readers(tmp_path, degrees, corner):
    """PyAV leaves the rotation in the header to its user: people would lie on their side."""
    file = set_rotation(write_video(tmp_path / "r.mp4", pictures(4, 128, 64, corner=True)), degrees)
    clips = [read_video(file, reader=reader, min_pixels=784) for reader in READERS]
    assert all(torch.equal(clip.frames, clips[0].frames) for clip in clips)
    H, W = clips[0].frames.shape[-2:]
    quarters = clips[0].frames[0].float().mean(0)
    assert quarters[H // 4 + corner[0] * H // 2, W // 4 + corner[1] * W // 2] == pytest.approx(CORNER[0], abs=4)


def test_times_are_the_files_own_where_the_frame_rate_varies(tmp_path):
    """frame / average rate is wrong by seconds in screen recordings."""
    times = [0.1 * k for k in range(10)] + [1 + 0.5 * k for k in range(10)]
    file = write_video(tmp_path / "v.mp4", pictures(20), times=times)
    for reader in ("pyav", "decoding"):
        clip = read_video(file, frames=[0, 9, 10, 19], reader=reader)
        assert clip.seconds.tolist() == pytest.approx([0, 0.9, 1.0, 5.5], abs=2e-3) and not clip.is_constant
    clip = read_video(file, start=1.0, end=3.2)  # from the frame that begins then to the one that begins before
    assert which_frames(clip) == [10, 11, 13, 14] and clip.seconds.tolist() == pytest.approx([0, 0.5, 1.5, 2.0], abs=2e-3)
    assert clip.sample_fps == pytest.approx(4 * 2 / 5)


def test_a_folder_of_frames_is_a_video_at_its_own_rate(tmp_path):
    """GOT-10k is 10 frames a second, not 2; and frame_10 is not the frame after frame_1."""
    folder = write_folder(tmp_path / "seq", pictures(12), names=[f"frame_{k}.jpg" for k in range(12)])
    (folder / "groundtruth.txt").write_text("no frame")
    (folder / "._frame_1.jpg").write_bytes(b"what macOS knows of it")
    clip = read_sample({**QA, "video": str(folder), "fps": 10})
    indices, sample_fps = frame_indices(12, 10)
    assert which_frames(clip) == indices and clip.sample_fps == sample_fps
    assert clip.seconds.tolist() == pytest.approx([k / 10 for k in indices])
    assert len(read_video(folder).frames) == 12  # at the default of 2 frames a second, all of them


def test_numbers_in_names_are_decimal_ones(tmp_path):
    """frame².jpg holds a digit that is no number: the whole folder would be unreadable, with a message about int()."""
    write_folder(tmp_path / "f", pictures(3), names=["f2.jpg", "f10.jpg", "f².jpg"])
    assert which_frames(read_video(tmp_path / "f", frames=[0, 1, 2]))[:2] == [0, 1]


def test_frames_that_change_their_size_get_that_of_the_first(tmp_path):
    """Two of GOT-10k's 180 validation sequences do, and were unreadable."""
    frames = [*pictures(3, 128, 96), *pictures(6, 64, 48)[3:]]
    clip = read_video(write_folder(tmp_path / "sizes", frames), frames=[1, 2, 4, 5], min_pixels=784)
    assert clip.frames.shape == (4, 3, 84, 140) and which_frames(clip) == [1, 2, 4, 5]


@pytest.mark.parametrize("content", [b"#EXTM3U\n#EXTINF:4,\nsecret.ts\n#EXT-X-ENDLIST\n",
                                     b"ffconcat version 1.0\nfile 'secret.ts'\n"])
def test_a_playlist_is_no_video_whatever_its_name(tmp_path, strange, content):
    """It opens other files, wherever they lie, and shows them to the model."""
    shutil.copy(strange["open.ts"][0], tmp_path / "secret.ts")
    for name in ("clip.mp4", "clip.m3u8", "clip"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(VideoError, match="playlist"):
            read_video(tmp_path / name)


def test_a_file_name_is_a_name(tmp_path, monkeypatch):
    """FFmpeg takes http:clip.mp4 for an address and clip%03d.jpg for a thousand files."""
    monkeypatch.chdir(tmp_path)
    for name in ("http:clip.mp4", "-clip.mp4", "clip%03d.mp4", "c l\ni'p.mp4"):
        os.replace(write_video(tmp_path / "clip.mp4", pictures(4)), name)
        assert which_frames(read_video(name, frames=[0, 3])) == [0, 3]


def test_transparent_pixels_are_white(tmp_path):
    """Dropping the alpha channel shows whatever colour hides under it."""
    (tmp_path / "f").mkdir()
    for k in range(2):
        Image.fromarray(np.zeros((56, 56, 4), np.uint8)).save(tmp_path / "f" / f"{k}.png")
    assert read_video(tmp_path / "f").frames.min() == 255


def test_annotated_mp4_is_found_as_mkv(tmp_path):
    """ActivityNet's annotations name no container; a third of its videos is .mkv or .webm."""
    write_video(tmp_path / "v_1.mkv", pictures(8))
    assert which_frames(read_video(tmp_path / "v_1.mp4", frames=[0, 5])) == [0, 5]


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """File name -> words that its reason must have."""
    folder = tmp_path_factory.mktemp("broken")
    good = write_video(folder / "good.mp4", pictures(20)).read_bytes()
    (folder / "empty.mp4").touch()
    (folder / "truncated.mp4").write_bytes(good[: len(good) // 2])
    (folder / "text.mp4").write_text("this is not a video\n" * 50)
    write_video(folder / "one_frame.mp4", pictures(1))
    write_video(folder / "narrow.mp4", pictures(4, 1000, 4))
    (folder / "no_frames").mkdir()
    write_folder(folder / "half", pictures(4))
    picture = folder / "half" / "00000002.jpg"
    picture.write_bytes(picture.read_bytes()[:200])
    return folder


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name, words", [
    ("absent.mp4", "no such file"), ("empty.mp4", "empty"),
    ("truncated.mp4", "truncated|cut off"), ("text.mp4", "not a video"),
    ("one_frame.mp4", "at least 2"), ("narrow.mp4", "aspect ratio over 200"), ("no_frames", "no .jpg"),
    ("half", "00000002.jpg"),
])
def test_whatever_cannot_be_read_says_which_file_and_why(broken, reader, name, words):
    """decord alone raises three kinds of exception, one of which `except RuntimeError` does not catch; FFmpeg's messages are
    numbers and names of C functions."""
    with pytest.raises(VideoError) as error:
        read_video(str(broken / name), reader=reader)
    assert error.value.path == str(broken / name) and re.search(words, error.value.reason)
    assert len(error.value.reason) < 400 and not re.search(r"\n|Errno|avcodec|\.c:|\.cc:", error.value.reason)
    copy = pickle.loads(pickle.dumps(error.value))  # it has to come out of a worker process
    assert (copy.path, copy.reason) == (error.value.path, error.value.reason)


def test_the_length_of_a_file_is_read_from_its_header(tmp_path):
    """A film without an annotated duration would have the deadline of a clip; a file that is none must not get a longer one."""
    assert readers.length_of(str(write_video(tmp_path / "v.mp4", pictures(40)))) == pytest.approx(4, abs=0.1)
    (tmp_path / "text.mp4").write_text("no video")
    assert readers.length_of(str(tmp_path / "text.mp4")) == readers.length_of(str(tmp_path)) == readers.length_of("/no") == 0


def test_a_folder_without_permission_costs_its_videos_and_not_the_run(tmp_path, monkeypatch):
    """Path.exists raises there, and so it does for a name that is too long with the root in front: both ended the training."""
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    with pytest.raises(VideoError, match="cannot be followed"):
        find_video(tmp_path / ("v" * 300))
    monkeypatch.setattr(type(tmp_path), "exists", refuse)
    with pytest.raises(VideoError, match="v.mp4: its path cannot be followed"):
        find_video(tmp_path / "v.mp4")
