"""What reading a video costs, in CPU seconds, by `read_video` and by other ways: `python tests/reading_cost.py`.

    python tests/reading_cost.py                          files of 30 s, 10 min and 60 min; about ten minutes
    python tests/reading_cost.py --seconds 30 --repeat 5  one short file, five times

The files are ordinary ones, made here: H.264 as x264 writes it (a key frame every 250 frames at most, B-frames, closed GOPs),
854 x 480 pixels, 30 frames a second; a minute is encoded and its packets repeated. Each figure is the least of `--repeat`
processes of one thread, and holds opening and the frames that are shown (2 a second, at most 768); `read_video`'s also the
resize.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from bisect import bisect_right
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter

ROOT = Path(__file__).resolve().parent.parent
RATE, MINUTE = 30, 60
CONVERTER = VideoReformatter()


def write(path: Path, seconds: int) -> Path:
    """Stripes that move under grain: about 2 Mbit/s, as such files have."""
    rng, x = np.random.default_rng(0), np.arange(854)
    noise = rng.integers(0, 32, (480, 854, 3), dtype=np.uint8)
    minute = path.with_name("minute.mp4")
    if not minute.exists():
        with av.open(str(minute), "w") as container:
            options = {"crf": "24", "preset": "veryfast", "x264-params": "b-adapt=0"}
            stream = container.add_stream("libx264", rate=RATE, options=options)
            stream.width, stream.height, stream.pix_fmt = 854, 480, "yuv420p"
            for k in range(MINUTE * RATE):
                stripes = (100 + 80 * np.sin((x + 7 * k) / 60)).astype(np.uint8)[None, :, None]
                grain = np.roll(noise, tuple(rng.integers(0, 480, 2)), axis=(0, 1))  # that of each frame is new
                container.mux(stream.encode(av.VideoFrame.from_ndarray(grain + stripes, format="rgb24")))
            container.mux(stream.encode())
    with av.open(str(path), "w") as new:
        for start in range(0, seconds, MINUTE):
            with av.open(str(minute)) as old:
                stream = old.streams.video[0]
                copy = new.streams.video[0] if start else new.add_stream_from_template(stream)
                for packet in old.demux(stream):
                    if packet.size and packet.pts * stream.time_base < seconds - start:
                        shift = round(start / stream.time_base)
                        packet.pts, packet.dts, packet.stream = packet.pts + shift, packet.dts + shift, copy
                        new.mux(packet)
    return path


def open_file(path: str) -> tuple:
    """Container, stream, times of all frames, times of key frames, times of the wanted ones."""
    from data import frame_indices

    container = av.open(path)
    stream = container.streams.best("video")
    stream.codec_context.thread_count = 1
    packets = sorted((packet.pts, packet.is_keyframe) for packet in container.demux(stream) if packet.size)
    wanted = [packets[index][0] for index in frame_indices(len(packets), RATE)[0]]
    return container, stream, [time for time, is_key in packets if is_key], wanted


def rgb(frame) -> np.ndarray:
    return CONVERTER.reformat(frame, format="rgb24", threads=1).to_ndarray()


def pyav_in_order(path: str) -> int:
    container, stream, _, wanted = open_file(path)
    container.seek(0, stream=stream)
    wanted = set(wanted)
    return sum(rgb(frame).any() for frame in container.decode(stream) if frame.pts in wanted)


def pyav_for_each(path: str) -> int:
    """From the key frame before, for each frame anew."""
    container, stream, keys, wanted = open_file(path)
    for pts in wanted:
        container.seek(keys[bisect_right(keys, pts) - 1], stream=stream)
        rgb(next(frame for frame in container.decode(stream) if frame.pts == pts))
    return len(wanted)


def pyav_without_unused(path: str) -> int:
    """In order, without decoding frames that nobody wants and no other refers to."""
    container, stream, _, wanted = open_file(path)
    container.seek(0, stream=stream)
    shown, wanted = 0, set(wanted)
    for packet in container.demux(stream):
        stream.codec_context.skip_frame = "DEFAULT" if packet.pts is None or packet.pts in wanted else "NONREF"
        shown += sum(rgb(frame).any() for frame in packet.decode() if frame.pts in wanted)
    return shown


def decord_jumping(path: str) -> int:
    import decord

    from data import frame_indices

    video = decord.VideoReader(path, num_threads=1)
    wanted, _ = frame_indices(len(video), RATE)
    return sum(len(video.get_batch(wanted[at:at + 4]).asnumpy()) for at in range(0, len(wanted), 4))


def decord_in_order(path: str) -> int:
    import decord

    from data import frame_indices

    video = decord.VideoReader(path, num_threads=1)
    wanted = set(frame_indices(len(video), RATE)[0])
    frames = (video.next() for _ in range(max(wanted) + 1))
    return sum(frame.asnumpy().any() for k, frame in enumerate(frames) if k in wanted)


def read_video_of(path: str, **arguments) -> int:
    from data import read_video

    return len(read_video(path, **arguments).frames)


def read_video_part(path: str) -> int:
    """The last ten seconds."""
    seconds = float(Path(path).stem)
    return read_video_of(path, start=seconds - 10)


def read_video_by_decoding(path: str) -> int:
    """What a file costs whose packets and frames disagree."""
    return read_video_of(path, reader="decoding")


WAYS = (read_video_of, read_video_part, read_video_by_decoding, pyav_in_order, pyav_for_each, pyav_without_unused, decord_jumping,
        decord_in_order)


def measure(way: str, path: str) -> None:
    """In a process of its own, which prints CPU seconds, frames and MB."""
    import torch

    torch.set_num_threads(1)
    import data  # noqa: F401  not in the figure
    began = time.process_time()
    frames = globals()[way](path)
    print(time.process_time() - began, frames, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=int, nargs="+", default=[30, 600, 3600], help="lengths of the files (%(default)s)")
    parser.add_argument("--repeat", type=int, default=2, help="the least of so many (%(default)s)")
    parser.add_argument("--ways", nargs="+", default=[way.__name__ for way in WAYS], help="only these (%(default)s)")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        return measure(*args.measure)
    with tempfile.TemporaryDirectory() as folder:
        for seconds in args.seconds:
            path = write(Path(folder) / f"{seconds}.mp4", seconds)
            for way in args.ways:
                command = [sys.executable, str(Path(__file__).resolve()), "--measure", way, str(path)]
                runs = [list(map(float, subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
                                 .stdout.split())) for _ in range(args.repeat)]
                cpu, frames, memory = min(runs)
                print(f"{seconds:5d} s  {way:24s} {cpu:7.2f} CPU s  {frames:4.0f} frames  "
                      f"{1000 * cpu / max(frames, 1):7.1f} ms each  {memory:5.0f} MB", flush=True)


sys.path.insert(0, str(ROOT))
if __name__ == "__main__":
    main()
