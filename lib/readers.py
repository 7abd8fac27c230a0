"""The files: a video or a folder of frames, opened by decord or PyAV, as numpy frames and the time of each.

Two readers, because decord is fast and has no wheel on some machines, and because a second one, which reads from the first
frame on instead of jumping, tells whether the first has shown the right frames (tools/check.py). Which frames are wanted,
and how large, is decided in data.py.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

try:
    import decord
    decord.logging.set_level(decord.logging.QUIET)
    DECODER_ERROR = decord._ffi.base.DECORDError  # is no RuntimeError, and decord exports it nowhere else
except ImportError:  # no wheel for this platform: PyAV decodes
    decord, DECODER_ERROR = None, RuntimeError
# What decoders, pillow and data.read_video's arithmetic raise for a file they cannot use. PyAV's and pillow's errors are
# OSErrors or ValueErrors. Anything else is a mistake in this program and is not caught.
DECODING_ERRORS = (RuntimeError, OSError, ValueError, EOFError, SyntaxError, DECODER_ERROR)


class VideoError(Exception):
    """A video that cannot be read: `path` and `reason`. Never repaired, never replaced by another video."""

    def __init__(self, path: str | Path, reason: str):
        super().__init__(str(path), reason)  # both in args, so that it survives pickling
        self.path, self.reason = str(path), reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class Source(NamedTuple):
    """An opened video, whatever reads it."""
    num_frames: int
    fps: float
    begins: np.ndarray  # (num_frames,) float64 seconds, on the file's own clock
    fetch: Callable[[list[int]], Iterator[np.ndarray]]  # ascending indices to chunks (n, H, W, 3) of uint8


def first_line(error: Exception) -> str:
    """decord's messages carry a C++ stack trace."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return re.sub(r"^\[.*?\] \S*: ", "", lines[0])[:300]


def find_video(path: str | Path) -> Path:
    """The path itself, or the same name with another container's suffix: annotations guess .mp4 where ActivityNet
    has .mkv and .webm. VideoError where there is nothing, or nothing in it."""
    path = Path(path)
    try:
        found = next((p for p in (path, path.with_suffix(".mkv"), path.with_suffix(".webm")) if p.exists()), None)
    except OSError as error:  # a folder without permission, a name that is too long: costs this video, not the run
        raise VideoError(path, error.strerror or str(error)) from error
    if found is None:
        raise VideoError(path, "no such file; check the path, and --video_root where there is one")
    if found.is_file() and found.stat().st_size == 0:
        raise VideoError(found, "the file is empty")
    return found


def open_video(path: Path, fps: float = 2.0, reader: str | None = None) -> Source:
    """A folder of frames at `fps`, or a file through `reader` ("decord", "pyav", None: decord where there is one)."""
    if path.is_dir():
        return _open_folder(path, fps)
    return _open_decord(path) if (reader or ("decord" if decord else "pyav")) == "decord" else _open_pyav(path)


def _open_decord(path: Path) -> Source:
    try:  # One thread: with three or more decord 0.6.0 fails on valid VP9 files. And str: it refuses Path objects.
        video = decord.VideoReader(str(path), num_threads=1)
    except (RuntimeError, DECODER_ERROR) as error:  # its own message is "Error reading PATH..."
        raise ValueError("decord cannot open it: not a video, of a kind it does not know, or truncated") from error
    begins = video.get_frame_timestamp(range(len(video)))[:, 0].astype(np.float64)

    def fetch(indices: list[int]) -> Iterator[np.ndarray]:
        for at in range(0, len(indices), 4):  # in chunks: a frame of 4K video takes 100 MB on its way through _resize
            yield video.get_batch(indices[at:at + 4]).asnumpy()

    return Source(len(video), float(video.get_avg_fps()), begins, fetch)


def _open_pyav(path: Path) -> Source:
    """Reads from the first frame on: slower than jumping, but right in every kind of file."""
    import av

    with av.open(str(path)) as container:
        if not container.streams.video:
            raise ValueError("it has no video stream")
        stream = container.streams.video[0]
        # The container's own frame count is often 0 or wrong, its packets are not.
        times = sorted(packet.pts for packet in container.demux(stream)
                       if packet.pts is not None and not packet.is_discard)
        begins, rate = np.array(times, dtype=np.float64) * float(stream.time_base), stream.average_rate
    if not times or not rate:
        raise ValueError("it has no frames")

    def fetch(indices: list[int]) -> Iterator[np.ndarray]:
        wanted = {times[index] for index in indices}  # by time: a frame that cannot be decoded shifts no other
        with av.open(str(path)) as container:
            for frame in container.decode(video=0):
                if frame.pts in wanted:  # decord applies the rotation that phones write into the header, PyAV does not
                    yield np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)[None].copy()
                if frame.pts == times[indices[-1]]:
                    return

    return Source(len(begins), float(rate), begins, fetch)


def _open_folder(path: Path, fps: float) -> Source:
    files = [file for file in path.iterdir() if file.suffix.lower() in (".jpg", ".jpeg", ".png")]
    if not files:
        raise ValueError("the folder holds no .jpg, .jpeg or .png")
    # By number, not by letter: frame_10 comes after frame_9.
    files.sort(key=lambda file: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", file.name)])

    def fetch(indices: list[int]) -> Iterator[np.ndarray]:
        size = None
        for index in indices:
            frame = _read_image(files[index])
            if size not in (None, frame.shape):
                raise ValueError(f"{files[index].name} has {frame.shape[1]} x {frame.shape[0]} pixels, the frame "
                                 f"before it {size[1]} x {size[0]}; all frames of a folder must have one size")
            size = frame.shape
            yield frame[None]

    return Source(len(files), float(fps), np.arange(len(files)) / fps, fetch)


def _read_image(file: Path) -> np.ndarray:
    """(H, W, 3) uint8; transparent pixels are white, as qwen-vl-utils has them."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            if image.mode in ("RGBA", "LA") or "transparency" in image.info:
                rgba = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
            return np.array(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"frame {file.name}: {first_line(error)}") from error
