"""The synthetic task: short clips that a model must watch, and questions that it must read, and a tiny Qwen2.5-VL or
Qwen3-VL that can learn to do both.

A clip lasts 12 seconds. Twice, for 2 to 4 whole seconds each, a grey screen is tinted, in two of four colours. A white and
a black square, each small or large, jump twice, from corner to corner. One half of the clip has stripes. From
that come samples of all seven tasks, and what each asks about is one of two or three things that the clip shows:

    grounding       when is the screen red? when does it turn for the second time?     exactly one span
    qa              which colour does the screen turn first? (or second)               a letter
    gqa             the same, with the window in which it does so                      letter and span
    tracking        where is the white square? (or the black one)                      eight boxes
    classification  how is the quality of the first half? (or the second)              a label
    captioning      what does the screen do? (or the white square, or the black one)   two sentences
    moments         when is the screen red, if it is?                                  a list of one span, or of none

All of it is drawn independently, so that an answer which does not look at the video scores what the blind baselines score,
and one that does not read the question is about the wrong thing half of the time. Everything is a real file: H.264 in .mp4,
a Hugging Face folder, a jsonl.

Two kinds of label. `spans`, `boxes` and `events` are exact: the reward and the evaluation use them. `target`, which supervised
fine-tuning imitates, comes from annotators who are only human. They press a key while they watch, so both ends of an event
come up to `LATENESS` seconds late, in the thought as in the answer; so do the boxes that they draw, up to `LAG` seconds; they often
tell one event only of two. Imitation learns to be late and to leave out; a reward that is exact can undo it.
"""

import json
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from data import BOXES, CAPTION, GLUE, LETTER, STYLES, THINK, TIMES, WHOLE_BOXES, build_prompt, target_text
from lib.captions import as_caption
from lib.distributed import World
from lib.files import write_whole
from lib.geometry import QWEN2_5, QWEN3, Geometry
from lib.samples import NUM_BOXES, load_samples

COLOURS = {"red": (230, 40, 40), "green": (40, 190, 60), "blue": (50, 70, 230), "yellow": (235, 215, 40)}
SQUARES = {"white": 250, "black": 5}
ROWS, COLUMNS = ("top", "bottom"), ("left", "right")
SIDES = {"small": 3, "large": 4}  # of a square, in tenths of the picture
SIZE, FPS = 56, 8  # pixels of a side, frames a second; the model sees 28 x 28 pixels, which are one token a second
DURATION, EVENT_LENGTHS = 12, (2, 3, 4)  # seconds
STRIPES = 65  # by how much they are darker, of 255
LATENESS = 2  # seconds by which the ends of a warm-start label come late, at most
LAG = 2  # seconds by which its boxes are behind, at most
TELLS_ALL = 0.25  # share of its captions that tell both events
VERSION = 30  # of everything above and below: a folder written by another version is written anew

# --- clips ------------------------------------------------------------------------------------------------------------


class Event(NamedTuple):
    """The screen has this colour from `start` to `end`, in whole seconds."""

    colour: str
    start: int
    end: int


class Square(NamedTuple):
    size: str
    boxes: np.ndarray  # (T, 4): [x0, y0, x1, y1] in tenths of the picture, whole ones


class Scene(NamedTuple):
    """What a clip shows."""

    events: list[Event]  # two, in their order
    squares: dict[str, Square]  # white and black
    bad_half: int  # the half that has stripes


def draw_scene(rng: np.random.Generator) -> Scene:
    return Scene(draw_events(rng), draw_squares(rng), int(rng.integers(2)))


def draw_events(rng: np.random.Generator) -> list[Event]:
    """Two colours, with a second of grey between them at least; each way to place them is as likely as any other."""
    first, second = (int(length) for length in rng.choice(EVENT_LENGTHS, 2))
    spare = DURATION - first - second - 1  # seconds of grey that may stand before, between and behind
    a, b = sorted(rng.choice(spare + 2, 2, replace=False))
    before, between = int(a), int(b - a - 1)
    start = before + first + 1 + between
    colours = rng.choice(list(COLOURS), 2, replace=False)
    return [Event(str(colours[0]), before, before + first), Event(str(colours[1]), start, start + second)]


def draw_squares(rng: np.random.Generator) -> dict[str, Square]:
    """White and black, never in the same place."""
    while True:
        white, black = (draw_square(rng) for _ in SQUARES)
        if (white.boxes[:, :2] != black.boxes[:, :2]).any(axis=1).all():
            return {"white": white, "black": black}


def draw_square(rng: np.random.Generator) -> Square:
    """It jumps twice, among four places, the corners, each time between two of the frames that tracking shows: in the
    first half of them, and in the second. Neither when nor where to can be told from where it begins."""
    size, num_frames = str(rng.choice(list(SIDES))), DURATION * FPS
    places = rng.choice(4, 3, replace=False)
    jumps = np.array([rng.integers(1, 4), rng.integers(4, NUM_BOXES - 1)]) - 0.5  # of the shown frames 0 ... 7
    stretch = np.searchsorted(jumps / (NUM_BOXES - 1) * (num_frames - 1), np.arange(num_frames))  # (T,): 0, 1, 2
    corner = 5 * np.stack([places % 2, places // 2], axis=1)[stretch]  # (T, 2)
    return Square(size, np.concatenate([corner, corner + SIDES[size]], axis=1))


def render(rng: np.random.Generator, scene: Scene) -> np.ndarray:
    """-> frames (T, SIZE, SIZE, 3) uint8."""
    ground = rng.uniform(90, 130) + 6 * rng.standard_normal((SIZE, SIZE, 1), dtype=np.float32)
    frames = np.broadcast_to(ground, (DURATION * FPS, SIZE, SIZE, 3)).astype(np.float32)
    for colour, start, end in scene.events:
        frames[start * FPS : end * FPS] = 0.3 * frames[start * FPS : end * FPS] + 0.7 * np.array(COLOURS[colour])
    for name, square in scene.squares.items():
        for frame, box in zip(frames, np.round(square.boxes / 10 * SIZE).astype(int)):
            x0, y0, x1, y1 = box
            frame[y0:y1, x0:x1] = SQUARES[name]
    half = len(frames) // 2
    bad = frames[scene.bad_half * half : (scene.bad_half + 1) * half]
    bad.reshape(half, SIZE // 8, 8, SIZE, 3)[:, :, :4] -= STRIPES  # four rows of eight: two of four when the model sees them
    return frames.clip(0, 255).astype(np.uint8)


def write_mp4(path: Path, frames: np.ndarray, fps: int = FPS) -> None:
    """frames (T, height, width, 3) uint8 -> H.264 in .mp4."""
    import av  # writing is the only thing that always needs it

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps))
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        stream.options = {"crf": "20", "preset": "ultrafast", "threads": "1"}  # others vary from run to run
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


# --- samples ----------------------------------------------------------------------------------------------------------


def late_events(rng: np.random.Generator, events: list[Event]) -> list[Event]:
    """The events as an annotator gives them who presses a key when one begins and another when it ends."""
    while True:
        late = rng.integers(0, LATENESS + 1, (len(events), 2))
        found = [Event(e.colour, e.start + int(s), min(e.end + int(t), DURATION)) for e, (s, t) in zip(events, late)]
        edges = [second for event in found for second in event[1:]]
        if edges == sorted(edges) and all(event.start < event.end for event in found):
            return found


def thought(words: str, events: list[Event], told: list[Event]) -> str:
    """What is asked, what is seen, second by second, "red: 0 grey1 grey2 red ...", and when what is asked about is seen.

    No blank before a digit, where Qwen's tokenizer would make it a token of its own: two tokens a second are as many
    positions as a second of video spans, so that "look at the second I am writing about" is one fixed distance, which a
    tiny model learns in minutes."""
    seen = {t: event.colour if event in told else "other" for event in events for t in range(event.start, event.end)}
    windows = ", ".join("{} {} to {}".format(*event) for event in told)
    return f"{words}: " + "".join(f"{t} {seen.get(t, 'grey')}" for t in range(DURATION)) + f"; {windows or 'none'}"


ORDER = ("first", "second")


def make_samples(rng: np.random.Generator, name: str, scene: Scene) -> list[dict]:
    """Samples of every task about one clip: one each, but for what is hard to see, about each that could be asked for."""
    samples = [{"task": "grounding", **ask_when(rng, scene.events)},
               {"task": "qa", **ask_which(rng, scene.events)[0]},
               {"task": "gqa", **ask_which(rng, scene.events)[1]},
               *({"task": "tracking", **ask_where(rng, colour, square)} for colour, square in scene.squares.items()),
               *({"task": "classification", **ask_how_good(half, scene.bad_half)} for half in range(2)),
               *({"task": "captioning", **ask_what(rng, scene, subject)} for subject in ("screen", *scene.squares)),
               {"task": "moments", **ask_whether(rng, scene.events)}]
    common, number = {"video": f"videos/{name}.mp4", "duration": float(DURATION)}, Counter()
    for sample in samples:
        number[sample["task"]] += 1
        again = "" if number[sample["task"]] == 1 else f"-{number[sample['task']]}"
        sample |= {"id": f"{name}-{sample['task']}{again}", **common}
    return samples


def ask_when(rng: np.random.Generator, events: list[Event]) -> dict:
    """By colour, or by order."""
    asked, by_colour = int(rng.integers(2)), bool(rng.integers(2))
    late, event = late_events(rng, events), events[asked]
    words = event.colour if by_colour else ORDER[asked]
    question = f"the screen is {words}" if by_colour else f"the screen has its {words} colour"
    return {"question": question, "spans": [[event.start, event.end]],
            "target": f"<think>{thought(words, late, [late[asked]])}</think><answer>{late[asked].start} to {late[asked].end}</answer>"}


def ask_which(rng: np.random.Generator, events: list[Event]) -> tuple[dict, dict]:
    """Without, and with the window."""
    asked, late = int(rng.integers(2)), late_events(rng, events)
    event = events[asked]
    letter = "ABCD"[list(COLOURS).index(event.colour)]
    choice = {"question": f"which is the {ORDER[asked]} colour of the screen?", "options": list(COLOURS), "answer": letter}
    said = f"<think>{thought(ORDER[asked], late, [late[asked]])}</think><answer>{letter}</answer>"
    return ({**choice, "target": said},
            {**choice, "spans": [[event.start, event.end]],
             "target": f"{said}<glue>[({late[asked].start}, {late[asked].end})]</glue>"})


def ask_where(rng: np.random.Generator, colour: str, square: Square) -> dict:
    """The annotator's hand is some seconds behind the square, in the thought as in the boxes."""
    lag, boxes = int(rng.integers(0, LAG + 1)), square.boxes
    shown = np.round(np.linspace(0, len(boxes) - 1, NUM_BOXES)).astype(int)
    by_second = boxes[FPS // 2 :: FPS]  # (DURATION, 4): the jumps are so placed that a shown frame is like its second
    late = by_second[np.maximum(np.arange(DURATION) - lag, 0)]
    exact, drawn = ([[int(x) / 10 for x in box] for box in found] for found in (boxes[shown], late[shown // FPS]))
    return {"question": f"{colour} square", "frames": shown.tolist(), "boxes": exact,
            "target": f"<think>{colour} square: {places(late)}</think><answer>{drawn}</answer>"}


def places(boxes: np.ndarray) -> str:
    """boxes (T, 4) -> where the square is, second by second, in the form of the thought about colours."""
    return "".join(f"{t} {ROWS[y // 5]}{COLUMNS[x // 5]}" for t, (x, y) in enumerate(boxes[:, :2]))


def ask_how_good(asked: int, bad_half: int) -> dict:
    """Of one half, 0 or 1."""
    looks = ["striped" if half == bad_half else "clean" for half in range(2)]
    seen = "".join(f"{t} {looks[t >= DURATION // 2]}" for t in range(DURATION))
    return {"options": ["low quality", "high quality"], "answer": (answer := "low quality" if asked == bad_half else "high quality"),
            "target": f"<think>{ORDER[asked]}: {seen}; {looks[asked]}</think><answer>{answer}</answer>",
            "question": f"How about the quality of the {ORDER[asked]} half of the video? Choose one answer from "
                        "['low quality', 'high quality']."}


def ask_whether(rng: np.random.Generator, events: list[Event]) -> dict:
    """A colour that is there, or one that is not."""
    late, event, colours = late_events(rng, events), events[int(rng.integers(2))], [event.colour for event in events]
    asked = event.colour if rng.integers(2) else str(rng.choice([colour for colour in COLOURS if colour not in colours]))
    told = [event for event in late if event.colour == asked]
    return {"question": f"the screen is {asked}", "spans": [[start, end] for colour, start, end in events if colour == asked],
            "target": f"<think>{thought(asked, late, told)}</think><answer>{[(start, end) for _, start, end in told]}</answer>"}


def ask_what(rng: np.random.Generator, scene: Scene, about: str) -> dict:
    """Two events, of the screen or of a square; the annotator often tells one of them only."""
    if about == "screen":
        late = late_events(rng, scene.events)
        subject, seen = "screen", thought("screen", late, late)
        events = [f"the screen turns {event.colour}" for event in scene.events]
    else:
        size, boxes = scene.squares[about]
        subject, seen = f"{about} square", f"{about} square: {places(boxes[FPS // 2 :: FPS])}; {size}"
        events = [f"the {about} square is {size}", f"the {about} square ends at the {ROWS[boxes[-1, 1] // 5]}"]
    told = events if rng.random() < TELLS_ALL else [events[int(rng.integers(2))]]
    return {"question": f"Describe what the {subject} does in the video.", "events": events,
            "target": f"<think>{seen}</think><answer>{as_caption(told)}</answer>"}


def make_clip(rng: np.random.Generator, name: str) -> tuple[np.ndarray, list[dict]]:
    """Frames, and the samples about them."""
    scene = draw_scene(rng)
    return render(rng, scene), make_samples(rng, name, scene)


def write_dataset(out: Path, train: int, eval: int, seed: int, make_clip: Callable = make_clip,
                  version: int | str = VERSION) -> None:
    """`train` and `eval` clips as real .mp4 files under `out`/videos, with train.jsonl and eval.jsonl.

    Left alone when `out` already holds what these settings give. Each of the four names in `out` appears whole: of several
    runs that start together each finds all clips. What else lies there stays.
    """
    # Another version of PyAV brings another encoder, and other pixels.
    out, settings = Path(out), {"version": version, "av": metadata.version("av"), "train": train, "eval": eval, "seed": seed}
    marker = out / "settings.json"
    if marker.exists() and json.loads(marker.read_text()) == settings:
        return
    lines: dict[str, list[str]] = {"train": [], "eval": []}
    with write_whole(out / "videos") as folder:
        folder.mkdir()
        for split, (name, clips) in enumerate((("train", train), ("eval", eval))):
            for i in tqdm(range(clips), f"writing {clips} clips ({name})", unit="clip", leave=False):
                frames, samples = make_clip(np.random.default_rng([seed, split, i]), f"{name}-{i:04d}")
                write_mp4(folder / f"{name}-{i:04d}.mp4", frames)
                lines[name] += map(json.dumps, samples)
    lines["settings"] = [json.dumps(settings)]  # last: it says that the rest is there
    for name, text in lines.items():
        with write_whole(out / f"{name}.json{'' if name == 'settings' else 'l'}") as file:
            file.write_text("".join(line + "\n" for line in text), encoding="utf-8")


# --- the model --------------------------------------------------------------------------------------------------------

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
                  "<|video_pad|>"]
QWEN_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
              r"|\s+(?!\S)|\s+")  # how Qwen cuts text before merging bytes: every digit is a token of its own
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PREPROCESSOR = {  # what a published Qwen2.5-VL folder holds for its image processor
    "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor", "min_pixels": 3136,
    "max_pixels": 12845056, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
}


# What every prompt says is one token here, and so is a tag: a tiny model would spend most of its time on reading the published
# instructions, word by word, which for it are always the same.
PHRASES = ("system\nYou are a helpful assistant.", "user\n", "assistant\n", THINK, "\n\nThen, p", TIMES, LETTER, GLUE, BOXES,
           CAPTION, 'To accurately pinpoint the event "', '" in the video, determine the precise time period of the event.',
           'Answer the question: "', '" according to the content of the video. Select the answer from :',
           'Track the "', '" in the video based on its initial coordinates "', '"." The output should be a list containing eight '
           'sublists. Each sublist includes four normalized coordinates [x0, y0, x1, y1] representing the bounding box of the '
           'object at specific time intervals.', "Then, provide your final answer within the <answer> </answer> tags.\n",
           "How about the quality of the ", " half of the video? Choose one answer from ['low quality', 'high quality'].",
           "Describe what the ", " does in the video.", "[[0.", "], [0.", ", 0.", "]]", "low quality", "high quality",
           "<think>", "</think>", "<answer>", "</answer>", "<glue>", "</glue>")


# The time of a pair of frames, "<3.2 seconds>", in three tokens, of which the second is the digit that an answer has.
TIME_PHRASES = ("<", *(f".{tenth} seconds>" for tenth in range(10)), WHOLE_BOXES)


def build_tokenizer(texts: list[str], vocab_size: int = 1024, phrases: tuple[str, ...] = PHRASES):
    """A byte-level BPE of Qwen's kind, trained on `texts`: any string can be written, our prompts in few tokens."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet,
                                  show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(phrase, normalized=False) for phrase in phrases])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>",
                                   chat_template=CHAT_TEMPLATE)


def config_of(tokenizer, hidden: int = 96, layers: int = 3) -> dict:
    """config.json of a tiny Qwen2.5-VL, in the form of the published ones: all that is the language model's stands at the
    top. Newer releases of transformers write another form, which older ones misread (their rope settings come out empty)."""
    token = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL_TOKENS}
    heads = 4
    axis = hidden // heads // 8  # frequencies of the head in the published proportion 16 : 24 : 24 of time : height : width
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl", "torch_dtype": "float32",
        "vocab_size": len(tokenizer), "hidden_size": hidden, "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": 2, "hidden_act": "silu",
        "rms_norm_eps": 1e-5, "attention_dropout": 0.0, "initializer_range": 0.06, "max_position_embeddings": 32768,
        "max_window_layers": layers, "sliding_window": 32768, "use_sliding_window": False, "use_cache": True,
        "rope_theta": 10000.0,
        "rope_scaling": {"type": "mrope",
                         "mrope_section": [hidden // heads // 2 - 2 * (3 * axis // 2), 3 * axis // 2, 3 * axis // 2]},
        "vision_config": {
            "depth": 1, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "out_hidden_size": hidden,
            "hidden_act": "silu", "in_chans": 3, "patch_size": 14, "spatial_patch_size": 14, "spatial_merge_size": 2,
            "temporal_patch_size": 2, "window_size": 112, "fullatt_block_indexes": [0], "tokens_per_second": 2,
            "initializer_range": 0.06,
        },
        "tie_word_embeddings": True,
        "bos_token_id": token["<|endoftext|>"], "eos_token_id": token["<|im_end|>"],
        "image_token_id": token["<|image_pad|>"], "video_token_id": token["<|video_pad|>"],
        "vision_start_token_id": token["<|vision_start|>"], "vision_end_token_id": token["<|vision_end|>"],
    }


def qwen3_config_of(tokenizer, hidden: int = 96, layers: int = 3) -> dict:
    """config.json of a tiny Qwen3-VL, in the form of the published ones: the language model has a part of its own."""
    token = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL_TOKENS}
    heads = 4
    axis = hidden // heads // 6  # frequencies of an axis of the head; the published proportion is 24 : 20 : 20
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"], "model_type": "qwen3_vl",
        "image_token_id": token["<|image_pad|>"], "video_token_id": token["<|video_pad|>"],
        "vision_start_token_id": token["<|vision_start|>"], "vision_end_token_id": token["<|vision_end|>"],
        "tie_word_embeddings": True,
        "text_config": {
            "model_type": "qwen3_vl_text", "dtype": "float32", "vocab_size": len(tokenizer), "hidden_size": hidden,
            "intermediate_size": 3 * hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
            "num_key_value_heads": 2, "head_dim": hidden // heads, "hidden_act": "silu", "rms_norm_eps": 1e-6,
            "attention_bias": False, "attention_dropout": 0.0, "initializer_range": 0.06, "max_position_embeddings": 32768,
            "use_cache": True, "tie_word_embeddings": True, "rope_theta": 10000.0,
            "rope_scaling": {"mrope_interleaved": True, "rope_type": "default",
                             "mrope_section": [hidden // heads // 2 - 2 * axis, axis, axis]},
            "bos_token_id": token["<|endoftext|>"], "eos_token_id": token["<|im_end|>"],
        },
        "vision_config": {
            "model_type": "qwen3_vl", "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2,
            "out_hidden_size": hidden, "hidden_act": "gelu_pytorch_tanh", "in_channels": 3, "patch_size": 16,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0], "initializer_range": 0.06,
        },
    }


class Family(NamedTuple):
    """A kind of tiny model: `--toy_model`."""

    config_of: Callable[..., dict]
    phrases: tuple[str, ...]
    preprocessor: dict
    geometry: Geometry
    chat_template: str


QWEN3_PREPROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessorFast", "processor_class": "Qwen3VLProcessor",
    "size": {"longest_edge": 16777216, "shortest_edge": 65536}, "patch_size": 16, "temporal_patch_size": 2, "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
}
FAMILIES = {
    "qwen2_5": Family(config_of, PHRASES, PREPROCESSOR, QWEN2_5, CHAT_TEMPLATE),
    "qwen3": Family(qwen3_config_of, PHRASES + TIME_PHRASES, QWEN3_PREPROCESSOR, QWEN3,
                    CHAT_TEMPLATE[CHAT_TEMPLATE.index("{% for"):]),  # no system line of its own
}


def build_model(tokenizer, seed: int, hidden: int = 96, layers: int = 3, family: str = "qwen2_5"):
    """A genuine Qwen2.5-VL or Qwen3-VL with random weights, small enough to learn on two CPU cores."""
    import torch
    from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig, Qwen3VLConfig

    config = FAMILIES[family].config_of(tokenizer, hidden, layers)
    config = (Qwen3VLConfig if family == "qwen3" else Qwen2_5_VLConfig).from_dict(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config)
    start, end = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    model.generation_config.update(bos_token_id=start, pad_token_id=start, eos_token_id=[end, start])
    return model


def write_model(folder: Path, texts: list[str], seed: int, family: str = "qwen2_5") -> None:
    """Tokenizer, model and preprocessor in Hugging Face layout: `--model folder` takes it as it takes any checkpoint, and
    what is trained from it passes these files on, so they have the published form (see `config_of`)."""
    folder, kind = Path(folder), FAMILIES[family]
    tokenizer = build_tokenizer(texts, phrases=kind.phrases)
    build_model(tokenizer, seed, family=family).save_pretrained(folder)
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.backend_tokenizer.model.save(str(folder))  # vocab.json and merges.txt
    settings = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
                "chat_template": kind.chat_template}
    # The preprocessor last: the folder is complete when its file is there.
    for name, content in (("config", kind.config_of(tokenizer)), ("tokenizer_config", settings),
                          ("preprocessor_config", kind.preprocessor)):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")


def prepare(config, world: World) -> tuple[str, list[str], list[str]]:
    """A tiny random model for train.py's Config, and synthetic clips where it names no data of its own, written as files
    like any others: (model, train_data, eval_data)."""
    world.phase("write the synthetic task")
    folder = Path("toy") / f"seed{config.seed}-{config.toy_train}-{config.toy_eval}"
    model = Path(config.out) / "initial"
    train, held_out = list(config.train_data), list(config.eval_data)
    if not train:
        train, held_out = [str(folder / "train.jsonl")], [str(folder / "eval.jsonl")]
        if world.is_first:
            write_dataset(folder, config.toy_train, config.toy_eval, config.seed)
    elif world.is_first:
        print("no --model: a tiny model with random weights is trained on --train_data, which tries out data and rewards; "
              "to learn real videos takes a checkpoint (--model)")
    if world.is_first and not (model / "preprocessor_config.json").exists():
        samples = load_samples(train + held_out, config.video_root or None)
        write_model(model, texts_of(samples, config.tasks, config.prompt), config.seed, config.toy_model)
    world.sync()
    return str(model), train, held_out


def texts_of(samples: list[dict], tasks: list[str], style: str) -> list[str]:
    """What the tokenizer learns from: of these tasks the prompts of all styles, and the targets of the one that is trained."""
    samples = [sample for sample in samples if sample["task"] in tasks]
    texts = [part["text"] for sample in samples for each in STYLES for message in build_prompt(sample, each)
             for part in (message["content"] if message["role"] == "user" else []) if "text" in part]
    return texts + [target_text(sample, style) for sample in samples]
