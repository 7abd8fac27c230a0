"""Which videos of a data set can be used? `python data.py check x.jsonl` decodes what training would, before training.

Most bad files say so when they are opened. The others are worse, because they decode without a word: a truncated file
that merely is shorter, a variable frame rate whose frame numbers tell the wrong time, and files (open GOP, cut without
re-encoding) in which jumping to a frame shows another one. Each has its test here, made of facts that disagree: the
annotated duration, the time stamps, and a second decoder that reads from the first frame on instead of jumping.
"""

import json
from concurrent.futures import as_completed
from pathlib import Path

from tqdm import tqdm

from data import (VideoError, VideoSettings, choose_frames, decord, find_video, load_samples, open_video, parse_entry,
                  read_jsonl, read_video, video_arguments, write_jsonl)
from loader import DecodePool

CLOCK_TOLERANCE = 0.5  # seconds; one time position of the model
CHEAP_FRAMES = 6000  # up to this many frames (200 s at 30 fps) a file is also read from its beginning
LARGEST_DIFFERENCE = 12  # mean over a frame, of 255; two decoders differ by 1 or 2 in colour conversion


def inspect_video(path: str, duration: float | None = None, **arguments) -> str | None:
    """What makes a readable video unusable, or None. `arguments` as for `read_video`; VideoError if unreadable."""
    clip = read_video(path, **arguments)
    path = find_video(path)
    if path.is_dir():
        return None
    source = open_video(path)
    length = source.begins[-1] - source.begins[0] + 1 / source.fps
    # Annotated durations are rounded, and some count the sound: only what is over a tenth and a second off is a fault.
    if duration is not None and length < 0.9 * duration - 1:
        return f"truncated: it holds {length:.1f} s, the annotation says {duration:.1f} s"
    indices, _ = choose_frames(source, arguments["target_fps"], arguments["max_frames"], arguments["start"],
                               arguments["end"], arguments["frames"])
    for index in indices:
        begin = source.begins[index] - source.begins[0]
        if abs(begin - index / source.fps) > CLOCK_TOLERANCE:
            return (f"variable frame rate: frame {index} begins at {begin:.2f} s, {source.fps:.2f} frames a second "
                    f"would put it at {index / source.fps:.2f} s; re-encode it at a constant rate")
    if decord is None or source.num_frames > CHEAP_FRAMES:
        return None
    try:
        in_order = read_video(path, reader="pyav", **arguments)
    except VideoError as error:
        return f"it can be read by jumping to its frames, but not from its beginning: {error.reason}"
    if in_order.frames.shape != clip.frames.shape:
        return (f"jumping to its frames gives {tuple(clip.frames.shape)}, reading from its beginning "
                f"{tuple(in_order.frames.shape)}; re-encode it")
    difference = (in_order.frames.float() - clip.frames.float()).abs().mean(dim=(1, 2, 3))  # (T,)
    if difference.max() > LARGEST_DIFFERENCE:
        return (f"jumping to frame {indices[int(difference.argmax())]} shows another frame than reading up to it (open "
                "GOP, or cut without re-encoding); re-encode it")
    return None


def check(entry: str, out: Path, *, video_root: str | None = None, settings: VideoSettings = VideoSettings(),
          num_workers: int = 4, deadline: float = 60.0) -> tuple[int, int]:
    """Write `good.jsonl` and `bad.jsonl` (with a `reason`) into `out`; returns (number good, number bad).

    Every video is inspected once for each part of it that samples use, with `deadline` seconds for each.
    """
    samples = load_samples([entry], video_root)
    source = parse_entry(entry)[0]
    as_written = {sample["id"]: sample for sample in read_jsonl(source)}
    jobs = {}  # the same part of the same video: one job
    for sample in samples:
        if "video" in sample:
            arguments = {**video_arguments(sample, settings), "duration": sample.get("duration")}
            jobs.setdefault((sample["video"], json.dumps(arguments)), (arguments, []))[1].append(sample["id"])
    problems = {}
    with DecodePool(num_workers, deadline) as pool:
        futures = {pool.submit("inspect", video, arguments, lambda answer: answer[1]): ids
                   for (video, _), (arguments, ids) in jobs.items()}
        for future in tqdm(as_completed(futures), total=len(futures), desc="videos", unit="video"):
            error = future.exception()
            if error is not None and not isinstance(error, VideoError):
                raise error
            problems.update(dict.fromkeys(futures[future], error.reason if error else future.result()))
    good = [as_written[sample["id"]] for sample in samples if not problems.get(sample["id"])]
    bad = [{**as_written[sample["id"]], "reason": problems[sample["id"]]} for sample in samples
           if problems.get(sample["id"])]
    out.mkdir(parents=True, exist_ok=True)
    write_jsonl(out / "good.jsonl", good, source)
    write_jsonl(out / "bad.jsonl", bad, source)
    return len(good), len(bad)
