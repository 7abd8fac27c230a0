"""From a video file and a question to tensors: sample, prompt, frames, patches, positions.

Read from top to bottom; the order is the one in which a sample travels:

    sample (dict)  --build_prompt-->  chat messages  --encode_prompt-->  ids (P,)
    clip.mp4       --read_video--->  frames (T, 3, H, W)  --patchify-->  patches (N, 1176), grid
    ids, grid      --mrope_positions-->  positions (3, P)                  (prepare: all of it for one sample)

A picture is a clip of one frame with a budget of its own (`read_picture`); a sample may have several. Nothing here knows a
model, a reward or a gradient; what differs between Qwen2.5-VL and Qwen3-VL is in a `Geometry` (lib/geometry.py), whose
defaults are Qwen2.5-VL's. Letters: P prompt tokens, V visual tokens among them, T frames, N = 4V patches, 1176 numbers of a
patch (Qwen3-VL: 1536). Samples are read in lib/samples.py, files are opened in lib/readers.py and lib/pictures.py;
lib/loader.py does so in worker processes. The command line, `python data.py toy | convert | check | select`, is in
tools/data_commands.py.

Left out on purpose: the library's own video processor. Frame choice, resize, patch order and positions are a page of
code, they are what a video model sees, and their library versions differ from release to release without a word.
"""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from lib.captions import as_caption
from lib.geometry import MERGE, QWEN2_5, Geometry
from lib.pictures import read_picture_file
from lib.readers import DECODING_ERRORS, IndexIsWrong, Source, VideoError, find_video, first_line, open_video
from lib.samples import LETTERS, NUM_BOXES, entry_of, files_of, option_texts

# ---------------------------------------------------------------------------------------------------------------------
# 1. Prompts, in the published words, and the completion a warm start imitates

STYLES = ("think", "answer", "temporal_r1")
THINK = ("Output your thought process within the <think> </think> tags, including analysis with either specific "
         "timestamps (xx.xx) or time ranges (xx.xx to xx.xx) in <timestep> </timestep> tags.")
THINK_OF_PICTURES = "Output your thought process within the <think> </think> tags."  # ours: pictures have no times to be told
TIMES = ("rovide the start and end times (in seconds, precise to two decimal places) in the format \"start time to "
         "end time\" within the <answer> </answer> tags. For example: \"12.54 to 17.83\".")
LETTER = "rovide your answer within the <answer> </answer> tags, output the corresponding letter of the option."
GLUE = (" At the same time, in the <glue> </glue> tags, present the precise time period in seconds of the video clips "
        "on which you base your answer to this question in the format of [(s1, e1), (s2, e2), ...]. For example: "
        "<answer>A</answer><glue>[(5.2, 10.4)]</glue>.")
BOXES = ("Provide your answer within the <answer> </answer> tags as a list of eight sublists, where each sublist "
         "contains the normalized coordinates [x0, y0, x1, y1]. For example: <answer>[[0.1, 0.5, 0.3, 0.55], [0.72, "
         "0.25, 0.84, 0.43], ...]</answer>.\n")
# Ours: for models whose boxes are whole numbers, `box_units` to a side (Qwen3-VL: 1000); the words are the published ones.
WHOLE_BOXES = BOXES.replace("normalized", "relative").replace("y1]. F", "y1] from 0 to 1000. F").replace(
    "[[0.1, 0.5, 0.3, 0.55], [0.72, 0.25, 0.84, 0.43]", "[[100, 500, 300, 550], [720, 250, 840, 430]")
# Ours: VideoChat-R1 trained captioning as its sixth task and published neither prompt nor code for it. The instruction
# is the sample's own; the rest follows the other five. A sentence for each event is what the judge compares.
CAPTION = ("rovide your description within the <answer> </answer> tags, in plain sentences, one for each event, in the "
           "order in which they happen.\n")
# Ours too, after GLUE: nobody of the family has published a question about several windows, or about none.
MOMENTS = ("rovide all of these time periods, in seconds, within the <answer> </answer> tags in the format of [(s1, e1), "
           "(s2, e2), ...], or [] if the event does not happen in the video. For example: "
           "<answer>[(5.2, 10.4), (20.0, 25.5)]</answer>.")
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


class Texts(NamedTuple):
    """How a task is asked, and what the model ought to say."""

    question: Callable[[dict, bool], str]  # (sample, does it ask for a thought?) -> VideoChat-R1's words
    target: Callable[[dict, str], str]  # (sample, style) -> the true answer in its tags, as the prompt asks for it
    temporal_r1: Callable[[dict], str] | None = None  # Temporal-R1's words, where it has published some
    frames: int | None = None  # how many are shown, evenly spaced, where the sample lists none; None: as many as --fps says


def ask(think: bool, rest: str, before: str = "\n\n") -> str:
    """The sentence that begins with "P" + `rest`. Behind the request for a thought, which has its own paragraph, it begins
    with "Then, p"."""
    return f"\n\n{THINK}\n\nThen, p{rest}" if think else f"{before}P{rest}"


def in_answer(text: str) -> str:
    return f"<answer>{text}</answer>"


def the_event(sample: dict) -> str:
    """The event as annotated, without its final full stop: it stands inside quotation marks in mid-sentence.

    VideoChat-R1 drops the stop and lower-cases in training and does neither in evaluation. One text for both: what is
    trained is then what is measured, and names keep their capitals.
    """
    return sample["question"].strip().removesuffix(".").rstrip()


def ask_when(sample: dict, think: bool) -> str:
    return (f'To accurately pinpoint the event "{the_event(sample)}" in the video, determine the precise time period of '
            f"the event.{ask(think, TIMES)}")


def ask_when_as_temporal_r1(sample: dict) -> str:
    return f'Give the query: "{the_event(sample)}", when does the described content occur in the video?'


def say_when(sample: dict, style: str) -> str:
    [(start, end)] = ordered_spans(sample)
    if style == "temporal_r1":
        return in_answer(json.dumps({"start_time": f"{start:.2f}", "end_time": f"{end:.2f}"}))
    return in_answer(f"{start:.2f} to {end:.2f}")


def ordered_spans(sample: dict) -> list[list[float]]:
    """A truth that is reversed in the annotation is written in order, as scoring reads it."""
    return [sorted(span) for span in sample["spans"]]


def windows_text(sample: dict) -> str:
    """The true windows as a list, in the order of the annotation: "[(5.20, 10.40), (20.00, 25.50)]", or "[]"."""
    return "[" + ", ".join(f"({start:.2f}, {end:.2f})" for start, end in ordered_spans(sample)) + "]"


def ask_every_time(sample: dict, think: bool) -> str:
    return (f'To accurately pinpoint the event "{the_event(sample)}" in the video, determine every time period in which it '
            f"happens. It may happen once, several times, or not at all.{ask(think, MOMENTS)}")


def say_every_time(sample: dict, style: str) -> str:
    return in_answer(windows_text(sample))


def ask_which(sample: dict, think: bool, rest: str = f"{LETTER}\n") -> str:
    options = [f"({letter}) {option}" for letter, option in zip(LETTERS, option_texts(sample))]
    seen = "image" + "s" * (len(files_of(sample)) > 1) if "image" in sample else "video"
    return (f'Answer the question: "{sample["question"].strip()}" according to the content of the {seen}. Select the answer '
            f"from :{options}.{ask(think, rest, before=' ')}")


def say_which(sample: dict, style: str) -> str:
    return in_answer(sample["answer"])


def ask_which_and_when(sample: dict, think: bool) -> str:
    return ask_which(sample, think, f"{LETTER}{GLUE}\n")


def say_which_and_when(sample: dict, style: str) -> str:
    return f"{say_which(sample, style)}<glue>{windows_text(sample)}</glue>"


def box_numbers(sample: dict, box: list[float]) -> list[float | int]:
    """A box, in [0, 1] in every sample, as the model is to write it: in fractions, or in `box_units` to a side."""
    units = sample.get("box_units", 1)
    return [round(float(value), 3) if units == 1 else round(value * units) for value in box]


def ask_where(sample: dict, think: bool) -> str:
    whole = sample.get("box_units", 1) > 1
    kind, limits = ("relative", " from 0 to 1000") if whole else ("normalized", "")
    start = box_numbers(sample, sample["boxes"][0])
    return (f'Track the "{sample["question"].strip()}" in the video based on its initial coordinates "{start}". The output '
            f"should be a list containing eight sublists. Each sublist includes four {kind} coordinates [x0, y0, x1, y1]{limits} "
            "representing the bounding box of the object at specific time intervals.\n\n"
            + (f"{THINK}\n\n" if think else "") + (WHOLE_BOXES if whole else BOXES))


def say_where(sample: dict, style: str) -> str:
    texts = [[f"{v:.3f}" if isinstance(v, float) else str(v) for v in box_numbers(sample, box)] for box in sample["boxes"]]
    return in_answer("[" + ", ".join("[" + ", ".join(box) + "]" for box in texts) + "]")


def ask_for_label(sample: dict, think: bool) -> str:
    """VideoChat-R1's instruction lists the labels itself; where an instruction does not, they are added in its words."""
    question = sample["question"].strip()
    if not all(is_named(option.strip(), question) for option in sample["options"]):
        question += f" Choice one answer from {sample['options']}."
    if think:
        return f"{question}\n\n{THINK}\n\nThen, provide your final answer within the <answer> </answer> tags.\n"
    return f"{question}\n\nOutput your final answer within the <answer> </answer> tags.\n"


def is_named(label: str, question: str) -> bool:
    """Whether the label stands in the question in whole words: "running" does not tell that the answer to write is "run"."""
    return re.search(rf"(?<!\w){re.escape(label)}(?!\w)", question, re.IGNORECASE) is not None


def ask_what_happens(sample: dict, think: bool) -> str:
    return sample["question"].strip() + ask(think, CAPTION)


def say_what_happens(sample: dict, style: str) -> str:
    return in_answer(as_caption(sample["events"]))


TEXTS = {
    "grounding": Texts(ask_when, say_when, temporal_r1=ask_when_as_temporal_r1),
    "moments": Texts(ask_every_time, say_every_time),
    "qa": Texts(ask_which, say_which),
    "gqa": Texts(ask_which_and_when, say_which_and_when),
    "tracking": Texts(ask_where, say_where, frames=NUM_BOXES),
    "classification": Texts(ask_for_label, say_which),
    "captioning": Texts(ask_what_happens, say_what_happens),
}


def texts_of(sample: dict) -> Texts:
    return entry_of(TEXTS, sample["task"], "TEXTS of data.py (its prompt and its target)")


def build_prompt(sample: dict, style: str) -> list[dict]:
    """Chat messages that ask for the sample's answer: VideoChat-R1's words ("think", "answer") or Temporal-R1's.

    VideoChat-R1: one user turn, the text before the video. Temporal-R1: its system line, the video before the text; it
    published a prompt for grounding only, so the other tasks keep VideoChat-R1's words, behind the video and without
    the system line, which would ask for a letter or a list "in JSON format". Pictures stand where a video would.
    """
    texts, think = texts_of(sample), prompt_wants_thought(sample, style)
    kind = "image" if "image" in sample else "video"
    media = [{"type": kind, kind: file} for file in files_of(sample)]
    if style == "temporal_r1" and texts.temporal_r1:
        text = {"type": "text", "text": texts.temporal_r1(sample)}
        return [{"role": "system", "content": TEMPORAL_R1_SYSTEM if think else TEMPORAL_R1_SYSTEM_ANSWER},
                {"role": "user", "content": [*media, text]}]
    question = texts.question(sample, think)
    text = {"type": "text", "text": question.replace(THINK, THINK_OF_PICTURES) if kind == "image" else question}
    return [{"role": "user", "content": [*media, text] if style == "temporal_r1" else [text, *media]}]


def target_text(sample: dict, style: str) -> str:
    """The completion that SFT imitates: the sample's `target`, else the truth in the prompt's answer format.

    The thought is left empty: the annotations have none, and an invented one would be trained on.
    """
    if "target" in sample:
        return sample["target"]
    return ("<think></think>" if prompt_wants_thought(sample, style) else "") + texts_of(sample).target(sample, style)


VIDEO_PAD, IMAGE_PAD = "<|video_pad|>", "<|image_pad|>"


def encode_prompt(tokenizer, messages: list[dict], num_tokens: int | list[int], times: list[float] | None = None,
                  geometry: Geometry = QWEN2_5) -> torch.Tensor:
    """Token ids (P,) int64 of the chat with the assistant's turn opened, as the model's chat template renders it.

    `<|video_pad|>` stands `num_tokens` times; with `times`, seconds of each pair of frames, in as many equal runs, each
    behind its time as text. A list: how often `<|image_pad|>` stands for each picture. Whatever the texts contain is text:
    a question that spells out `<|im_end|>` gets ordinary tokens for these characters, never the one that ends the turn.
    """
    if geometry.system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": geometry.system}, *messages]
    pieces = []  # (is it a special token?, text)
    for message in messages:
        pieces += [(True, "<|im_start|>"), (False, message["role"] + "\n"), *_content_pieces(message["content"], times),
                   (True, "<|im_end|>"), (False, "\n")]
    pieces += [(True, "<|im_start|>"), (False, "assistant\n")]
    pads = sum(piece in ((True, VIDEO_PAD), (True, IMAGE_PAD)) for piece in pieces)
    runs = num_tokens if isinstance(num_tokens, list) else [num_tokens // len(times or [None])] * pads
    if (len(runs), bool(num_tokens)) != (pads, pads > 0):
        raise ValueError(f"the prompt has {('no', 'a')[pads] if pads < 2 else pads} video part{'s' * (pads > 1)}, and {num_tokens} "
                         "visual tokens are to fill it")
    ids, runs = [], iter(runs)
    for is_special, piece in _merge_texts(pieces):
        if is_special:
            token = tokenizer.convert_tokens_to_ids(piece)
            if token is None:
                raise ValueError(f"the tokenizer has no {piece}; use the checkpoint's own or add its special tokens")
            ids += [token] * (next(runs) if piece in (VIDEO_PAD, IMAGE_PAD) else 1)
        else:  # split_special_tokens: otherwise special-token strings inside a question become the tokens themselves
            ids += tokenizer(piece, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def _content_pieces(content: str | list[dict], times: list[float] | None) -> list[tuple[bool, str]]:
    if isinstance(content, str):
        return [(False, content)]
    run, image = ([(True, "<|vision_start|>"), (True, pad), (True, "<|vision_end|>")] for pad in (VIDEO_PAD, IMAGE_PAD))
    # Nothing stands around the runs of a video. So it was when Qwen3-VL was released (transformers 4.57 to 5.9); from 5.10 the
    # library leaves the template's own pair around all of them. Which one the weights were trained with is not published.
    video = run if times is None else [piece for t in times for piece in ((False, f"<{t:.1f} seconds>"), *run)]
    return [piece for part in content
            for piece in ({"video": video, "image": image}.get(part["type"]) or [(False, part["text"])])]


def frame_pair_times(seconds: torch.Tensor) -> list[float]:
    """Seconds (T,) of frames to the mean of each pair; an odd last frame stands twice, as in `patchify`."""
    seconds = torch.cat([seconds, seconds[-1:]])[: 2 * math.ceil(len(seconds) / 2)]
    # Listed frames may lie before `start`: nothing is earlier than 0.
    return seconds.view(-1, 2).mean(1).clamp(min=0).tolist()


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
# 2. Video: which frames, and how large


@dataclass(frozen=True)
class Clip:
    """What is left of a video file: resized frames and their times."""
    frames: torch.Tensor  # (T, 3, H, W) uint8
    seconds: torch.Tensor  # (T,) float64, begin of each frame, counted from `start`
    sample_fps: float  # of the chosen frames, not of the file
    is_constant: bool = True  # the rate of these frames; where it varies, `seconds` are the only clock


@dataclass(frozen=True)
class VideoSettings:
    """How much of a video the model sees; VideoChat-R1's values."""
    target_fps: float = 2.0
    max_frames: int = 768
    total_pixels: int = 3584 * 784  # 784 = 28 * 28 pixels make one token of two frames
    min_pixels: int = 16 * 784
    factor: int = QWEN2_5.factor  # pixels of a token's side: `Geometry.factor`
    picture_pixels: tuple[int, int] = QWEN2_5.picture_pixels  # least and most of a picture: `Geometry.picture_limits`


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


def frame_budget(num_frames: int, total_pixels: int, min_pixels: int, factor: int = 28) -> float:
    """Most pixels of one of `num_frames` frames, 768 tokens at most: `total_pixels` is no hard cap, long videos keep their
    least size."""
    return max(min(768 * factor**2, 2 * total_pixels / num_frames), int(1.05 * min_pixels))


def read_video(path: str | Path, *, target_fps: float = 2.0, max_frames: int = 768, total_pixels: int = 3584 * 784,
               min_pixels: int = 16 * 784, factor: int = 28, start: float | None = None, end: float | None = None,
               frames: list[int] | int | None = None, dense_windows: list[list[float]] | None = None,
               density: float = 1.5, fps: float = 2.0, reader: str | None = None) -> Clip:
    """Decode the frames a model sees, resized to the pixel budget. T is even unless `frames` lists an odd number.

    Every frame is the one that the file shows at its time, or the video is a VideoError (lib/readers.py). start, end:
    seconds; of a file with a constant rate only frames ceil(start * rate) .. min(floor(end * rate), last) are used, else
    those that begin from `start` to `end`; time counts from `start`, or from the first frame that is shown. frames: exactly
    these 0-based frames of the file, or, as a number, that many evenly spaced ones, repeated if there are fewer.
    dense_windows: [start, end] in seconds, on the same clock, whose frames are chosen `density` times as densely as others
    (`denser_frames`); their number stays, and the clip has no constant rate. fps: of a folder of frames. reader: as for
    `open_video`; by default the quick way where it works, else the thorough one.
    All frames get the first one's size, and its budget is `frame_budget`'s. VideoError(path, reason) for whatever cannot be
    read.
    """
    path = find_video(path)
    asked = target_fps, max_frames, start, end, frames, dense_windows, density
    size = total_pixels, min_pixels, factor
    try:
        try:
            return _read(open_video(path, fps, reader), asked, *size)
        except IndexIsWrong:
            return _read(open_video(path, fps, "decoding"), asked, *size)
    except DECODING_ERRORS as error:
        raise VideoError(path, first_line(error)) from error


def _read(source: Source, asked: tuple, total_pixels: int, min_pixels: int, factor: int) -> Clip:
    indices, sample_fps = choose_frames(source, *asked)
    budget = frame_budget(len(indices), total_pixels, min_pixels, factor)
    wanted, resized, size = sorted(set(indices)), {}, None
    for index, frame in zip(wanted, source.fetch(wanted), strict=True):
        size = size or smart_resize(*frame.shape[:2], min_pixels=min_pixels, max_pixels=budget, factor=factor)
        resized[index] = _resize(torch.from_numpy(frame), size)
    start = asked[2] or 0
    seconds = torch.from_numpy(source.begins[indices] - start)
    is_constant = source.is_constant and (asked[4] is not None or not asked[5])  # listed frames, or no dense windows
    return Clip(torch.stack([resized[index] for index in indices]), seconds, sample_fps, is_constant)


def choose_frames(source: Source, target_fps: float, max_frames: int, start: float | None, end: float | None,
                  frames: list[int] | int | None, windows: list[list[float]] | None = None,
                  density: float = 1.5) -> tuple[list[int], float]:
    """Indices into the file, and the (mean) rate of the chosen frames."""
    first, last = frames_between(source, start or 0, math.inf if end is None else end)
    if last - first < 1:
        raise ValueError(f"{max(0, last - first + 1)} of its {source.num_frames} frames lie between start {start or 0} "
                         f"and end {end if end is not None else 'of file'}; a clip needs at least 2")
    if frames is None:
        indices, sample_fps = frame_indices(last - first + 1, rate_between(source, first, last), target_fps=target_fps,
                                            max_frames=max_frames)
        if windows:
            indices = denser_frames(source.begins[first:last + 1] - (start or 0), windows, len(indices), density)
        return [first + i for i in indices], sample_fps
    if isinstance(frames, int):
        frames = [first + round(k * (last - first) / (frames - 1)) for k in range(frames)]
    if not frames or min(frames) < 0 or max(frames) >= source.num_frames:
        raise ValueError(f"frames {frames} are asked for, the video has frames 0 to {source.num_frames - 1}")
    # The same formula as in frame_indices, over the stretch that the listed frames cover.
    first, last = min(frames), max(frames)
    return list(frames), len(frames) * rate_between(source, first, last) / (last - first + 1)


def denser_frames(begins: np.ndarray, windows: list[list[float]], count: int, density: float = 1.5) -> list[int]:
    """Which `count` of the N frames that begin at `begins` (N,) are shown where `windows` get a closer look.

    The windows, [start, end] in seconds, get `density` times as many of their frames as the rest of the video of its own;
    VideoChat-R1.5 takes 1.5. What lies outside the video or in another window adds nothing; with no window, or windows over
    everything, the frames are evenly spaced. Both ends are shown, and with count <= N no frame is shown twice.
    """
    N, place = len(begins), np.arange(count)
    inside = np.zeros(N - 1, dtype=bool)  # of each gap between neighbouring frames: whether a window reaches into it
    for start, end in windows:
        inside |= (begins[1:] > start) & (begins[:-1] < end)
    dense = int(inside.sum())
    if dense < count - 1:  # the windows may run out of frames: then all of theirs are shown, and the rest is evenly spaced
        density = min(density, (N - 1 - dense) / (count - 1 - dense))
    stretched = np.concatenate([[0.0], np.cumsum(np.where(inside, density, 1.0))])  # (N,) a time in which the choice is even
    indices = np.rint(np.interp(np.linspace(0, stretched[-1], count), stretched, np.arange(N))).astype(int)
    indices = np.minimum(np.maximum.accumulate(indices - place), N - count) + place  # rounding may have met a frame twice
    return indices.tolist()


def frames_between(source: Source, start: float, end: float) -> tuple[int, int]:
    """The first and the last frame from second `start` to second `end`; the last is under the first where there is none."""
    if not source.is_constant:
        return int(np.searchsorted(source.begins, start, "left")), int(np.searchsorted(source.begins, end, "right")) - 1
    last = source.num_frames - 1
    return math.ceil(start * source.fps), last if end == math.inf else min(math.floor(end * source.fps), last)


def rate_between(source: Source, first: int, last: int) -> float:
    """Frames a second of this stretch: the file's, where it is constant."""
    seconds = source.begins[last] - source.begins[first]
    return source.fps if source.is_constant or seconds <= 0 else (last - first) / float(seconds)


def read_picture(path: str, min_pixels: int, max_pixels: int, factor: int) -> Clip:
    """A picture as the checkpoint's own image processor resizes it, T = 1. VideoError for whatever cannot be read."""
    try:
        pixels = read_picture_file(Path(path))
        size = smart_resize(*pixels.shape[:2], min_pixels=min_pixels, max_pixels=max_pixels, factor=factor)
        return Clip(_resize(torch.from_numpy(pixels), size)[None], torch.zeros(1, dtype=torch.float64), 1.0)
    except DECODING_ERRORS as error:
        raise VideoError(path, first_line(error)) from error


def _resize(frame: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """(H, W, 3) uint8 to (3, *size) uint8. Bicubic overshoots at edges, hence the clamp before rounding."""
    frame = frame.permute(2, 0, 1)
    if size == tuple(frame.shape[1:]):
        return frame.contiguous()
    resized = torch.nn.functional.interpolate(frame[None].float(), size, mode="bicubic", antialias=True)[0]
    return resized.clamp(0, 255).round().to(torch.uint8).contiguous()


def video_arguments(sample: dict, settings: VideoSettings) -> dict:
    """The keywords `read_video` gets for this sample; with the path they are all that a clip depends on."""
    shown = {name: value for name, value in vars(settings).items() if name != "picture_pixels"}
    return {**shown, "start": sample.get("start"), "end": sample.get("end"), "fps": sample.get("fps", 2.0),
            "frames": sample.get("frames", texts_of(sample).frames),
            **{name: sample[name] for name in ("dense_windows", "density") if name in sample}}


def picture_arguments(settings: VideoSettings) -> dict:
    """The keywords `read_picture` gets."""
    return {"min_pixels": settings.picture_pixels[0], "max_pixels": settings.picture_pixels[1], "factor": settings.factor}


# ---------------------------------------------------------------------------------------------------------------------
# 3. Patches and positions

Grid = tuple[int, int, int]  # t, h, w: frame pairs, and rows and columns of patches


def patchify(frames: torch.Tensor, geometry: Geometry = QWEN2_5) -> tuple[torch.Tensor, Grid]:
    """Frames (T, 3, H, W) uint8 to patches (N, 1176) float32 and the grid (t, h, w) in patches, N = t * h * w.

    1176 = 3 channels * 2 frames * 14 * 14 pixels, in this order (Qwen3-VL: 16 * 16). Four rows in a row are one 2 x 2
    block of patches, which the vision tower merges into one token; tokens run row by row, then frame pair by frame pair.
    An odd T repeats its last frame. Works where `frames` lies: on the GPU it is faster and moves a quarter of the bytes.
    """
    (T, _, H, W), patch = frames.shape, geometry.patch
    if frames.dtype != torch.uint8 or H % geometry.factor or W % geometry.factor or T < 1:
        raise ValueError(f"frames are {tuple(frames.shape)} {frames.dtype}; patches need uint8 with sides that are "
                         f"multiples of {geometry.factor}")
    if T % 2:
        frames = torch.cat([frames, frames[-1:]])
    mean, std = (torch.tensor(value, device=frames.device).view(3, 1, 1) for value in (geometry.mean, geometry.std))
    pixels = (frames.float() / 255 - mean) / std
    t, h, w = len(frames) // 2, H // patch, W // patch
    pixels = pixels.reshape(t, 2, 3, h // 2, 2, patch, w // 2, 2, patch)
    #                       0  1  2    3     4    5      6     7    8
    # (t, block row, block column, row in block, column in block; channel, frame, y, x)
    patches = pixels.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(t * h * w, 3 * 2 * patch * patch)
    return patches, (t, h, w)


def grids_of(grid: list[Grid] | Grid | None) -> list[Grid]:
    """As a list: nothing, one grid of a video, or one of each picture."""
    return [] if grid is None else grid if isinstance(grid, list) else [grid]


def num_video_tokens(grid: Grid) -> int:
    """V of a grid in patches: a token is 2 x 2 of them."""
    return math.prod(grid) // MERGE**2


def mrope_positions(ids: torch.Tensor, grids: list[Grid] | Grid | None, seconds_per_grid: float | torch.Tensor, *,
                    video_token_id: int, tokens_per_second: float = 2) -> torch.Tensor:
    """Rotary positions (3, P) int64, axes time, height, width, of a prompt with a run of visual tokens for each of `grids`.

    Text counts up on all three axes at once. A run starts at the next position q: its token (t, y, x) stands at
    (q + trunc(t * seconds_per_grid * tokens_per_second), q + y, q + x). Text goes on at 1 + the largest position of
    any axis. A tensor (t,) in place of seconds_per_grid tells when each of the t of a grid begins: a variable rate's own
    seconds stand for t * seconds_per_grid. Qwen2.5-VL has one grid for a video, and these are the positions that its
    checkpoints were trained with (transformers 4.49 to 4.51); later versions of the library differ from it silently, so one
    tensor is computed here and passed to sampling and scoring alike. Qwen3-VL has a grid of t = 1 for each pair of frames,
    and a picture is such a grid in both. Grids are in patches; None for text only. ValueError where grids and ids disagree.
    """
    grids = grids_of(grids)
    runs, wanted = _runs(ids == video_token_id), [num_video_tokens(grid) for grid in grids]
    if [length for _, length in runs] != wanted:
        raise ValueError(f"the prompt has {sum(length for _, length in runs)} video tokens in {len(runs)} runs, grids of "
                         f"{', '.join(map(str, grids)) or 'no'} patches need {sum(wanted)} in {len(wanted)}")
    parts, place, q = [], 0, 0  # up to `place` in the prompt positions are given, the next one is q
    for (start, length), grid in zip(runs, grids):
        text = q + torch.arange(start - place).expand(3, -1)
        run = q + start - place + _grid_positions(grid, seconds_per_grid, tokens_per_second)
        parts, place, q = [*parts, text, run], start + length, int(run.max()) + 1
    return torch.cat([*parts, q + torch.arange(len(ids) - place).expand(3, -1)], dim=1)


def _runs(where: torch.Tensor) -> list[tuple[int, int]]:
    """(start, length) of each run of true values in (P,)."""
    edges = torch.cat([where.new_zeros(1), where, where.new_zeros(1)]).int().diff()
    starts, ends = (edges == 1).nonzero().flatten(), (edges == -1).nonzero().flatten()
    return list(zip(starts.tolist(), (ends - starts).tolist()))


def _grid_positions(grid: Grid, seconds_per_grid: float | torch.Tensor, tokens_per_second: float) -> torch.Tensor:
    """(3, V), counted from the first one."""
    t, h, w = grid[0], grid[1] // MERGE, grid[2] // MERGE
    # float32 and this order of factors are the reference's: a product just under a whole number truncates as there.
    if isinstance(seconds_per_grid, torch.Tensor):
        if seconds_per_grid.shape != (t,):
            raise ValueError(f"{tuple(seconds_per_grid.shape)} begins of grids are given, the video has {t} grids")
        time = (seconds_per_grid * tokens_per_second).long()
    else:
        time = (torch.arange(t, dtype=torch.float32) * seconds_per_grid * tokens_per_second).long()
    return torch.stack([axis.flatten() for axis in torch.meshgrid(time, torch.arange(h), torch.arange(w), indexing="ij")])


def shared_times(settings: VideoSettings, geometry: Geometry = QWEN2_5) -> str | None:
    """A note where the frame rate asked for gives neighbouring grids, of two frames each, the same position in time. (Times
    as text may be equal too, but each has a place of its own.)"""
    tokens_per_second = geometry.tokens_per_second
    most = 2 * tokens_per_second
    if settings.target_fps <= most or geometry.timestamps:
        return None
    return (f"--fps {settings.target_fps:g}: above {most} frames a second, pairs of frames share positions in time (the "
            f"published rule cuts them down to {1 / tokens_per_second:g} s), and the model cannot tell their order")


# ---------------------------------------------------------------------------------------------------------------------
# 4. All of it for one sample


@dataclass(frozen=True)
class Prompt:
    """Everything the model needs to know of one sample."""
    sample: dict
    ids: torch.Tensor  # (P,) int64
    patches: torch.Tensor | None  # (N, 1176) float32; Qwen3-VL: (N, 1536)
    grid: Grid | list[Grid] | None  # of the video, or of each picture, whose patches follow each other
    positions: torch.Tensor  # (3, P) int64


class PromptTooLong(ValueError):
    """A prompt over the limit: in training a wrong setting, in evaluation a question that scores 0."""


def prepare(sample: dict, clip: Clip | list[Clip] | None, tokenizer, style: str = "think", *, max_prompt_tokens: int | None = None,
            geometry: Geometry = QWEN2_5, device: str | torch.device = "cpu") -> Prompt:
    """The prompt of one sample as tensors on `device`; `clip` is None for a text-only sample, a list for pictures.

    A prompt is never truncated, because that would cut the question or part of the video: PromptTooLong over
    `max_prompt_tokens`, with the arithmetic.
    """
    if (clip is None) != (not files_of(sample)):
        raise ValueError(f"sample {sample['id']}: {'no clip for' if clip is None else 'a clip but no'} 'video' or 'image'")
    patches, grid, grids, times, seconds_per_grid = None, None, None, None, 0.0
    pad = IMAGE_PAD if "image" in sample else VIDEO_PAD
    if isinstance(clip, list):
        cut, grid = zip(*(patchify(picture.frames.to(device), geometry) for picture in clip))
        patches, grid, grids = torch.cat(cut), list(grid), list(grid)
    elif clip is not None:
        patches, grid = patchify(clip.frames.to(device), geometry)
        if geometry.timestamps:  # a run of tokens for each pair of frames
            grids, times = [(1, *grid[1:])] * grid[0], frame_pair_times(clip.seconds)
        else:
            grids = [grid]
            # A grid is two frames. Listed frames may lie before `start`, and nothing stands before the video's first position.
            seconds_per_grid = 2 / clip.sample_fps if clip.is_constant else clip.seconds[::2].clamp(min=0)
    counts = [num_video_tokens(each) for each in grids_of(grid)]
    ids = encode_prompt(tokenizer, build_prompt(sample, style), counts if pad == IMAGE_PAD else sum(counts), times, geometry)
    check_prompt_length(sample, ids, clip, max_prompt_tokens, geometry.factor)
    positions = mrope_positions(ids, grids, seconds_per_grid, tokens_per_second=geometry.tokens_per_second,
                                video_token_id=tokenizer.convert_tokens_to_ids(pad))
    return Prompt(sample, ids.to(device), patches, grid, positions.to(device))


def check_prompt_length(sample: dict, ids: torch.Tensor, clip: Clip | list[Clip] | None, limit: int | None, factor: int) -> None:
    """PromptTooLong with the arithmetic (frames x size -> tokens) for a prompt over `limit` tokens."""
    if limit is None or len(ids) <= limit:
        return
    message = f"sample {sample['id']}: the prompt has {len(ids)} tokens, more than {limit}"
    if isinstance(clip, list):
        sizes = [(picture.frames.shape[3], picture.frames.shape[2]) for picture in clip]
        message += (f": pictures of {', '.join(f'{W} x {H}' for W, H in sizes)} pixels -> "
                    f"{' + '.join(str(W * H // factor**2) for W, H in sizes)} tokens; lower --image_pixels")
    elif clip is not None:
        T, _, H, W = clip.frames.shape
        t, h, w = math.ceil(T / 2), H // factor, W // factor
        message += (f": {T} frames of {W} x {H} pixels -> {t} x {h} x {w} = {t * h * w} video tokens, and "
                    f"{len(ids) - t * h * w} of text; lower --total_pixels or --max_frames")
    raise PromptTooLong(message)


if __name__ == "__main__":
    from tools.data_commands import main

    main()
