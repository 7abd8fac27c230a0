"""The files: a video or a folder of frames, as numpy frames and the time of each. Which frames are wanted, and how large,
is decided in data.py.

Asked for frame 300, a decoder that jumps into a file returns some frame, and not always that one: after an open GOP, a cut
without re-encoding or a missing time stamp it is one of seconds before or behind. So a frame is known here by its time stamp
alone, and there are two ways to it:

1. `_open_by_packets`: the packets of a file tell when each frame is shown, without decoding any. Frames are decoded from
   the beginning, or from a key frame on where the container has an index. What comes out of the decoder has to be what the
   packets promise, frame by frame, from that key frame on; else it is `IndexIsWrong`.
2. `_open_by_decoding`, for those files: everything is decoded once to see which frames there are and when, then once more
   up to the last wanted one. It takes twice the time and relies on nothing but the decoder's order.

decord is the second reader, of `check` (tools/check.py) only: in order, where it sees the same frames.

Left out: telling the decoder to skip frames that no other refers to and nobody wants. It saves up to two fifths of the
time (docs/data.md), but then nobody sees whether all frames are there.
"""

import re
from bisect import bisect_right
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from lib.pictures import to_rgb

# What pillow and data.read_video's arithmetic raise for a file they cannot use, and PyAV, whose errors are OSErrors,
# ValueErrors or EOFErrors. Anything else is a mistake in this program and is not caught.
DECODING_ERRORS = (RuntimeError, OSError, ValueError, EOFError, SyntaxError)
# Decoded frames depend on it: it is part of the key under which they are kept (lib/loader.py).
READER = f"pyav {av.__version__}, libavcodec {'.'.join(map(str, av.library_versions['libavcodec']))}"
INDEXED = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")  # formats whose packets keep their own time stamps after a jump
# What is opened: formats that hold their frames themselves. A playlist (HLS, DASH, ffconcat, SDP) names other files, whatever
# its own name ends in, and would show the model whatever lies there.
FORMATS = ("mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,asf,flv,ogg,mpegts,mpeg,mpegvideo,m4v,h264,hevc,obu,ivf,gif,apng,mjpeg,"
           "mxf,nut,rm,dv,wtv,vc1,yuv4mpegpipe")
GUESSED = ("avi", "mpeg", "mpegvideo")  # formats that have no time stamps for all frames: FFmpeg's demuxers guess the rest
DECODER_DELAY = 16  # frames that a decoder of H.264 or HEVC may hold back to put them in order, at most
NO_VIDEO = ("it is a playlist, a picture or of another kind that is not read as a video; give the video file itself, or a "
            "folder of pictures")
LONGEST = 4 * 3600.0  # seconds that a header may claim: it may be damaged
REMEDY = "download it again, or re-encode it with ffmpeg"


class VideoError(Exception):
    """A video, or a picture, that cannot be read: `path` and `reason`. Never repaired, never replaced by another."""

    def __init__(self, path: str | Path, reason: str):
        super().__init__(str(path), reason)  # both in args, so that it survives pickling
        self.path, self.reason = str(path), reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class IndexIsWrong(Exception):
    """The decoder shows other frames than the packets' time stamps promise: the file must be read by decoding it."""


class Clock(NamedTuple):
    """What a header says of time. Read while the file is open: PyAV crashes where a stream is asked after that."""
    base: Fraction  # seconds of a unit of time stamps
    rates: list[Fraction]  # frames a second: the average, and the rate whose multiples all time stamps are


class Source(NamedTuple):
    """An opened video, whatever reads it."""
    num_frames: int
    fps: float
    begins: np.ndarray  # (num_frames,) float64 seconds by the file's own clock, 0 = the first frame that is shown
    is_constant: bool  # frame k begins at k / fps, to half a frame
    fetch: Callable[[list[int]], Iterator[np.ndarray]]  # once: ascending indices to frames (H, W, 3) of uint8


def first_line(error: Exception) -> str:
    """Of an error's message, without the path that VideoError names anyway."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]


def find_video(path: str | Path) -> Path:
    """The path itself, or the same name with another container's suffix: annotations guess .mp4 where ActivityNet
    has .mkv and .webm. VideoError where there is nothing, or nothing in it."""
    path = Path(path)
    try:
        found = next((p for p in (path, path.with_suffix(".mkv"), path.with_suffix(".webm")) if p.exists()), None)
        is_empty = found is not None and found.is_file() and found.stat().st_size == 0
    except (OSError, ValueError) as error:  # a loop of links, a name that is too long, a null byte in it
        raise VideoError(path, f"its path cannot be followed ({first_line(error)}); check the path") from error
    if found is None:
        raise VideoError(path, "no such file; check the path, and --video_root where there is one")
    if is_empty:
        raise VideoError(found, "the file is empty")
    return found


def open_video(path: Path, fps: float = 2.0, reader: str | None = None) -> Source:
    """A folder of frames at `fps`, or a file. reader: None for the quick way ("pyav" is the same), "decoding" for the thorough
    one; to compare with, "earlier" jumps to an earlier key frame than it needs, and "decord" is the second reader. Opening and
    fetching raise IndexIsWrong where the quick way does not work, and DECODING_ERRORS."""
    if path.is_dir():
        return _open_folder(path, fps)
    ways = {None: _open_by_packets, "pyav": _open_by_packets, "earlier": partial(_open_by_packets, earlier=2),
            "decoding": _open_by_decoding, "decord": _open_decord}
    return ways[reader](path)


def length_of(path: str) -> float:
    """Seconds of a file by its header, for a deadline: 0 where it does not tell, or cannot be opened, or is a folder."""
    try:
        container, _ = _open_container(find_video(path))
        with container:
            return min((container.duration or 0) / av.time_base, LONGEST)
    except (VideoError, *DECODING_ERRORS):
        return 0.0


# ---- a file, by the time stamps of its packets --------------------------------------------------------------------------


def _open_by_packets(path: Path, earlier: int = 0) -> Source:
    container, stream = _open_container(path)
    is_indexed = container.format.name in INDEXED
    is_in_fragments = container.format.name == INDEXED[0] and not stream.frames
    times, keys, start, number = [], {}, None, 0
    for number, packet in enumerate(_packets(container, stream), 1):
        place = packet.dts if is_in_fragments else packet.pts  # FFmpeg finds those by when they are decoded, all others exactly
        if packet.pts is None or place is None or (number == 1 and not packet.is_keyframe):
            raise IndexIsWrong
        start = place if start is None else start
        if packet.is_discard:  # hidden by an edit list: decoded, for the frames behind it, and not shown
            continue
        times.append(packet.pts)
        if packet.is_keyframe and is_indexed:
            keys[packet.pts] = place
    _refuse_if_truncated(container, stream, number)
    times.sort()
    if len(set(times)) < len(times):
        raise IndexIsWrong

    def fetch(indices: list[int]) -> Iterator[np.ndarray]:
        if is_indexed:
            _jump(container, stream, start)
            opened = container, stream
        else:
            opened = _open_container(path)
        with opened[0]:
            yield from _fetch_in_order(*opened, times, keys, indices, earlier)

    return _source(times, _clock(stream), fetch)


def _fetch_in_order(container, stream, times: list[int], keys: dict[int, int], indices: list[int],
                    earlier: int) -> Iterator[np.ndarray]:
    """Frames `indices` of those that begin at `times`; `keys` tells where to jump to for the key frames among them. `earlier`:
    how many key frames before the last one that would do.

    Every frame from the one that decoding begins with to the wanted one has to be the next of `times`. IndexIsWrong if not.
    """
    place = {time: index for index, time in enumerate(times)}
    key_places = sorted(place[time] for time in keys)
    converter = VideoReformatter()
    frames, at = _decode(container, stream), -1  # number of the frame decoded last; None: not yet at a key frame
    for index in indices:
        key = key_places[max(bisect_right(key_places, index) - 1 - earlier, 0)] if key_places else -1
        if at + 1 < key <= index:
            _jump(container, stream, keys[times[key]])
            frames, at = _decode(container, stream), None
        while at != index:
            frame = next(frames, "end")
            if at is None and (frame is None or frame != "end" and not frame.key_frame):
                continue  # on the way to a key frame: frames that need others from before the jump
            if frame is None or frame == "end" or frame.is_corrupt:
                raise IndexIsWrong
            number = place.get(frame.pts, -1)
            if number > index or (number < 0 if at is None else number != at + 1):
                raise IndexIsWrong
            at = number
        yield _pixels(frame, converter)


# ---- a file, by decoding all of it --------------------------------------------------------------------------------------


def _open_by_decoding(path: Path) -> Source:
    container, stream = _open_container(path)
    with container:
        keys = []
        try:
            keys.extend(packet.is_keyframe for packet in _packets(container, stream))
        except IndexIsWrong:  # it cannot be read to its end
            pass
        _refuse_if_truncated(container, stream, len(keys))
        begins_at_key = keys[:1] == [True]
    container, stream = _open_container(path)
    with container:
        clock, is_guessed, times, damages = _clock(stream), container.format.name in GUESSED, [], []
        for frame in _shown(container, stream, begins_at_key):
            if frame is None or frame.is_corrupt:
                damages.append(len(times))
            if frame is not None:
                times.append(frame.pts)
    if None in times:
        raise ValueError("its frames have no time stamps; put them into an .mp4, at the rate that they were taken at, with "
                         "ffmpeg")
    if is_guessed:
        times = _without_wrong_guesses(times, clock)
    if back := next((k for k in range(1, len(times)) if times[k] < times[k - 1]), None):
        raise ValueError(f"its clock jumps back from {float(times[back - 1] * clock.base):.2f} s to "
                         f"{float(times[back] * clock.base):.2f} s; re-encode it with ffmpeg")
    damage = min(damages, default=len(times))

    def fetch(indices: list[int]) -> Iterator[np.ndarray]:
        if indices[-1] >= damage:
            begin = float((times[min(damage, len(times) - 1)] - times[0]) * clock.base)
            raise ValueError(f"damaged: it cannot be decoded without errors from {begin:.2f} s on; {REMEDY}")
        wanted, converter = set(indices), VideoReformatter()
        again, its_stream = _open_container(path)
        with again:
            frames = _shown(again, its_stream, begins_at_key)
            for number, frame in enumerate(frame for frame in frames if frame is not None):
                if number in wanted:
                    yield _pixels(frame, converter)
                if number == indices[-1]:
                    return

    return _source(times, clock, fetch)


def _without_wrong_guesses(times: list[int], clock: Clock) -> list[int]:
    """Evenly spaced at the header's rate, where guesses go back: if that takes as long from the first frame to the last, and
    none is further off than a decoder's delay. Two recordings one behind the other are."""
    if not clock.rates or times == sorted(times):
        return times
    frame = 1 / clock.rates[0] / clock.base  # in units of the clock
    even = [min(times) + round(k * frame) for k in range(len(times))]
    is_even = abs(max(times) - even[-1]) <= frame / 2 and all(
        abs(time - own) <= DECODER_DELAY * frame for time, own in zip(times, even))
    return even if is_even else times


def _shown(container, stream, begins_at_key: bool) -> Iterator:
    """Without the frames that lead up to the first key frame: a recording that begins in the middle has no pictures until
    then. Where an edit list hides the key frame, the first frame that is shown is none, but whole."""
    has_begun = False
    for frame in _decode(container, stream):
        if frame is not None and not has_begun:
            has_begun = frame.key_frame or begins_at_key and not frame.is_corrupt
        if has_begun or frame is None:
            yield frame


# ---- what both need -----------------------------------------------------------------------------------------------------


def _open_container(path: Path) -> tuple:
    """PyAV's container and its video stream. ValueError in our words."""
    try:  # file: a name like http:x.mp4 is no address
        container = av.open(f"file:{path}", options={"format_whitelist": FORMATS}, metadata_errors="replace")
    except av.error.ArgumentError as error:
        raise ValueError(NO_VIDEO) from error
    except (av.error.InvalidDataError, EOFError) as error:
        with open(path, "rb") as file:  # FFmpeg knows some playlists by their name only
            is_playlist = file.read(64).lstrip(b"\xef\xbb\xbf \r\n").startswith((b"#EXTM3U", b"ffconcat", b"<?xml", b"v=0"))
        reason = NO_VIDEO if is_playlist else f"not a video, or its header is damaged or cut off; {REMEDY}"
        raise ValueError(reason) from error
    except av.FFmpegError as error:
        raise ValueError(f"it cannot be opened ({error.strerror}); {REMEDY}") from error
    stream = container.streams.best("video")
    if stream is None:
        raise ValueError("it has no video stream; check the file")
    if stream.codec_context is None:
        raise ValueError("there is no decoder for its codec; re-encode it with ffmpeg")
    stream.codec_context.thread_count = 1  # there are as many workers as cores
    return container, stream


def _jump(container, stream, place: int) -> None:
    try:
        container.seek(place, stream=stream)
    except av.FFmpegError as error:
        raise IndexIsWrong from error


def _packets(container, stream) -> Iterator:
    """IndexIsWrong where the file is damaged: what can be decoded of it is to be seen."""
    try:
        for packet in container.demux(stream):
            if packet.size:  # the last one is empty, for the decoder to give out what it has left
                yield packet
    except av.FFmpegError as error:
        raise IndexIsWrong from error


def _refuse_if_truncated(container, stream, number: int) -> None:
    """ValueError where an .mp4 lists more frames than the `number` in it. One in fragments has a list in each of them."""
    listed = len(stream.index_entries) if container.format.name == INDEXED[0] and stream.frames else 0
    if number < listed:
        raise ValueError(f"truncated: its header lists {listed} frames, {number} are in the file; {REMEDY}")


def _decode(container, stream) -> Iterator:
    """Frames in the order in which they are shown. None stands for packets that are damaged or cannot be decoded, between the
    first key frame and the last packet: where a recording is cut off, what comes before is whole. Frames with `is_corrupt` have
    been patched up by the decoder."""
    packets, has_begun, has_failed = container.demux(stream), False, False
    while True:
        try:
            packet = next(packets, None)
            if packet is None:
                return
            if has_failed and packet.size:
                yield None
                has_failed = False
            has_begun = has_begun or packet.is_keyframe
            if packet.is_corrupt:
                has_failed = has_begun
            else:
                yield from packet.decode()
        except av.FFmpegError:
            has_failed = has_begun


def _pixels(frame, converter: VideoReformatter) -> np.ndarray:
    """(H, W, 3) uint8, upright: phones write into the header how they were held. One `converter` for all frames of a file: to
    set one up, with its threads, takes longer than to convert a small frame."""
    pixels = converter.reformat(frame, format="rgb24", threads=1).to_ndarray()
    return np.rot90(pixels, round(frame.rotation / 90)).copy()


def _clock(stream) -> Clock:
    return Clock(stream.time_base, [rate for rate in (stream.average_rate, stream.guessed_rate) if rate])


def _source(times: list[int], clock: Clock, fetch: Callable) -> Source:
    """`times` in units of the clock. The rate is one of the header's where the times agree with it, else a measured one."""
    if not times:
        raise ValueError(f"it has no frames that can be decoded: truncated, or damaged; {REMEDY}")
    begins = (np.array(times, dtype=np.int64) - times[0]) * float(clock.base)
    measured = [(len(times) - 1) / begins[-1]] if begins[-1] > 0 else []
    for rate in map(float, clock.rates + measured):
        if np.abs(begins * rate - np.arange(len(times))).max() <= 0.5:
            return Source(len(times), rate, begins, True, fetch)
    if not measured:
        raise ValueError("all of its frames have one time stamp; re-encode it with ffmpeg")
    return Source(len(times), float(measured[0]), begins, False, fetch)


# ---- the second reader, and folders -------------------------------------------------------------------------------------


def _open_decord(path: Path) -> Source:
    """Frames one after the other, of files with a list of their frames and a constant rate: there that is right, if decord
    sees as many of them as there are, at the same times. (Not so in .ts, fragments or .flv, where it loses the first ones; it
    also shows frames that an edit list hides.) ValueError where it cannot be relied on."""
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    source = _open_by_packets(path)
    container, stream = _open_container(path)
    with container:
        is_listed = container.format.name == INDEXED[1] or container.format.name == INDEXED[0] and stream.frames > 0
    if not is_listed or not source.is_constant:
        raise ValueError("decord is not to be relied on for a file of this kind")
    try:  # One thread: with three or more decord 0.6.0 fails on valid VP9 files. And str: it refuses Path objects.
        video = decord.VideoReader(str(path.absolute()), num_threads=1)
        begins = video.get_frame_timestamp(range(len(video)))[:, 0].astype(np.float64)
    except (RuntimeError, decord._ffi.base.DECORDError) as error:  # the latter is no RuntimeError, and exported nowhere else
        raise ValueError("decord cannot open it") from error
    if len(begins) != source.num_frames or np.abs(begins - begins[0] - source.begins).max() > 0.5 / source.fps:
        raise ValueError("decord sees other frames in it, or at other times")

    def fetch(indices: list[int]) -> Iterator[np.ndarray]:
        wanted = set(indices)
        try:
            for index in range(indices[-1] + 1):
                frame = video.next()
                if index in wanted:
                    yield frame.asnumpy()
        except (RuntimeError, StopIteration, decord._ffi.base.DECORDError) as error:
            raise ValueError("decord cannot decode it") from error

    return source._replace(fetch=fetch)


def _open_folder(path: Path, fps: float) -> Source:
    # Names with a dot in front are no frames: macOS leaves ._00001.jpg beside 00001.jpg.
    files = [file for file in path.iterdir()
             if file.suffix.lower() in (".jpg", ".jpeg", ".png") and not file.name.startswith(".")]
    if not files:
        raise ValueError("the folder holds no .jpg, .jpeg or .png")
    # By number, not by letter: frame_10 comes after frame_9. Numbers stand at the odd places.
    files.sort(key=lambda file: ([int(part) if k % 2 else part for k, part in enumerate(re.split(r"(\d+)", file.name))],
                                 file.name))

    def fetch(indices: list[int]) -> Iterator[np.ndarray]:
        for index in indices:
            yield _read_image(files[index])

    return Source(len(files), float(fps), np.arange(len(files)) / fps, True, fetch)


def _read_image(file: Path) -> np.ndarray:
    """(H, W, 3) uint8; transparent pixels are white, as qwen-vl-utils has them."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            return to_rgb(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"frame {file.name}: {first_line(error)}") from error
