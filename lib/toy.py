"""The synthetic task: short clips that a model must watch to answer, and a tiny Qwen2.5-VL or Qwen3-VL that can learn to.

A clip lasts 10 seconds. A small white square wanders over a grey ground; once, for 2 to 4 whole seconds, the screen is
tinted in one of four colours. The clip is crisp or noisy. From that come samples of all six tasks:

    grounding       when is the screen red?                exactly one span
    qa              which colour does the screen turn?     a letter
    gqa             the same, with the window it does so   letter and span
    tracking        where is the white square?             eight boxes
    classification  is the quality high or low?            a label
    captioning      what happens?                          two sentences

Colour, time and place are drawn independently, so that an answer which does not look at the video scores what the blind
baselines score. Everything is a real file: H.264 in .mp4, a Hugging Face folder, a jsonl.

Two kinds of label. `spans` is exact: the reward and the evaluation use it. `target`, which supervised fine-tuning imitates,
comes from annotators who press a key while they watch: both ends up to `LATENESS` seconds late, in the thought as in the
answer. Imitation learns to be late, and as uncertain as they are; a reward that is exact can undo both.
"""

import json
from collections.abc import Callable
from fractions import Fraction
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from data import BOXES, CAPTION, GLUE, LETTER, STYLES, THINK, TIMES, WHOLE_BOXES, build_prompt, target_text
from lib.distributed import World
from lib.files import write_whole
from lib.geometry import QWEN2_5, QWEN3, Geometry
from lib.samples import load_samples

COLOURS = {"red": (230, 40, 40), "green": (40, 190, 60), "blue": (50, 70, 230), "yellow": (235, 215, 40)}
SIZE, FPS = 56, 8  # 56 x 56 pixels are 2 x 2 tokens for every second
DURATION, EVENT_LENGTHS = 10, (2, 3, 4)  # seconds
LATENESS = 2  # seconds by which the ends of a warm-start label come late, at most
VERSION = 10  # of everything above and below: a folder written by another version is written anew

# --- clips ------------------------------------------------------------------------------------------------------------


def draw_event(rng: np.random.Generator) -> tuple[str, int, int]:
    """-> colour, start, end in whole seconds; every place in the clip is as likely as any other."""
    length = int(rng.choice(EVENT_LENGTHS))
    start = int(rng.integers(0, DURATION - length + 1))
    return str(rng.choice(list(COLOURS))), start, start + length


def draw_path(rng: np.random.Generator, num_frames: int) -> np.ndarray:
    """Boxes [x0, y0, x1, y1] in [0, 1] of a square that moves on a straight line, (num_frames, 4)."""
    side = rng.uniform(0.22, 0.36)
    start, stop = rng.uniform(0, 1 - side, 2), rng.uniform(0, 1 - side, 2)
    corner = start + (stop - start) * np.linspace(0, 1, num_frames)[:, None]  # (num_frames, 2)
    return np.concatenate([corner, corner + side], axis=1)


def render(rng: np.random.Generator, event: tuple[str, int, int], boxes: np.ndarray, noisy: bool) -> np.ndarray:
    """-> frames (T, SIZE, SIZE, 3) uint8."""
    colour, start, end = event
    ground = rng.uniform(70, 130) + 6 * rng.standard_normal((SIZE, SIZE, 1), dtype=np.float32)
    frames = np.broadcast_to(ground, (DURATION * FPS, SIZE, SIZE, 3)).astype(np.float32)
    frames[start * FPS : end * FPS] = 0.3 * frames[start * FPS : end * FPS] + 0.7 * np.array(COLOURS[colour])
    for frame, box in zip(frames, boxes):
        x0, y0, x1, y1 = np.round(box * SIZE).astype(int)
        frame[y0:y1, x0:x1] = 250
    if noisy:
        frames += 25 * rng.standard_normal(frames.shape, dtype=np.float32)
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


def late_span(rng: np.random.Generator, start: int, end: int) -> tuple[int, int]:
    """The span as an annotator gives it who presses a key when the event begins and another when it ends."""
    while True:
        s, e = (int(x) for x in (start, end) + rng.integers(0, LATENESS + 1, 2))
        if s < min(e, DURATION):
            return s, min(e, DURATION)


def thought(span: tuple[int, int], colour: str) -> str:
    """What is seen, second by second: "0 grey1 grey2 red ...". No blank before a digit, where Qwen's tokenizer would make
    it a token of its own: two tokens a second are as many positions as a second of video spans, so that "look at the
    second I am writing about" is one fixed distance, which a tiny model learns in minutes."""
    return "".join(f"{t} {colour if span[0] <= t < span[1] else 'grey'}" for t in range(DURATION))


def motion(boxes: np.ndarray) -> str:
    """Where a square with these boxes (T, 4) goes, in words; the longer side of its way decides."""
    dx, dy = boxes[-1, :2] - boxes[0, :2]
    if max(abs(dx), abs(dy)) < 0.1:  # a tenth of the picture: less is hardly seen
        return "stays where it is"
    if abs(dx) > abs(dy):
        return "moves to the " + ("right" if dx > 0 else "left")
    return "moves " + ("down" if dy > 0 else "up")


def make_samples(rng: np.random.Generator, name: str, event: tuple[str, int, int], boxes: np.ndarray,
                 noisy: bool) -> list[dict]:
    """One sample of every task about one clip."""
    colour, start, end = event
    letter = "ABCD"[list(COLOURS).index(colour)]
    choice = {"question": "which colour does the screen turn?", "options": list(COLOURS), "answer": letter}
    shown = np.round(np.linspace(0, len(boxes) - 1, 8)).astype(int)
    spans = [late_span(rng, start, end) for _ in range(3)]  # three annotators, each as late
    thoughts = [f"<think>{thought(span, colour)}</think>" for span in spans]
    (s, e), _, (s2, e2) = spans
    samples = [
        {"task": "grounding", "question": f"the screen is {colour}", "spans": [[start, end]],
         "target": f"{thoughts[0]}<answer>{s} to {e}</answer>"},
        {"task": "qa", **choice, "target": f"{thoughts[1]}<answer>{letter}</answer>"},
        {"task": "gqa", **choice, "spans": [[start, end]],
         "target": f"{thoughts[2]}<answer>{letter}</answer><glue>[({s2}, {e2})]</glue>"},
        {"task": "tracking", "question": "white square", "frames": shown.tolist(),
         "boxes": [[round(float(x), 3) for x in boxes[k]] for k in shown]},
        {"task": "classification", "options": ["low quality", "high quality"],
         "question": "How about the quality of the video? Choose one answer from ['low quality', 'high quality'].",
         "answer": "low quality" if noisy else "high quality"},
        {"task": "captioning", "question": "Describe what happens in the video.",
         "events": [f"the screen turns {colour}", f"a white square {motion(boxes)}"]},
    ]
    common = {"video": f"videos/{name}.mp4", "duration": float(DURATION)}
    return [{"id": f"{name}-{sample['task']}", **sample, **common} for sample in samples]


def write_dataset(out: Path, train: int, eval: int, seed: int) -> None:
    """`train` and `eval` clips as real .mp4 files under `out`/videos, with train.jsonl and eval.jsonl.

    Left alone when `out` already holds what these settings give. Each of the four names in `out` appears whole: of several
    runs that start together each finds all clips. What else lies there stays.
    """
    # Another version of PyAV brings another encoder, and other pixels.
    out, settings = Path(out), {"version": VERSION, "av": metadata.version("av"), "train": train, "eval": eval, "seed": seed}
    marker = out / "settings.json"
    if marker.exists() and json.loads(marker.read_text()) == settings:
        return
    lines: dict[str, list[str]] = {"train": [], "eval": []}
    with write_whole(out / "videos") as folder:
        folder.mkdir()
        for split, (name, clips) in enumerate((("train", train), ("eval", eval))):
            for i in tqdm(range(clips), f"writing {clips} clips ({name})", unit="clip", leave=False):
                rng = np.random.default_rng([seed, split, i])
                event, boxes, noisy = draw_event(rng), draw_path(rng, DURATION * FPS), bool(rng.integers(2))
                write_mp4(folder / f"{name}-{i:04d}.mp4", render(rng, event, boxes, noisy))
                lines[name] += map(json.dumps, make_samples(rng, f"{name}-{i:04d}", event, boxes, noisy))
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
            "depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": hidden,
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
    """What the tokenizer learns from: prompts of all styles, and the targets of the one that is trained."""
    # A run without captions keeps the tokenizer that it had before there were any.
    samples = [sample for sample in samples if sample["task"] != "captioning" or "captioning" in tasks]
    texts = [part["text"] for sample in samples for each in STYLES for message in build_prompt(sample, each)
             for part in (message["content"] if message["role"] == "user" else []) if "text" in part]
    return texts + [target_text(sample, style) for sample in samples]
