"""Real little video files for the tests. Frame k is grey with the value `grey(k)`, so that a decoded frame tells which
one it is; its upper left quarter is `CORNER`, so that it tells which way up it is."""

import struct
from fractions import Fraction

import av
import numpy as np
from PIL import Image

from data import Clip, VideoSettings, read_video, video_arguments

CORNER = (250, 250, 250)


def grey(k):
    return 20 + 5 * k


def pictures(count, width=64, height=48, corner=False):
    """(count, height, width, 3) uint8, count up to 46."""
    frames = np.zeros((count, height, width, 3), np.uint8)
    for k in range(count):
        frames[k] = grey(k)
        if corner:
            frames[k, : height // 2, : width // 2] = CORNER
    return frames


def which_frames(clip):
    """The frame numbers that a clip shows, from the grey of their lower right corners."""
    values = clip.frames[:, :, -3:, -3:].float().mean(dim=(1, 2, 3))
    return [round((float(value) - 20) / 5) for value in values]


def read_sample(sample, settings=VideoSettings()) -> Clip:
    """The clip of a sample as VideoLoader decodes it, in this process and without a cache."""
    return read_video(sample["video"], **video_arguments(sample, settings))


def write_video(path, frames, fps=10, times=None, options=None):
    """H.264; with `times` (seconds of each frame) at a variable frame rate."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps))
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        stream.options = options or {"crf": "10", "preset": "veryfast", "threads": "1"}
        if times is not None:
            stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
        for k, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            if times is not None:
                picture.pts, picture.time_base = round(times[k] * 1000), Fraction(1, 1000)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return path


def set_rotation(path, degrees):
    """Write the header entry of a phone held sideways: the track header's 3 x 3 matrix, big-endian fixed point."""
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 4 + 5 * 4 + 8 + 8
    a, b, c, d = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}[degrees]
    data[matrix : matrix + 36] = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    return path


def write_folder(folder, frames, names=None):
    folder.mkdir(parents=True, exist_ok=True)
    for k, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / (names[k] if names else f"{k + 1:08d}.jpg"), quality=95)
    return folder
