"""Which videos and pictures of a data set can be used? `python data.py check x.jsonl` decodes what training would, before
training.

What training would not read is found, and what it would read without knowing better: a truncated file that merely is
shorter than its annotation says. A few frames of each file are compared with those of other ways to them: from an earlier key
frame, and by another decoder. This is for the night before a long run; no video that training reads shows a wrong frame for
want of it (lib/readers.py).

Lines that are no samples are set apart as well. Converters pass annotations on as published, an empty question or a
question without a window too; training refuses a file with such a line, and `good.jsonl` is that file without it.
"""

import json
import random
from collections import Counter
from concurrent.futures import as_completed
from pathlib import Path

from tqdm import tqdm

from data import VideoSettings, choose_frames, picture_arguments, read_picture, read_video, video_arguments
from lib.loader import DecodePool, seconds_of
from lib.readers import IndexIsWrong, VideoError, find_video, open_video
from lib.samples import files_of, judged_lines, parse_entry, take_part, unread_keys, write_jsonl

COMPARED = 4  # frames of a clip that are compared
CHEAP_FRAMES = 6000  # up to this frame (200 s at 30 fps) they are compared with decord's, which reads from the beginning
LARGEST_DIFFERENCE = 12  # mean over a frame, of 255; two decoders differ by 1 or 2 in colour conversion


def inspect_video(path: str, duration: float | None = None, **arguments) -> str | None:
    """What makes a readable video unusable, or None. `arguments` as for `read_video`; VideoError if unreadable."""
    read_video(path, **arguments)
    path = find_video(path)
    if path.is_dir():
        return None
    try:
        source = open_video(path)
    except IndexIsWrong:
        source = open_video(path, reader="decoding")
    length = source.begins[-1] + 1 / source.fps
    # Annotated durations are rounded, and some count the sound: only what is over a tenth and a second off is a fault.
    if duration is not None and length < 0.9 * duration - 1:
        return f"truncated: it holds {length:.1f} s, the annotation says {duration:.1f} s"
    indices, _ = choose_frames(source, arguments["target_fps"], arguments["max_frames"], arguments["start"],
                               arguments["end"], arguments["frames"])
    near = [index for index in indices if index < CHEAP_FRAMES]
    for reader, frames in (("earlier", indices), ("decord", near)):
        if frames and (problem := compare(path, reader, [frames[round(k * (len(frames) - 1) / (COMPARED - 1))]
                                                         for k in range(COMPARED)])):
            return problem
    return None


def inspect_picture(path: str, **arguments) -> None:
    """`arguments` as for `read_picture`; VideoError if unreadable. Of a picture that can be read there is no more to know."""
    read_picture(path, **arguments)


def compare(path: Path, reader: str, frames: list[int]) -> str | None:
    """Whether `reader` shows the same frames as training does; None also where it cannot read the file."""
    ours = read_video(path, frames=frames)
    try:
        theirs = read_video(path, frames=frames, reader=reader)
    except (VideoError, ImportError):
        return None
    if theirs.frames.shape != ours.frames.shape:
        return f"its frames have another size for another reader ({reader}); re-encode it"
    difference = (theirs.frames.float() - ours.frames.float()).abs().mean(dim=(1, 2, 3))  # (T,)
    if difference.max() > LARGEST_DIFFERENCE:
        return (f"frame {frames[int(difference.argmax())]} is another picture when it is read in another way ({reader}), and "
                "nobody knows which is right; re-encode it")
    return None


def read_lines(file: Path) -> tuple[dict[int, dict], dict[int, str]]:
    """The objects of a file by line number, and what is wrong with those that are no samples, by line number too:
    `read_jsonl` raises at the first of them, as training should."""
    records, problems = {}, {}
    for number, records[number], problem in judged_lines(file):
        if problem:
            problems[number] = f"line {number}: {problem}"
    return records, problems


def check(entry: str, out: Path, *, video_root: str | None = None, settings: VideoSettings = VideoSettings(),
          num_workers: int = 4, deadline: float = 60.0) -> tuple[int, int]:
    """Write `good.jsonl` and `bad.jsonl` (with a `reason`) into `out`; returns (number good, number bad).

    Every picture is inspected once, and every video once for each part of it that samples use, with `deadline` seconds
    and its own duration for each. Lines that are no samples are bad, wherever they stand: training refuses the file for
    them, also where an entry takes a part of it only. ValueError, before anything is decoded, for a file without lines or
    one that would be overwritten.
    """
    source, root, take = parse_entry(entry)
    if source.resolve() in [(out / name).resolve() for name in ("good.jsonl", "bad.jsonl")]:
        raise ValueError(f"{source} would be overwritten with the result; give --out another folder")
    records, problems = read_lines(source)
    if not records:
        raise ValueError(f"{source}: no sample; check the file")
    for line in unread_keys(list(records.values())):
        print(line)
    # The part that training takes of good.jsonl's lines, if all videos are good.
    wanted = take_part([number for number in records if number not in problems], take, random.Random(f"0 {source.name}"))
    folder = Path(root or video_root or source.parent)
    jobs = {}  # the same part of the same video: one job, for the lines that use it
    for number in wanted:
        sample = records[number]
        if "image" in sample:
            inspect, arguments = inspect_picture, picture_arguments(settings)
        elif "video" in sample:
            inspect, arguments = inspect_video, {**video_arguments(sample, settings), "duration": sample.get("duration")}
        for file in files_of(sample):
            file = str((folder / file).absolute())
            jobs.setdefault((file, json.dumps(arguments)), (inspect, arguments, []))[2].append(number)
    problems |= inspect_videos(jobs, num_workers, deadline)
    good = [records[number] for number in wanted if number not in problems]
    bad = [{**records[number], "reason": problems[number]} for number in sorted(problems)]
    for line in summary_of(problems, good):
        print(line)
    out.mkdir(parents=True, exist_ok=True)
    write_jsonl(out / "good.jsonl", good, source)
    write_jsonl(out / "bad.jsonl", bad, source)
    return len(good), len(bad)


def summary_of(problems: dict[int, str], good: list[dict]) -> list[str]:
    """The commonest reasons, and good samples that are doubtful: published data have spans that end late, so these are kept."""
    lines = [f"{count} bad: {reason}" for reason, count in Counter(problems.values()).most_common(MOST_REASONS)]
    late = [sample["id"] for sample in good if "duration" in sample
            and any(end > sample["duration"] + 1 for _, end in sample.get("spans") or ())]
    return lines + ([f"{len(late)} good ones have spans that end after their video ({', '.join(late[:3])}"
                     f"{', ...' if len(late) > 3 else ''}): are they in seconds?"] if late else [])


MOST_REASONS = 3


def inspect_videos(jobs: dict, num_workers: int, deadline: float) -> dict[int, str]:
    """What is wrong with the files of `jobs`, {(file, _): (how to inspect it, arguments, line numbers)}, by line number."""
    problems = {}
    with DecodePool(num_workers, deadline) as pool:
        futures = {}
        for (file, _), (inspect, arguments, numbers) in jobs.items():
            extra = 0.0 if inspect is inspect_picture else seconds_of(arguments) or None
            # a sample may have several pictures: which of them is it?
            futures[pool.submit(inspect, file, arguments, extra_seconds=extra)] = (f"{file}: " * (inspect is inspect_picture), numbers)
        for future in tqdm(as_completed(futures), total=len(futures), desc="videos and pictures", unit="part"):
            error = future.exception()
            if error is not None and not isinstance(error, VideoError):
                raise error
            if problem := error.reason if error else future.result():
                name, numbers = futures[future]
                problems.update(dict.fromkeys(numbers, name + problem))
    return problems
