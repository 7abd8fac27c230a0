"""From a video file and a question to tensors: sample, prompt, frames, patches, positions.

Read from top to bottom; the order is the one in which a sample travels:

    train.jsonl  --load_samples-->  sample (dict)  --build_prompt-->  chat messages  --encode_prompt-->  ids (P,)
    clip.mp4     --read_video--->   frames (T, 3, H, W)  --patchify-->  patches (N, 1176), grid
    ids, grid    --mrope_positions-->  positions (3, P)                    (prepare: all of it for one sample)

Nothing here knows a model, a reward or a gradient. Letters: P prompt tokens, V video tokens among them, T frames,
N = 4V patches. `lib/loader.py` runs `read_video` in worker processes, `lib/selection.py` picks what is worth training on.

Left out on purpose: the library's own video processor. Frame choice, resize, patch order and positions are a page of
code, they are what a video model sees, and their library versions differ from release to release without a word.
"""

import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

# ---------------------------------------------------------------------------------------------------------------------
# 1. Samples: one JSON object a line

TASKS = ("grounding", "qa", "gqa", "tracking", "classification", "captioning")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
NUM_BOXES = 8  # of a tracking sample, as in VideoChat-R1


def load_samples(entries: list[str], video_root: str | Path | None = None, tasks: list[str] | None = None,
                 seed: int = 0) -> list[dict]:
    """Samples of all `entries`, in file order, each with an absolute `video`.

    An entry is FILE[@VIDEO_ROOT][:N] (its first N samples) or FILE[@VIDEO_ROOT][:P%] (a share, drawn with `seed`, in
    file order); N and P count samples of the wanted `tasks`. Videos lie under the entry's root, else `video_root`, else
    beside the file. An id that occurs in two files is prefixed with its file's stem. Spans are passed on as annotated.
    Raises ValueError that names file, line, field, value and remedy.
    """
    if unknown := set(tasks or ()) - set(TASKS):
        raise ValueError(f"unknown task {sorted(unknown)[0]!r}; the tasks are {', '.join(TASKS)}")
    parts = [parse_entry(entry) for entry in entries]
    loaded = []
    for file, root, take in parts:
        samples = [sample for sample in read_jsonl(file) if not tasks or sample["task"] in tasks]
        if not samples:
            raise ValueError(f"{file}: no sample{' of task ' + ', '.join(tasks) if tasks else ''}; check the file "
                             "and --tasks")
        samples = _take(samples, take, random.Random(f"{seed} {file.name}"))
        if not samples:
            raise ValueError(f"{file}: ':{take}' leaves no sample of it")
        for sample in samples:
            if "video" in sample:
                sample["video"] = str((Path(root or video_root or file.parent) / sample["video"]).absolute())
        loaded.append(samples)
    _make_ids_unique([file for file, _, _ in parts], loaded)
    return [sample for samples in loaded for sample in samples]


def parse_entry(entry: str) -> tuple[Path, str | None, str | None]:
    """FILE, VIDEO_ROOT and N or "P%" of an entry; the last two may be None."""
    name, take = re.fullmatch(r"(.+?)(?::(\d+(?:\.\d+)?%|\d+))?", entry, re.DOTALL).groups()
    # A path may itself contain an @, so the root begins at the first @ that a file's name ends before.
    for at in (match.start() for match in re.finditer("@", name)):
        if Path(name[:at]).is_file():
            return Path(name[:at]), name[at + 1:], take
    if not Path(name).is_file():
        raise ValueError(f"{name.partition('@')[0]}: no such file (entry {entry!r}; an entry is "
                         "FILE[@VIDEO_ROOT][:N] or FILE[@VIDEO_ROOT][:P%])")
    return Path(name), None, take


def _take(samples: list[dict], take: str | None, rng: random.Random) -> list[dict]:
    if take is None:
        return samples
    if not take.endswith("%"):
        return samples[:int(take)]
    count = min(round(len(samples) * float(take[:-1]) / 100), len(samples))
    return [samples[i] for i in sorted(rng.sample(range(len(samples)), count))]


def _make_ids_unique(files: list[Path], loaded: list[list[dict]]) -> None:
    """Prefix the ids that several files share, in place. Two files of one name are told apart by their place."""
    count = Counter(sample["id"] for samples in loaded for sample in samples)
    stems = Counter(file.stem for file in files)
    for place, (file, samples) in enumerate(zip(files, loaded), 1):
        name = file.stem if stems[file.stem] == 1 else f"{file.stem}#{place}"
        for sample in samples:
            if count[sample["id"]] > 1:
                sample["id"] = f"{name}/{sample['id']}"


def read_jsonl(file: str | Path) -> list[dict]:
    """The validated samples of one file as they stand in it. ValueError names the line, the field and the value."""
    samples, line_of = [], {}
    with open(file, "rb") as lines:  # bytes: text mode would also break lines at characters other than \n
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                sample = json.loads(line)
            except ValueError as error:  # no JSON, or no UTF-8
                raise ValueError(f"{file}:{number}: not a JSON object ({error}); write one object a line") from error
            if problem := find_problem(sample):
                raise ValueError(f"{file}:{number}: {problem}")
            if sample["id"] in line_of:
                raise ValueError(f"{file}:{number}: field 'id': {sample['id']!r} is also the id of line "
                                 f"{line_of[sample['id']]}; ids must be unique within a file")
            line_of[sample["id"]] = number
            samples.append(sample)
    return samples


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_text(value) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _are_rows(value, width: int) -> bool:
    return (isinstance(value, list) and len(value) > 0
            and all(isinstance(row, list) and len(row) == width and all(map(_is_number, row)) for row in value))


# What a field has to be, wherever it occurs: (test, words for the message).
FIELDS = {
    "id": (_is_text, "a string"),
    "task": (lambda value: value in TASKS, f"one of {', '.join(TASKS)}"),
    "video": (_is_text, "a path; leave it out for a text-only sample"),
    "question": (_is_text, "a string"),
    "options": (lambda value: isinstance(value, list) and 0 < len(value) <= len(LETTERS)
                and all(isinstance(option, str) for option in value), "a list of 1 to 26 strings without letters"),
    "answer": (_is_text, "a string"),
    "spans": (lambda value: _are_rows(value, 2), "a list of [start, end] in seconds"),
    "boxes": (lambda value: _are_rows(value, 4) and len(value) == NUM_BOXES, "a list of 8 [x0, y0, x1, y1]"),
    "events": (lambda value: isinstance(value, list) and len(value) > 0
               and all(isinstance(event, str) and any(map(str.isalnum, event)) for event in value),
               "a list of sentences with words in them, one for each event"),
    "frames": (lambda value: isinstance(value, list) and len(value) == NUM_BOXES
               and all(type(i) is int and i >= 0 for i in value), "a list of 8 frame numbers from 0"),
    "duration": (lambda value: _is_number(value) and value > 0, "seconds above 0; leave it out if unknown"),
    "fps": (lambda value: _is_number(value) and value > 0, "frames a second above 0"),
    "think": (lambda value: isinstance(value, bool), "true or false"),
    "target": (lambda value: isinstance(value, str), "a string"),
    "start": (lambda value: _is_number(value) and value >= 0, "seconds from 0"),
    "end": (lambda value: _is_number(value) and value > 0, "seconds above 0"),
}
NEEDED = {"grounding": ["spans"], "qa": ["options", "answer"], "gqa": ["options", "answer", "spans"],
          "tracking": ["boxes"], "classification": ["options", "answer"], "captioning": ["events"]}


def find_problem(sample: object) -> str | None:
    """What is wrong with a sample, in words that name field, value and remedy; None if it is sound."""
    if not isinstance(sample, dict):
        return f"{str(sample)[:60]!r} is not a JSON object; write one object a line"
    for field, (is_right, wanted) in FIELDS.items():
        if field in sample and not is_right(sample[field]):
            return f"field {field!r} is {str(sample[field])[:80]!r}; it must be {wanted}"
    for field in ["id", "task", "question", *NEEDED.get(sample.get("task"), [])]:
        if field not in sample:
            return f"field {field!r} is missing; it must be {FIELDS[field][1]}"
    task = sample["task"]
    if task == "grounding" and len(sample["spans"]) != 1:
        return f"field 'spans' has {len(sample['spans'])} spans; grounding has exactly one (gqa may have several)"
    if task in ("qa", "gqa") and sample["answer"] not in LETTERS[:len(sample["options"])]:
        return f"field 'answer' is {sample['answer']!r}; it must be a letter of the {len(sample['options'])} options"
    labels = [label.strip().lower() for label in sample.get("options", [])]
    if task == "classification" and sample["answer"].strip().lower() not in labels:
        return f"field 'answer' is {sample['answer']!r}; it must be one of the options {sample['options']}"
    if sample.get("end", math.inf) <= sample.get("start", 0):
        return f"field 'end' is {sample['end']}; it must lie behind 'start' ({sample.get('start', 0)})"
    return None


def write_jsonl(file: Path, samples: list[dict], source: Path | None = None) -> None:
    """One sample a line, UTF-8. `source`: the file they come from. Where `file` lies elsewhere, videos that lie beside
    `source` get their absolute path, so that they are found from there too."""
    moved = source is not None and file.parent.resolve() != source.parent.resolve()
    # Half a surrogate pair is no UTF-8, but JSON may hold it as \ud83d, which is just how backslashreplace writes it.
    with open(file, "w", encoding="utf-8", errors="backslashreplace", newline="\n") as lines:
        for sample in samples:
            if moved and "video" in sample and (video := source.parent.resolve() / sample["video"]).exists():
                sample = {**sample, "video": str(video)}
            lines.write(json.dumps(sample, ensure_ascii=False) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# 2. Prompts, in the published words, and the completion a warm start imitates

STYLES = ("think", "answer", "temporal_r1")
THINK = ("Output your thought process within the <think> </think> tags, including analysis with either specific "
         "timestamps (xx.xx) or time ranges (xx.xx to xx.xx) in <timestep> </timestep> tags.")
TIMES = ("rovide the start and end times (in seconds, precise to two decimal places) in the format \"start time to "
         "end time\" within the <answer> </answer> tags. For example: \"12.54 to 17.83\".")
LETTER = "rovide your answer within the <answer> </answer> tags, output the corresponding letter of the option."
GLUE = (" At the same time, in the <glue> </glue> tags, present the precise time period in seconds of the video clips "
        "on which you base your answer to this question in the format of [(s1, e1), (s2, e2), ...]. For example: "
        "<answer>A</answer><glue>[(5.2, 10.4)]</glue>.")
BOXES = ("Provide your answer within the <answer> </answer> tags as a list of eight sublists, where each sublist "
         "contains the normalized coordinates [x0, y0, x1, y1]. For example: <answer>[[0.1, 0.5, 0.3, 0.55], [0.72, "
         "0.25, 0.84, 0.43], ...]</answer>.\n")
# Ours: VideoChat-R1 trained captioning as its sixth task and published neither prompt nor code for it. The instruction
# is the sample's own; the rest follows the other five. A sentence for each event is what the judge compares.
CAPTION = ("rovide your description within the <answer> </answer> tags, in plain sentences, one for each event, in the "
           "order in which they happen.\n")
TEMPORAL_R1_SYSTEM = (
    "You FIRST think about the reasoning process as an internal monologue and then provide the final answer.\n "
    "The reasoning process MUST BE enclosed within <think> </think> tags. The final answer MUST BE put in <answer> "
    "</answer> tags. Output the final answer in JSON format.")
# Temporal-R1 publishes no prompt that asks for tags but no thought; this is its own text without the first sentences.
TEMPORAL_R1_SYSTEM_ANSWER = ("The final answer MUST BE put in <answer> </answer> tags. Output the final answer in JSON "
                             "format.")


def prompt_wants_thought(sample: dict, style: str) -> bool:
    """Whether the prompt asks for <think>: the sample's own `think`, else what the style says."""
    if style not in STYLES:
        raise ValueError(f"unknown prompt style {style!r}; the styles are {', '.join(STYLES)}")
    return sample.get("think", style != "answer")


def build_prompt(sample: dict, style: str) -> list[dict]:
    """Chat messages that ask for the sample's answer: VideoChat-R1's words ("think", "answer") or Temporal-R1's.

    VideoChat-R1: one user turn, the text before the video. Temporal-R1: its system line, the video before the text; it
    published a prompt for grounding only, so the other tasks keep VideoChat-R1's words, behind the video and without
    the system line, which would ask for a letter or a list "in JSON format". No video, no video part.
    """
    think = prompt_wants_thought(sample, style)
    video = [{"type": "video", "video": sample["video"]}] if "video" in sample else []
    if style != "temporal_r1":
        return [{"role": "user", "content": [{"type": "text", "text": _videochat_r1_text(sample, think)}, *video]}]
    if sample["task"] != "grounding":
        return [{"role": "user", "content": [*video, {"type": "text", "text": _videochat_r1_text(sample, think)}]}]
    text = f'Give the query: "{_event(sample)}", when does the described content occur in the video?'
    return [{"role": "system", "content": TEMPORAL_R1_SYSTEM if think else TEMPORAL_R1_SYSTEM_ANSWER},
            {"role": "user", "content": [*video, {"type": "text", "text": text}]}]


def _event(sample: dict) -> str:
    """The event as annotated, without its final full stop: it stands inside quotation marks in mid-sentence.

    VideoChat-R1 drops the stop and lower-cases in training and does neither in evaluation. One text for both: what is
    trained is then what is measured, and names keep their capitals.
    """
    return sample["question"].strip().removesuffix(".").rstrip()


def _videochat_r1_text(sample: dict, think: bool) -> str:
    task, question = sample["task"], sample["question"].strip()
    # Where the thought is asked for it has a paragraph of its own, and the answer's paragraph begins with "Then, p".
    ask = f"\n\n{THINK}\n\nThen, p" if think else "\n\nP"
    if task == "grounding":
        return (f'To accurately pinpoint the event "{_event(sample)}" in the video, determine the precise time period '
                f"of the event.{ask}{TIMES}")
    if task in ("qa", "gqa"):
        options = [f"({letter}) {option}" for letter, option in zip(LETTERS, sample["options"])]
        ask = ask if think else " P"
        return (f'Answer the question: "{question}" according to the content of the video. Select the answer from '
                f":{options}.{ask}{LETTER}{GLUE if task == 'gqa' else ''}\n")
    if task == "tracking":
        start = [round(float(value), 3) for value in sample["boxes"][0]]
        return (f'Track the "{question}" in the video based on its initial coordinates "{start}". The output should be '
                "a list containing eight sublists. Each sublist includes four normalized coordinates [x0, y0, x1, y1] "
                "representing the bounding box of the object at specific time intervals.\n\n"
                + (f"{THINK}\n\n" if think else "") + BOXES)
    if task == "captioning":
        return f"{question}{ask}{CAPTION}"
    # VideoChat-R1's instruction lists the labels itself; where an instruction does not, they are added in its words.
    if any(option not in question for option in sample["options"]):
        question += f" Choice one answer from {sample['options']}."
    if think:
        return f"{question}\n\n{THINK}\n\nThen, provide your final answer within the <answer> </answer> tags.\n"
    return f"{question}\n\nOutput your final answer within the <answer> </answer> tags.\n"


def target_text(sample: dict, style: str) -> str:
    """The completion that SFT imitates: the sample's `target`, else the truth in the prompt's answer format.

    The thought is left empty: the annotations have none, and an invented one would be trained on. A truth that is
    reversed in the annotation is written in order, as scoring reads it.
    """
    if "target" in sample:
        return sample["target"]
    thought, task = "<think></think>" if prompt_wants_thought(sample, style) else "", sample["task"]
    spans = [sorted(span) for span in sample.get("spans", [])]
    if task == "grounding":
        (start, end), = spans
        answer = f"{start:.2f} to {end:.2f}"
        if style == "temporal_r1":
            answer = json.dumps({"start_time": f"{start:.2f}", "end_time": f"{end:.2f}"})
    elif task == "tracking":
        answer = "[" + ", ".join("[" + ", ".join(f"{v:.3f}" for v in box) + "]" for box in sample["boxes"]) + "]"
    elif task == "captioning":
        answer = reference_caption(sample)
    else:
        answer = sample["answer"]
    glue = ", ".join(f"({start:.2f}, {end:.2f})" for start, end in spans)
    return f"{thought}<answer>{answer}</answer>" + (f"<glue>[{glue}]</glue>" if task == "gqa" else "")


def reference_caption(sample: dict) -> str:
    """The annotated events as one text: a sentence each, in their order.

    >>> reference_caption({"events": ["a man opens a door", "He leaves."]})
    'A man opens a door. He leaves.'
    """
    events = [event.strip() for event in sample["events"]]
    return " ".join(event[0].upper() + event[1:] + ("" if event[-1] in ".!?" else ".") for event in events)


VIDEO_PAD = "<|video_pad|>"


def encode_prompt(tokenizer, messages: list[dict], num_video_tokens: int) -> torch.Tensor:
    """Token ids (P,) int64 of the chat with the assistant's turn opened, as Qwen2.5-VL's chat template renders it.

    `<|video_pad|>` stands `num_video_tokens` times. Whatever the texts contain is text: a question that spells out
    `<|im_end|>` gets ordinary tokens for these characters, never the one that ends the turn.
    """
    if messages[0]["role"] != "system":
        messages = [{"role": "system", "content": "You are a helpful assistant."}, *messages]
    pieces = []  # (is it a special token?, text)
    for message in messages:
        pieces += [(True, "<|im_start|>"), (False, message["role"] + "\n"), *_content_pieces(message["content"]),
                   (True, "<|im_end|>"), (False, "\n")]
    pieces += [(True, "<|im_start|>"), (False, "assistant\n")]
    if any(piece == (True, VIDEO_PAD) for piece in pieces) != (num_video_tokens > 0):
        raise ValueError(f"the prompt has {'a' if num_video_tokens == 0 else 'no'} video part, and {num_video_tokens} "
                         "video tokens are to fill it")
    ids = []
    for is_special, piece in _merge_texts(pieces):
        if is_special:
            token = tokenizer.convert_tokens_to_ids(piece)
            if token is None:
                raise ValueError(f"the tokenizer has no {piece}; use Qwen2.5-VL's or add its special tokens")
            ids += [token] * (num_video_tokens if piece == VIDEO_PAD else 1)
        else:  # split_special_tokens: otherwise special-token strings inside a question become the tokens themselves
            ids += tokenizer(piece, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def _content_pieces(content: str | list[dict]) -> list[tuple[bool, str]]:
    if isinstance(content, str):
        return [(False, content)]
    video = [(True, "<|vision_start|>"), (True, VIDEO_PAD), (True, "<|vision_end|>")]
    return [piece for part in content for piece in (video if part["type"] == "video" else [(False, part["text"])])]


def _merge_texts(pieces: list[tuple[bool, str]]) -> list[tuple[bool, str]]:
    """Join neighbouring texts: a tokenizer merges across their border, as it does in the template's one string."""
    merged = []
    for is_special, text in pieces:
        if merged and not is_special and not merged[-1][0]:
            merged[-1] = (False, merged[-1][1] + text)
        else:
            merged.append((is_special, text))
    return merged


# ---------------------------------------------------------------------------------------------------------------------
# 3. Video: which frames, how large, and the file readers


class VideoError(Exception):
    """A video that cannot be read: `path` and `reason`. Never repaired, never replaced by another video."""

    def __init__(self, path: str | Path, reason: str):
        super().__init__(str(path), reason)  # both in args, so that it survives pickling
        self.path, self.reason = str(path), reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclass(frozen=True)
class Clip:
    """What is left of a video file: resized frames and their times."""
    frames: torch.Tensor  # (T, 3, H, W) uint8
    seconds: torch.Tensor  # (T,) float64, begin of each frame, counted from `start`
    sample_fps: float  # of the chosen frames, not of the file


@dataclass(frozen=True)
class VideoSettings:
    """How much of a video the model sees; VideoChat-R1's values."""
    target_fps: float = 2.0
    max_frames: int = 768
    total_pixels: int = 3584 * 784  # 784 = 28 * 28 pixels make one token of two frames
    min_pixels: int = 16 * 784


def frame_indices(num_frames: int, fps: float, *, target_fps: float = 2.0, min_frames: int = 4,
                  max_frames: int = 768) -> tuple[list[int], float]:
    """Which of `num_frames` frames to use, evenly spaced with both ends, an even number: (indices, their rate).

    qwen-vl-utils 0.0.10. The rate is what time positions are computed from; it is rarely `target_fps` exactly: 733
    frames at 29.97 fps give 48 frames at 1.96 fps. ValueError under 2 frames.
    """
    if not (math.isfinite(fps) and fps > 0):
        raise ValueError(f"a frame rate of {fps} is none")
    lowest = 2 * math.ceil(min_frames / 2)
    highest = 2 * math.floor(min(max_frames, num_frames) / 2)
    count = min(max(num_frames / fps * target_fps, lowest), highest, num_frames)
    count = 2 * math.floor(count / 2)  # two frames make one token
    if count < 2:
        raise ValueError(f"{num_frames} frames (at most {max_frames} allowed) are too few; a clip has at least 2")
    indices = torch.linspace(0, num_frames - 1, count).round().long().tolist()
    return indices, count * fps / num_frames


def smart_resize(height: int, width: int, *, min_pixels: int, max_pixels: int, factor: int = 28) -> tuple[int, int]:
    """The size nearest to (height, width) with sides that are multiples of `factor` and an area within the limits.

    qwen-vl-utils 0.0.10, but never under `factor`. ValueError for an aspect ratio over 200. The area exceeds
    `max_pixels` only where a side is already down to `factor`.
    """
    if min(height, width) < 1 or max(height, width) / min(height, width) > 200:
        raise ValueError(f"a frame of {width} x {height} pixels has an aspect ratio over 200")
    new_height = max(factor, round(height / factor) * factor)
    new_width = max(factor, round(width / factor) * factor)
    if new_height * new_width > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return new_height, new_width


def frame_budget(num_frames: int, total_pixels: int, min_pixels: int) -> float:
    """Most pixels of one of `num_frames` frames: `total_pixels` is no hard cap, long videos keep their least size."""
    return max(min(768 * 784, 2 * total_pixels / num_frames), int(1.05 * min_pixels))


def read_video(path: str | Path, *, target_fps: float = 2.0, max_frames: int = 768, total_pixels: int = 3584 * 784,
               min_pixels: int = 16 * 784, start: float | None = None, end: float | None = None,
               frames: list[int] | int | None = None, fps: float = 2.0, reader: str | None = None) -> Clip:
    """Decode the frames a model sees, resized to the pixel budget. T is even unless `frames` lists an odd number.

    start, end: seconds; only frames ceil(start * rate) .. min(floor(end * rate), last) are used, and time counts from
    `start`. frames: exactly these 0-based frames of the file, or, as a number, that many evenly spaced ones, repeated
    if there are fewer. fps: of a folder of frames. reader: "decord" or "pyav", by default decord where it is installed.
    The budget of a frame is `frame_budget`'s. VideoError(path, reason) for whatever cannot be read.
    """
    path = find_video(path)
    try:
        source = open_video(path, fps, reader)
        indices, sample_fps = choose_frames(source, target_fps, max_frames, start, end, frames)
        budget = frame_budget(len(indices), total_pixels, min_pixels)
        wanted = sorted(set(indices))
        chunks = [_resize(torch.from_numpy(chunk), min_pixels, budget) for chunk in source.fetch(wanted)]
    except DECODING_ERRORS as error:
        raise VideoError(path, _first_line(error)) from error
    if (decoded := sum(map(len, chunks))) != len(wanted):
        raise VideoError(path, f"truncated: only {decoded} of the {len(wanted)} frames needed can be decoded")
    place = {index: k for k, index in enumerate(wanted)}
    begins = source.begins[indices] - source.begins[0] - (start or 0)
    return Clip(torch.cat(chunks)[[place[i] for i in indices]], torch.from_numpy(begins), sample_fps)


def find_video(path: str | Path) -> Path:
    """The path itself, or the same name with another container's suffix: annotations guess .mp4 where ActivityNet
    has .mkv and .webm. VideoError where there is nothing, or nothing in it."""
    path = Path(path)
    found = next((p for p in (path, path.with_suffix(".mkv"), path.with_suffix(".webm")) if p.exists()), None)
    if found is None:
        raise VideoError(path, "no such file; check the path, and --video_root where there is one")
    if found.is_file() and found.stat().st_size == 0:
        raise VideoError(found, "the file is empty")
    return found


def choose_frames(source: "Source", target_fps: float, max_frames: int, start: float | None, end: float | None,
                   frames: list[int] | int | None) -> tuple[list[int], float]:
    """Indices into the file, and the rate of the chosen frames."""
    first = max(0, math.ceil((start or 0) * source.fps))
    last = source.num_frames - 1 if end is None else min(math.floor(end * source.fps), source.num_frames - 1)
    if last - first < 1:
        raise ValueError(f"{max(0, last - first + 1)} of its {source.num_frames} frames lie between start {start or 0} "
                         f"and end {end if end is not None else 'of file'}; a clip needs at least 2")
    if frames is None:
        indices, sample_fps = frame_indices(last - first + 1, source.fps, target_fps=target_fps, max_frames=max_frames)
        return [first + i for i in indices], sample_fps
    if isinstance(frames, int):
        frames = [first + round(k * (last - first) / (frames - 1)) for k in range(frames)]
    if not frames or min(frames) < 0 or max(frames) >= source.num_frames:
        raise ValueError(f"frames {frames} are asked for, the video has frames 0 to {source.num_frames - 1}")
    # The same formula as in frame_indices, over the stretch that the listed frames cover.
    return list(frames), len(frames) * source.fps / (max(frames) - min(frames) + 1)


def _resize(frames: torch.Tensor, min_pixels: int, max_pixels: float) -> torch.Tensor:
    """(n, H, W, 3) uint8 to (n, 3, H', W') uint8. Bicubic overshoots at edges, hence the clamp before rounding."""
    frames = frames.permute(0, 3, 1, 2)
    size = smart_resize(*frames.shape[-2:], min_pixels=min_pixels, max_pixels=max_pixels)
    if size == tuple(frames.shape[-2:]):
        return frames.contiguous()
    resized = torch.nn.functional.interpolate(frames.float(), size, mode="bicubic", antialias=True)
    return resized.clamp(0, 255).round().to(torch.uint8).contiguous()


class Source(NamedTuple):
    """An opened video, whatever reads it."""
    num_frames: int
    fps: float
    begins: np.ndarray  # (num_frames,) float64 seconds, on the file's own clock
    fetch: Callable[[list[int]], Iterator[np.ndarray]]  # ascending indices to chunks (n, H, W, 3) of uint8


try:
    import decord
    decord.logging.set_level(decord.logging.QUIET)
    DECODER_ERROR = decord._ffi.base.DECORDError  # is no RuntimeError, and decord exports it nowhere else
except ImportError:  # no wheel for this platform: PyAV decodes
    decord, DECODER_ERROR = None, RuntimeError
# What decoders, pillow and the arithmetic above raise for a file they cannot use. PyAV's and pillow's errors are
# OSErrors or ValueErrors. Anything else is a mistake in this program and is not caught.
DECODING_ERRORS = (RuntimeError, OSError, ValueError, EOFError, SyntaxError, DECODER_ERROR)


def _first_line(error: Exception) -> str:
    """decord's messages carry a C++ stack trace."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return re.sub(r"^\[.*?\] \S*: ", "", lines[0])[:300]


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
        raise ValueError(f"frame {file.name}: {_first_line(error)}") from error


def read_sample(sample: dict, settings: VideoSettings = VideoSettings()) -> Clip:
    """The clip of one sample: its `start`, `end`, `frames` and `fps` honoured. Tracking without `frames` shows eight
    evenly spaced ones, round(k (n - 1) / 7), one for each box."""
    return read_video(sample["video"], **video_arguments(sample, settings))


def video_arguments(sample: dict, settings: VideoSettings) -> dict:
    """The keywords `read_video` gets for this sample; with the path they are all that a clip depends on."""
    return {**vars(settings), "start": sample.get("start"), "end": sample.get("end"), "fps": sample.get("fps", 2.0),
            "frames": sample.get("frames", NUM_BOXES if sample["task"] == "tracking" else None)}


# ---------------------------------------------------------------------------------------------------------------------
# 4. Patches and positions

PATCH, MERGE = 14, 2  # a token is MERGE x MERGE patches of PATCH x PATCH pixels and 2 frames
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def patchify(frames: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """Frames (T, 3, H, W) uint8 to patches (N, 1176) float32 and the grid (t, h, w) in patches, N = t * h * w.

    1176 = 3 channels * 2 frames * 14 * 14 pixels, in this order. Four rows in a row are one 2 x 2 block of patches,
    which the vision tower merges into one token; tokens run row by row, then frame pair by frame pair. An odd T repeats
    its last frame. Works where `frames` lies: on the GPU it is faster and moves a quarter of the bytes.
    """
    T, _, H, W = frames.shape
    if frames.dtype != torch.uint8 or H % (PATCH * MERGE) or W % (PATCH * MERGE) or T < 1:
        raise ValueError(f"frames are {tuple(frames.shape)} {frames.dtype}; patches need uint8 with sides that are "
                         "multiples of 28")
    if T % 2:
        frames = torch.cat([frames, frames[-1:]])
    mean, std = (torch.tensor(value, device=frames.device).view(3, 1, 1) for value in (MEAN, STD))
    pixels = (frames.float() / 255 - mean) / std
    t, h, w = len(frames) // 2, H // PATCH, W // PATCH
    pixels = pixels.reshape(t, 2, 3, h // 2, 2, PATCH, w // 2, 2, PATCH)
    #                       0  1  2    3     4    5      6     7    8
    # (t, block row, block column, row in block, column in block; channel, frame, y, x)
    patches = pixels.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(t * h * w, 3 * 2 * PATCH * PATCH)
    return patches, (t, h, w)


def num_video_tokens(grid: tuple[int, int, int]) -> int:
    """V of a grid in patches: a token is 2 x 2 of them."""
    return math.prod(grid) // MERGE**2


def mrope_positions(ids: torch.Tensor, grid: tuple[int, int, int] | None, seconds_per_grid: float, *,
                    video_token_id: int, tokens_per_second: int = 2) -> torch.Tensor:
    """Rotary positions (3, P) int64, axes time, height, width, of a prompt with at most one video.

    Text counts up on all three axes at once. The video starts at the next position q: its token (t, y, x) stands at
    (q + trunc(t * seconds_per_grid * tokens_per_second), q + y, q + x). Text goes on at 1 + the largest position of
    any axis. This is what the published checkpoints were trained with (transformers 4.49 to 4.51); later versions of
    the library differ from it silently, so one tensor is computed here and passed to sampling and scoring alike.
    `grid` is in patches; None for text only. ValueError where grid and ids disagree.
    """
    places = (ids == video_token_id).nonzero().flatten()
    V = num_video_tokens(grid) if grid else 0
    if len(places) != V or (V and int(places[-1] - places[0]) != V - 1):
        raise ValueError(f"the prompt has {len(places)} video tokens, a grid of {grid} patches needs {V} in one run")
    P = len(ids)
    if not V:
        return torch.arange(P).expand(3, P).clone()
    t, h, w = grid[0], grid[1] // MERGE, grid[2] // MERGE
    start = int(places[0])
    # float32 and this order of factors are the reference's: a product just under a whole number truncates as there.
    time = (torch.arange(t, dtype=torch.float32) * seconds_per_grid * tokens_per_second).long()
    video = start + torch.stack([axis.flatten() for axis in torch.meshgrid(
        time, torch.arange(h), torch.arange(w), indexing="ij")])  # (3, V)
    before = torch.arange(start).expand(3, -1)
    after = (int(video.max()) + 1 + torch.arange(P - start - V)).expand(3, -1)
    return torch.cat([before, video, after], dim=1)


# ---------------------------------------------------------------------------------------------------------------------
# 5. All of it for one sample


@dataclass(frozen=True)
class Prompt:
    """Everything the model needs to know of one sample."""
    sample: dict
    ids: torch.Tensor  # (P,) int64
    patches: torch.Tensor | None  # (N, 1176) float32
    grid: tuple[int, int, int] | None  # in patches
    positions: torch.Tensor  # (3, P) int64
    seconds_per_grid: float


class PromptTooLong(ValueError):
    """A prompt over the limit: in training a wrong setting, in evaluation a question that scores 0."""


def prepare(sample: dict, clip: Clip | None, tokenizer, style: str = "think", *, max_prompt_tokens: int | None = None,
            tokens_per_second: int = 2, device: str | torch.device = "cpu") -> Prompt:
    """The prompt of one sample as tensors on `device`; `clip` is None for a text-only sample.

    A prompt is never truncated, because that would cut the question or part of the video: PromptTooLong over
    `max_prompt_tokens`, with the arithmetic.
    """
    if (clip is None) != ("video" not in sample):
        raise ValueError(f"sample {sample['id']}: {'no clip for' if clip is None else 'a clip but no'} 'video'")
    patches, grid, seconds_per_grid = None, None, 1.0
    if clip is not None:
        patches, grid = patchify(clip.frames.to(device))
        seconds_per_grid = 2 / clip.sample_fps  # a grid is two frames
    ids = encode_prompt(tokenizer, build_prompt(sample, style), num_video_tokens(grid) if grid else 0)
    check_prompt_length(sample, ids, clip, max_prompt_tokens)
    positions = mrope_positions(ids, grid, seconds_per_grid, tokens_per_second=tokens_per_second,
                                video_token_id=tokenizer.convert_tokens_to_ids(VIDEO_PAD))
    return Prompt(sample, ids.to(device), patches, grid, positions.to(device), seconds_per_grid)


def check_prompt_length(sample: dict, ids: torch.Tensor, clip: Clip | None, limit: int | None) -> None:
    """PromptTooLong with the arithmetic (frames x size -> tokens) for a prompt over `limit` tokens."""
    if limit is None or len(ids) <= limit:
        return
    message = f"sample {sample['id']}: the prompt has {len(ids)} tokens, more than {limit}"
    if clip is not None:
        T, _, H, W = clip.frames.shape
        t, h, w = math.ceil(T / 2), H // 28, W // 28
        message += (f": {T} frames of {W} x {H} pixels -> {t} x {h} x {w} = {t * h * w} video tokens, and "
                    f"{len(ids) - t * h * w} of text; lower --total_pixels or --max_frames")
    raise PromptTooLong(message)


if __name__ == "__main__":
    from tools.data_commands import main

    main()
