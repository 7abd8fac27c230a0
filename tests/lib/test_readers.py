"""Video files as people have them, through both readers: the right frames, or which file and why not."""

import pickle
import re

import numpy as np
import pytest
import torch
from made_samples import QA
from PIL import Image
from video_files import CORNER, pictures, read_sample, set_rotation, which_frames, write_folder, write_video

from data import frame_indices, read_video
from lib.readers import VideoError, find_video

READERS = ("decord", "pyav")


@pytest.mark.parametrize("degrees, corner", [(90, (0, 1)), (180, (1, 1)), (270, (1, 0))])
def test_a_phone_held_sideways_shows_the_same_to_both_readers(tmp_path, degrees, corner):
    """PyAV leaves the rotation in the header to its user: people would lie on their side on one platform only."""
    file = set_rotation(write_video(tmp_path / "r.mp4", pictures(4, 128, 64, corner=True)), degrees)
    clips = [read_video(file, reader=reader, min_pixels=784) for reader in READERS]
    assert torch.equal(clips[0].frames, clips[1].frames)
    H, W = clips[0].frames.shape[-2:]
    quarters = clips[0].frames[0].float().mean(0)
    assert quarters[H // 4 + corner[0] * H // 2, W // 4 + corner[1] * W // 2] == pytest.approx(CORNER[0], abs=4)


def test_times_are_the_files_own_where_the_frame_rate_varies(tmp_path):
    """frame / average rate is wrong by seconds in screen recordings."""
    times = [0.1 * k for k in range(10)] + [1 + 0.5 * k for k in range(10)]
    file = write_video(tmp_path / "v.mp4", pictures(20), times=times)
    for reader in READERS:
        clip = read_video(file, frames=[0, 9, 10, 19], reader=reader)
        assert clip.seconds.tolist() == pytest.approx([0, 0.9, 1.0, 5.5], abs=2e-3)


def test_a_folder_of_frames_is_a_video_at_its_own_rate(tmp_path):
    """GOT-10k is 10 frames a second, not 2; and frame_10 is not the frame after frame_1."""
    folder = write_folder(tmp_path / "seq", pictures(12), names=[f"frame_{k}.jpg" for k in range(12)])
    (folder / "groundtruth.txt").write_text("no frame")
    clip = read_sample({**QA, "video": str(folder), "fps": 10})
    indices, sample_fps = frame_indices(12, 10)
    assert which_frames(clip) == indices and clip.sample_fps == sample_fps
    assert clip.seconds.tolist() == pytest.approx([k / 10 for k in indices])
    assert len(read_video(folder).frames) == 12  # at the default of 2 frames a second, all of them


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
    write_folder(folder / "sizes", [*pictures(3), *pictures(1, 32, 32)])
    write_folder(folder / "half", pictures(4))
    picture = folder / "half" / "00000002.jpg"
    picture.write_bytes(picture.read_bytes()[:200])
    return folder


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name, words", [
    ("absent.mp4", "no such file"), ("empty.mp4", "empty"),
    ("truncated.mp4", "nvalid data|truncated"), ("text.mp4", "nvalid data|not a video"),
    ("one_frame.mp4", "at least 2"), ("narrow.mp4", "aspect ratio over 200"), ("no_frames", "no .jpg"),
    ("sizes", "00000004.jpg"), ("half", "00000002.jpg"),
])
def test_whatever_cannot_be_read_says_which_file_and_why(broken, reader, name, words):
    """decord alone raises three kinds of exception, one of which `except RuntimeError` does not catch."""
    with pytest.raises(VideoError) as error:
        read_video(str(broken / name), reader=reader)
    assert error.value.path == str(broken / name) and re.search(words, error.value.reason)
    assert len(error.value.reason) < 400 and "\n" not in error.value.reason
    copy = pickle.loads(pickle.dumps(error.value))  # it has to come out of a worker process
    assert (copy.path, copy.reason) == (error.value.path, error.value.reason)


def test_a_folder_without_permission_costs_its_videos_and_not_the_run(tmp_path, monkeypatch):
    """Path.exists raises there, and so it does for a name that is too long with the root in front: both ended the training."""
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    with pytest.raises(VideoError, match="File name too long"):
        find_video(tmp_path / ("v" * 300))
    monkeypatch.setattr(type(tmp_path), "exists", refuse)
    with pytest.raises(VideoError, match="v.mp4: Permission denied"):
        find_video(tmp_path / "v.mp4")
