"""Strange video files, made by PyAV alone in a few seconds, whose frames say their number: 12 blocks in 3 rows of 4, one bit
each, black or white. All of them are 8 frames a second, unless said otherwise."""

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

FPS, COUNT = 8, 96
CLOSED = {"crf": "12", "preset": "ultrafast", "threads": "1",
          "x264-params": "keyint=16:min-keyint=16:scenecut=0:bframes=3:b-adapt=0"}
OPEN = {**CLOSED, "x264-params": CLOSED["x264-params"] + ":open-gop=1"}
LONG = {**CLOSED, "x264-params": "keyint=40:min-keyint=40:scenecut=0:bframes=2:b-adapt=0"}
REFRESH = {**CLOSED, "x264-params": "keyint=24:intra-refresh=1"}
HEVC = {"preset": "ultrafast", "crf": "10",
        "x265-params": "log-level=none:pools=1:frame-threads=1:keyint=24:min-keyint=24:open-gop=1:bframes=3"}


def numbered(number: int, width: int = 112, height: int = 84) -> np.ndarray:
    """(height, width, 3) uint8."""
    bits = np.array([235 if number >> k & 1 else 20 for k in range(12)], np.uint8).reshape(3, 4)
    rows, columns = np.arange(height) * 3 // height, np.arange(width) * 4 // width
    return np.repeat(bits[rows][:, columns, None], 3, axis=2)


def read_number(frame: np.ndarray) -> int:
    """Of (3, H, W) uint8; -1 where a block is neither black nor white."""
    grey = frame.astype(float).mean(0)
    H, W = grey.shape
    rows, columns = (np.array([.3, .7]) * side for side in (H / 3, W / 4))
    values = []
    for k in range(12):
        (top, bottom), (left, right) = (rows + k // 4 * H / 3).astype(int), (columns + k % 4 * W / 4).astype(int)
        values.append(grey[top:bottom + 1, left:right + 1].mean())
    return -1 if any(80 < value < 175 for value in values) else sum((value > 127) << k for k, value in enumerate(values))


def encode(path: Path, codec: str = "libx264", options: dict = CLOSED, *, numbers=range(COUNT), times=None, fps=FPS,
           size=(112, 84), pixels: str = "yuv420p", format: str | None = None, muxer: dict | None = None) -> Path:
    """Frames `numbers`, evenly spaced or at `times` (seconds)."""
    with av.open(str(path), "w", format=format, options=muxer or {}) as container:
        stream = container.add_stream(codec, rate=Fraction(fps), options=options)
        stream.width, stream.height, stream.pix_fmt = *size, pixels
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for k, number in enumerate(numbers):
            frame = av.VideoFrame.from_ndarray(numbered(number, *size), format="rgb24").reformat(format=pixels)
            base = Fraction(1, fps) if times is None else Fraction(1, 1000)
            frame.pts, frame.time_base = k if times is None else round(times[k] * 1000), base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def remux(source: Path, path: Path, *, start: float = 0.0, shift: float = 0.0, muxer: dict | None = None,
          format: str | None = None) -> Path:
    """The packets from the key frame before `start` on, copied; the frame at `start` gets the time `shift`."""
    with av.open(str(source)) as old, av.open(str(path), "w", format=format, options=muxer or {}) as new:
        stream = old.streams.video[0]
        copy = new.add_stream_from_template(stream)
        old.seek(round(start / stream.time_base), stream=stream)
        offset = round((shift - start) / stream.time_base)
        for packet in old.demux(stream):
            if packet.size:
                packet.pts, packet.dts, packet.stream = packet.pts + offset, packet.dts + offset, copy
                new.mux(packet)
    return path


def replaced(path: Path, change: Callable[[bytes], bytes]) -> Path:
    path.write_bytes(change(path.read_bytes()))
    return path


def flipped(data: bytes, begin: float = 0.3, end: float = 0.8, count: int = 20) -> bytes:
    data, rng = bytearray(data), np.random.default_rng(0)
    for place in rng.integers(int(begin * len(data)), int(end * len(data)), count):
        data[place] ^= 1 << int(rng.integers(8))
    return bytes(data)


def even(first: int = 0, count: int = COUNT, fps: float = FPS, number: int | None = None) -> list[tuple[float, int]]:
    return [(k / fps, (first if number is None else number) + k) for k in range(count)]


def make(folder: Path) -> dict[str, tuple[Path, list[tuple[float, int]] | None]]:
    """name -> the file, and (second, number) of every frame as it is shown; None: it must be a VideoError."""
    made = {}

    def add(path: Path, shown: list | None) -> Path:
        made[path.name] = path, shown
        return path

    closed, opened = add(encode(folder / "closed.mp4"), even()), add(encode(folder / "open.mp4", options=OPEN), even())
    long = add(encode(folder / "long.mp4", options=LONG), even())
    for name in ("open.mkv", "open.ts", "open.flv", "open.mov"):
        add(remux(opened, folder / name), even())
    add(encode(folder / "bframes.avi", "mpeg4", {"qscale": "2", "bf": "2", "g": "40"}), even())
    add(encode(folder / "h264.avi", options=CLOSED), even())
    for name in ("mpeg2.mpg", "mpeg2.ts", "mpeg2.mp4"):
        add(encode(folder / name, "mpeg2video", {"b": "4M", "bf": "2", "g": "15"}, fps=25), even(fps=25))
    add(encode(folder / "wmv2.wmv", "wmv2", {"b": "4M"}), even())
    add(encode(folder / "motion.gif", "gif", {}, fps=10, pixels="rgb8"), even(fps=10))
    vp9 = {"crf": "10", "b": "0", "cpu-used": "8", "deadline": "realtime", "g": "32"}
    add(encode(folder / "vp9.webm", "libvpx-vp9", vp9), even())
    add(encode(folder / "av1.mp4", "libsvtav1", {"preset": "12", "crf": "20", "g": "32", "svtav1-params": "lp=1"}), even())
    hevc = add(encode(folder / "hevc.mp4", "libx265", HEVC), even())
    add(remux(hevc, folder / "hevc.mkv"), even())
    refresh = add(encode(folder / "refresh.mp4", options=REFRESH), even())
    # where key frames are not what the header says
    for source in (opened, refresh, made["mpeg2.mp4"][0]):
        copy = folder / f"all_keys_{source.name}"
        copy.write_bytes(source.read_bytes().replace(b"stss", b"free"))
        add(copy, made[source.name][1])
    # cut, shifted, in pieces
    add(remux(long, folder / "cut.mp4", start=6.25), even(50, COUNT - 50))
    add(remux(opened, folder / "open_cut.mp4", start=5.0), even(40, COUNT - 40))
    add(remux(closed, folder / "late.mp4", shift=3.0), even())
    add(remux(closed, folder / "negative.mp4", shift=-2.0, muxer={"avoid_negative_ts": "disabled"}), even(16, COUNT - 16))
    fragments = add(remux(opened, folder / "fragments.mp4", muxer={"movflags": "frag_keyframe+empty_moov"}), even())
    part = folder / "fragments_cut.mp4"
    part.write_bytes(fragments.read_bytes()[: fragments.stat().st_size * 6 // 10])
    add(part, even())
    live = add(remux(opened, folder / "live.mkv", muxer={"live": "1"}), even())
    cut = folder / "live_cut.mkv"
    cut.write_bytes(live.read_bytes()[: live.stat().st_size * 7 // 10])
    add(cut, even())
    stream = remux(long, folder / "long.ts").read_bytes()
    (folder / "middle.ts").write_bytes(stream[: 188 * 4] + stream[len(stream) // 4 // 188 * 188:])
    add(folder / "middle.ts", even(40, COUNT - 40))
    (folder / "two_clocks.ts").write_bytes(stream + stream)
    add(folder / "two_clocks.ts", None)
    # clocks
    times = [k / 20 if k < 40 else 2 + (k - 40) / 2 for k in range(COUNT)]
    vfr = add(encode(folder / "vfr.mp4", times=times), list(zip(times, range(COUNT))))
    add(remux(vfr, folder / "vfr.mkv"), made["vfr.mp4"][1])
    gap = [k / 8 + (4 if k >= 50 else 0) for k in range(COUNT)]
    add(encode(folder / "gap.mp4", times=gap), list(zip(gap, range(COUNT))))
    twice = [k // 2 / 4 for k in range(COUNT)]
    twice_options = {"crf": "12", "bf": "0", "threads": "1"}
    add(encode(folder / "twice.mkv", options=twice_options, times=twice), list(zip(twice, range(COUNT))))
    add(encode(folder / "raw.h264", options=CLOSED, format="h264"), None)
    # damaged
    for source in (closed, long):
        copy = folder / f"flipped_{source.name}"
        copy.write_bytes(flipped(source.read_bytes()))
        add(copy, even())
    faststart = remux(closed, folder / "half.mp4", muxer={"movflags": "faststart"})
    add(replaced(faststart, lambda data: data[: len(data) // 2]), None)
    return made
