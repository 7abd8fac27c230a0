"""What a run will take, before it is started: memory of a card, disk, hours.

    python -m tools.plan --model 7b --gpus 8 --samples 12408 --seconds 30.6
    python -m tools.plan --model runs/x/final --stage sft --gpus 1
    python -m tools.plan --model 7b --gpus 1 --lora_rank 16 --card_gb 48
    python -m tools.plan --model 3b --gpus 1 --card h200

Counted: parameters (the library's classes, built without memory on the "meta" device), frames and video tokens (by the
functions that data.py reads videos with), bytes of weights, gradients, optimiser, keys and values, and the floating
point operations of every matrix product. Estimated: activations and logits, from the tensors that model.py keeps alive.
Assumed: what the hardware does in a second, `CARDS` and the capitals below; replace them by what you measure.

Read in the order of the file: the model, the video, operations, bytes, seconds. All of it is for the code as it is:
float32 weights, bfloat16 arithmetic, gradient checkpointing, a question a pass. There are three ways to hold the model:

    replicas       every card has all of it
    --shard        every card has 1/N of weights, gradients, optimiser and reference (lib/sharding.py); auto on several cards
    --lora_rank    every card has the frozen model in bfloat16 and trains adapters (lib/lora.py); never sharded

Left out on purpose: evaluation on the way, decoding of videos (other processes do it meanwhile), fragmentation. A card
sold as 80 GB has about 85 10^9 bytes; the verdict counts on 80, and leaves the rest to fragmentation and the driver.

Letters: P prompt tokens with V video tokens among them, G completions of C tokens, L tokens of a packed row.
"""

import functools
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig, Qwen2_5_VLConfig, Qwen3VLConfig

from data import VideoSettings, frame_budget, frame_indices, num_video_tokens, smart_resize
from lib import hf_folder, lora
from lib.distributed import World
from lib.flags import COUNT, FRAME_RATE, FRAMES, PIXELS, TOKENS, fill, flag, given_flags, make_parser, range_problem
from lib.geometry import QWEN2_5, QWEN3, Geometry
from lib.run import KEEP_CHECKPOINTS
from lib.sharding import worth_sharding
from lib.terminal import errors_in_one_sentence
from model import CLASSES


@dataclass(frozen=True)
class Card:
    gigabytes: float  # 10^9 bytes
    matrix_flops: float  # a second, dense bfloat16
    memory_bytes: float  # a second
    source: str  # of both rates


CARDS = {
    "a100": Card(80.0, 312e12, 2.0e12, "its data sheet"),
    "h100": Card(80.0, 800e12, 3.0e12, "about what a large product and a large copy reach there; not measured by us"),
    "h200": Card(141.0, 770e12, 4.08e12, "a large product and a large copy, measured (docs/results.md)"),
}
# The shares of those rates that this code reaches, about as measured on an H200 (docs/results.md), and assumed of the others;
# what lies around a card is assumed of all.
MATRIX_SHARE = 0.4
MEMORY_SHARE = 0.6
LINK_BYTES = 200e9  # a second, of gradients summed between the cards of one machine
LAYER_SECONDS = 0.12e-3  # of a decode step, in each layer: the small kernels between the products, however few rows there are
HOST_LINK_BYTES = 25e9  # a second, between a card and the machine's own memory (--offload)
HOST_BYTES = 150e9  # a second, that memory itself, all processes together
FILE_FPS = 30.0

# Published shapes: config.json of Qwen/Qwen2.5-VL-3B-Instruct and -7B-Instruct. Their vision towers differ only in the
# size of what they hand over.
SHAPES = {
    "3b": {"hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2,
           "intermediate_size": 11008, "vocab_size": 151936, "tie_word_embeddings": True},
    "7b": {"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
           "intermediate_size": 18944, "vocab_size": 152064, "tie_word_embeddings": False},
}
VISION = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "window_size": 112,
          "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2}
# config.json of Qwen/Qwen3-VL-2B-, -4B-, -8B- and -32B-Instruct. The two larger ones have the larger tower.
QWEN3_SHAPES = {
    f"qwen3-{name}": {"hidden_size": D, "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": 8,
                      "head_dim": 128, "intermediate_size": inside, "vocab_size": 151936, "tie_word_embeddings": tied}
    for name, D, layers, heads, inside, tied in (("2b", 2048, 28, 16, 6144, True), ("4b", 2560, 36, 32, 9728, True),
                                                 ("8b", 4096, 36, 32, 12288, False), ("32b", 5120, 64, 64, 25600, False))}
QWEN3_VISION = {
    True: {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16,
           "deepstack_visual_indexes": [5, 11, 17]},  # with tied embeddings
    False: {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16,
            "deepstack_visual_indexes": [8, 16, 24]},
}
NAMES = (*SHAPES, *QWEN3_SHAPES)
TIME_TOKENS = 9  # "<12.2 seconds>" and a pair of vision tokens, for each pair of frames where times are text
STAGES = ("grpo", "sft", "answer")


@dataclass
class Job:
    """What is to be done; the flags are made from these fields, and mean what they mean in train.py."""

    model: str = flag("7b", f"{', '.join(NAMES)}, or a folder with a config.json")
    stage: str = flag("grpo", "GRPO, supervised fine-tuning, or answering alone (eval.py, selection)", choices=STAGES)
    gpus: int = flag(8, "cards, a process each", within=COUNT)
    samples: int = flag(12408, "questions in the data", within=(1, 10**12))
    epochs: float = flag(1.0, "times through them", within=(0.001, 1000))
    videos: int = flag(0, "video files they are about; 0: one a question", within=(0, 10**12))
    questions: int = flag(8, "questions a step, over all cards; answering: eval.py's --batch times them", within=COUNT)
    group_size: int = flag(8, "completions of each question; 1 in fine-tuning", within=(1, 10_000))
    seconds: float = flag(30.6, "length of a video", within=(0.1, 10**7))
    video_bytes: float = flag(60e3, "size of a second of it on the disk (assumed; 480p)", within=(1, 10**12))
    width: int = flag(480, "of its frames, in pixels", within=(1, 100_000))
    height: int = flag(360, "of its frames, in pixels", within=(1, 100_000))
    frames: int = flag(0, "look at exactly so many frames (tracking: 8); 0: as many as --fps says", within=(0, 100_000))
    fps: float = flag(2.0, "frames looked at, for each second of video", within=FRAME_RATE)
    max_frames: int = flag(VideoSettings.max_frames, "most frames of one video", within=FRAMES)
    total_pixels: int = flag(VideoSettings.total_pixels, "pixel budget of a whole video", within=PIXELS)
    min_pixels: int = flag(VideoSettings.min_pixels, "least pixels of a frame", within=PIXELS)
    text_tokens: int = flag(250, "tokens of a prompt beside the video", within=(0, 10**7))
    completion_tokens: int = flag(150, "tokens of a group's longest completion, on average", within=TOKENS)
    max_new_tokens: int = flag(1024, "room for a completion", within=TOKENS)
    beta: float = flag(0.04, "0: no reference", within=(0, 100))
    freeze_vision: bool = flag(False, "train the language model only; --lora_rank implies it")
    lora_rank: int = flag(0, "rank of adapters on all matrices of the language model; 0: train the model itself",
                          within=(0, 1024))
    shard: str = flag("auto", "deal the model out over the cards; auto: by train.py's rule", choices=("auto", "on", "off"))
    offload: bool = flag(False, "shard, and keep the shards in the machine's own memory")
    card: str = flag("a100", "kind of card: its memory and its rates", choices=tuple(CARDS))
    card_gb: float = flag(0.0, "memory of a card, in 10^9 bytes; 0: that of --card", within=(0, 10_000))

    def __post_init__(self):
        self.card_gb = self.card_gb or CARDS[self.card].gigabytes


# --- the model --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    config: PretrainedConfig
    parameters: int  # a tied head counts once, as it is stored once
    vision: int  # of them in the vision tower
    layers: int  # weights of the decoder layers' matrices: each is used once for a token
    head: int  # of the output layer
    blocks: int  # of the vision tower, used for a patch
    merger: int  # used for a video token, those of deepstack among them
    lora_widths: int  # numbers into and out of each matrix that can have an adapter, added up
    together: int  # parameters outside of layers and blocks, which a sharded model gathers all at once ...
    largest: int  # ... and of the largest layer or block, which are gathered one by one


def load_shape(name: str) -> PretrainedConfig:
    """ValueError for a name that is neither a published size nor a folder with a config.json."""
    if name in SHAPES:
        shape = SHAPES[name]
        return Qwen2_5_VLConfig(text_config=dict(shape), tie_word_embeddings=shape["tie_word_embeddings"],
                                vision_config={**VISION, "out_hidden_size": shape["hidden_size"]})
    if name in QWEN3_SHAPES:
        shape = QWEN3_SHAPES[name]
        tied = shape["tie_word_embeddings"]
        return Qwen3VLConfig(text_config=dict(shape), tie_word_embeddings=tied,
                             vision_config={**QWEN3_VISION[tied], "out_hidden_size": shape["hidden_size"]})
    if not (Path(name) / "config.json").is_file():
        raise ValueError(f"--model {name}: neither {' nor '.join(NAMES)} nor a folder with a config.json")
    hf_folder.geometry_in(name)  # refuses another architecture by name
    return AutoConfig.from_pretrained(name, trust_remote_code=False)


@functools.cache
def geometry_by(name: str) -> Geometry:
    """Of a published size or a folder."""
    return QWEN3 if name in QWEN3_SHAPES else QWEN2_5 if name in SHAPES else hf_folder.geometry_in(name)


def deepstack(config: PretrainedConfig) -> list:
    """The tower's mergers beside the last one; none for Qwen2.5-VL."""
    return getattr(config.vision_config, "deepstack_visual_indexes", [])


def head_size(config: PretrainedConfig) -> int:
    text = config.text_config
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def count(config: PretrainedConfig) -> Model:
    """Build the model without memory and count."""
    with torch.device("meta"):
        hf = CLASSES[config.model_type](config)
    mergers = nn.ModuleList([hf.model.visual.merger, *getattr(hf.model.visual, "deepstack_merger_list", [])])
    matrices = {part: sum(m.weight.numel() for m in module.modules() if isinstance(m, (nn.Linear, nn.Conv3d)))
                for part, module in (("layers", hf.model.language_model.layers), ("vision", hf.model.visual),
                                     ("merger", mergers))}
    parameters, vision = (sum(p.numel() for p in part.parameters()) for part in (hf, hf.model.visual))
    parts = [sum(p.numel() for p in part.parameters())
             for part in (*hf.model.language_model.layers, *hf.model.visual.blocks)]
    widths = sum(m.in_features + m.out_features for name, m in hf.model.language_model.layers.named_modules()
                 if isinstance(m, nn.Linear) and name.rpartition(".")[2] in lora.TARGETS)
    return Model(config, parameters, vision, layers=matrices["layers"], head=hf.lm_head.weight.numel(),
                 blocks=matrices["vision"] - matrices["merger"], merger=matrices["merger"], lora_widths=widths,
                 together=parameters - sum(parts), largest=max(parts))


def adapters(model: Model, job: Job) -> int:
    """Numbers in A and B of all matrices."""
    return job.lora_rank * model.lora_widths


def trained(model: Model, job: Job) -> int:
    if job.stage == "answer":
        return 0
    return adapters(model, job) or model.parameters - (model.vision if job.freeze_vision else 0)


def sharded(model: Model, job: Job) -> bool:
    """As train.py decides; answering alone and LoRA never are."""
    if job.stage == "answer" or job.lora_rank:
        return False
    world = World(0, job.gpus, torch.device("cuda"))
    return worth_sharding(job.shard, job.offload, world, model.parameters, 1e9 * job.card_gb)


# --- the video --------------------------------------------------------------------------------------------------------


def video_grid(job: Job) -> tuple[int, int, int]:
    """(t, h, w) in patches of what the model sees of a video."""
    frames = job.frames or len(frame_indices(round(job.seconds * FILE_FPS), FILE_FPS, target_fps=job.fps,
                                             max_frames=job.max_frames)[0])
    shown = geometry_by(job.model)
    height, width = smart_resize(job.height, job.width, min_pixels=job.min_pixels, factor=shown.factor,
                                 max_pixels=frame_budget(frames, job.total_pixels, job.min_pixels, shown.factor))
    return math.ceil(frames / 2), height // shown.patch, width // shown.patch


def tokens_of(job: Job) -> tuple[int, int, int, int]:
    """V, P, G, C."""
    grid = video_grid(job)
    V, times = num_video_tokens(grid), TIME_TOKENS * grid[0] * geometry_by(job.model).timestamps
    return V, V + times + job.text_tokens, 1 if job.stage == "sft" else job.group_size, job.completion_tokens


# --- floating point operations of one question ------------------------------------------------------------------------


def vision_flops(model: Model, grid: tuple[int, int, int]) -> float:
    """One pass of the vision tower: 2 a weight and patch, 4 a channel and pair of patches that see each other."""
    config, (t, h, w) = model.config.vision_config, grid
    pairs = t * config.depth * (h * w) ** 2  # blocks in which all patches of two frames see each other
    if whole := getattr(config, "fullatt_block_indexes", None):  # Qwen2.5-VL: these are such blocks, the others have windows
        side = config.window_size // config.patch_size  # of a window, in patches; windows at the edge are smaller
        in_windows = math.prod(n // side * side**2 + (n % side) ** 2 for n in (h, w))
        pairs = t * (len(whole) * (h * w) ** 2 + (config.depth - len(whole)) * in_windows)
    return 2 * model.blocks * t * h * w + 2 * model.merger * t * h * w / 4 + 4 * config.hidden_size * pairs


def decoder_flops(model: Model, tokens: float, pairs: float) -> float:
    """`tokens` through all decoder layers, with `pairs` of a query and a key in each. Pairs above the diagonal are
    counted too, although a causal kernel skips them."""
    config = model.config.text_config
    width = config.num_attention_heads * head_size(model.config)
    return 2 * model.layers * tokens + 4 * config.num_hidden_layers * width * pairs


def flops(model: Model, job: Job) -> dict[str, float]:
    """By phase: prefill, decode, learn, reference; those that the stage does not have are absent."""
    V, P, G, C = tokens_of(job)
    seeing = vision_flops(model, video_grid(job))
    text, tower, N = model.config.text_config, model.config.vision_config, 4 * V
    own = G * (C - 1)  # the last token of a completion is never fed in
    beside = 2 * adapters(model, job)  # of a token in its adapters, which the reference does not have
    scoring = decoder_flops(model, P + own, P**2 + own * (P + C - 1)) + 2 * model.head * G * C
    sampling = {"prefill": seeing + decoder_flops(model, P, P**2) + 2 * model.head * G + beside * P,
                "decode": decoder_flops(model, own, own * P + G * (C - 1) * C / 2) + (2 * model.head + beside) * own}
    if job.stage == "answer":
        return sampling
    frozen = job.freeze_vision or job.lora_rank
    if frozen and job.stage == "grpo":
        seeing = 0  # the tower has encoded the video for sampling, and that serves again
    # Backward costs two forwards, and checkpointing a third one: without the logits, which are kept, and without the
    # last matrix of each layer and block, whose result backward does not need.
    spared = model.head * G * C + text.num_hidden_layers * text.hidden_size * text.intermediate_size * (P + own)
    spared += 0 if frozen else tower.depth * tower.hidden_size * tower.intermediate_size * N
    learning = {"learn": 4 * scoring + (1 if frozen else 4) * seeing - 2 * spared}
    if job.lora_rank:  # frozen matrices have no gradient of their own
        learning["learn"] += 4 * beside * (P + own) - 2 * (model.layers * (P + own) + model.head * G * C)
    if job.stage == "sft":
        return learning
    return sampling | learning | ({"reference": scoring + seeing} if job.beta else {})


# --- bytes ------------------------------------------------------------------------------------------------------------


def key_value_bytes(model: Model) -> int:
    """Of one token, in bfloat16, all layers."""
    config = model.config.text_config
    return 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * head_size(model.config)


def questions_a_card(job: Job) -> int:
    return math.ceil(job.questions / job.gpus)


def activation_bytes(model: Model, job: Job) -> float:
    """What checkpointing keeps (the input of every layer and block), and the inside of the largest layer. Estimate."""
    V, P, G, C = tokens_of(job)
    text, vision = model.config.text_config, model.config.vision_config
    L = P + G * (C - 1)
    kept = 4 * text.num_hidden_layers * L * text.hidden_size
    kept += 0 if job.freeze_vision or job.lora_rank else 2 * vision.depth * 4 * V * vision.hidden_size
    # residuals and norms in float32, queries, keys and values, four tensors of the MLP in bfloat16; the prompt's keys
    # and values are repeated for the G completions and for the heads that share them
    heads = text.num_attention_heads * head_size(model.config)
    inside = L * (24 * text.hidden_size + 8 * text.intermediate_size) + 4 * G * (P + C) * heads
    inside += 4 * L * text.hidden_size * len(deepstack(model.config))  # what rides behind the embeddings
    return kept + inside


def states(model: Model, job: Job) -> dict[str, float]:
    """Bytes that follow from the number of parameters, of all of them: a replica's, or those of all shards together."""
    T, A = trained(model, job), adapters(model, job)
    referred = job.stage == "grpo" and job.beta and not job.lora_rank  # LoRA: the policy with its adapters off
    return {"weights": 2 * model.parameters + 4 * A if job.lora_rank else 4 * model.parameters,
            "gradients": 4 * T, "optimiser": 8 * T,  # both moments; the fused step of AdamW needs nothing beside them
            "reference": 2 * model.parameters if referred else 0}


def memory(model: Model, job: Job) -> dict[str, float]:
    """Bytes on each card, by what they are for."""
    _, P, G, C = tokens_of(job)
    learns, samples, shards = job.stage != "answer", job.stage != "sft", sharded(model, job)
    rows = min(4096, G * C)  # logits exist for so many tokens at a time, in about four copies of float32
    share = 0 if job.offload and shards else 1 / job.gpus if shards else 1
    # Autocast's bfloat16 copies of float32 weights, which a sharded model gathers and LoRA's frozen one is. Sampling
    # keeps all of them for its many steps. Learning makes them where they are used: the head's, and one layer's.
    copied = 0 if shards else adapters(model, job) if job.lora_rank else model.layers + model.head
    in_use = 0 if shards or job.lora_rank else model.largest + model.head
    return {name: share * value for name, value in states(model, job).items()} | {
        "copies, to sample": 2 * copied if samples else 0,
        "copies, to learn": 2 * in_use if learns else 0,
        # sharded: all weights once for a rollout. While learning, what is not in a layer and one layer: weights and
        # their gradient in bfloat16, and the float32 that the gradients are added up in
        "gathered, to sample": 2 * model.parameters if shards and samples else 0,
        "gathered, to learn": 8 * (model.together + model.largest) if shards else 0,
        "whole, while it loads": 4 * model.parameters if shards else 0,
        "activations": activation_bytes(model, job) if learns else 0,
        "logits": 16 * rows * model.config.text_config.vocab_size if learns else 0,
        "keys and values": questions_a_card(job) * (P + G * job.max_new_tokens) * key_value_bytes(model) * samples,
    }


def peak_bytes(model: Model, job: Job) -> dict[str, float]:
    """By phase: no phase needs everything at once."""
    part = memory(model, job)
    always = part["weights"] + part["optimiser"] + part["reference"]
    peaks = {"sampling": always + part["copies, to sample"] + part["gathered, to sample"] + part["keys and values"],
             "learning": always + part["copies, to learn"] + part["gathered, to learn"] + part["gradients"]
             + part["activations"] + part["logits"],
             "stepping": always + part["gradients"]}
    wanted = {"grpo": tuple(peaks), "sft": ("learning", "stepping"), "answer": ("sampling",)}[job.stage]
    loading = {"loading": part["whole, while it loads"]} if sharded(model, job) else {}
    return loading | {name: peaks[name] for name in wanted}


def remedies(model: Model, job: Job) -> list[tuple[str, Job]]:
    """What could be changed, in the words of the flags, the least change of what is learned first."""
    ways = [(f"half the --total_pixels ({job.total_pixels // 2})", replace(job, total_pixels=job.total_pixels // 2)),
            (f"half the --max_new_tokens ({job.max_new_tokens // 2})",
             replace(job, max_new_tokens=job.max_new_tokens // 2))]
    if job.stage == "answer":
        return [("one question at a time", replace(job, questions=job.gpus)), *ways]
    if job.lora_rank:
        return ways
    dealt = [] if job.gpus == 1 or sharded(model, job) else [("--shard on", replace(job, shard="on"))]
    more = [(f"--gpus {n} --shard on", replace(job, gpus=n, shard="on")) for n in (8,) if job.gpus < n]
    kept = [] if job.offload else [("--offload", replace(job, offload=True, shard="on"))]
    fewer = [] if job.freeze_vision else [("--freeze_vision", replace(job, freeze_vision=True))]
    adapted = [("--lora_rank 16", replace(job, lora_rank=16, shard="auto", offload=False))]
    return [*dealt, *more, *kept, *fewer, *adapted, *ways]


def needed(model: Model, job: Job) -> float:
    """Bytes of a card at the worst moment."""
    return max(peak_bytes(model, job).values())


def verdict(model: Model, job: Job) -> str:
    """Whether a card is large enough; if not, each remedy that would do, or all that help when none does."""
    need, room, card = needed(model, job), 1e9 * job.card_gb, f"a card of {job.card_gb:g} GB"
    if need <= room:
        return f"fits {card} (needs {need / 1e9:.0f})"
    needs = [(words, needed(model, changed)) for words, changed in remedies(model, job)]
    enough = [f"{words} ({value / 1e9:.0f})" for words, value in needs if value <= room]
    some = [f"{words} ({value / 1e9:.0f})" for words, value in needs if value < 0.99 * need]
    helps = ", or ".join(enough) or (f"nothing alone, but some {', '.join(some)}" if some else "a smaller model")
    return f"does not fit: needs {need / 1e9:.0f} GB, more than {card}; what helps: {helps}"


def disk(model: Model, job: Job) -> dict[str, float]:
    """Bytes: checkpoints hold what is trained and both moments; a new one is complete before the oldest goes."""
    checkpoints = (KEEP_CHECKPOINTS + 1) * 12 * trained(model, job)
    final, warm_start = 2 * model.parameters, 4 * model.parameters  # the one for others, the other to go on from
    if job.lora_rank:  # matrices that had an adapter are written in float32, the others as they are
        final = warm_start = 2 * model.parameters + 2 * model.layers
    models = {"grpo": final, "sft": final + warm_start, "answer": 0}[job.stage]
    return {"checkpoints": checkpoints if job.stage != "answer" else 0, "models": models,
            "videos": (job.videos or job.samples) * job.seconds * job.video_bytes}


# --- seconds ----------------------------------------------------------------------------------------------------------


def steps(job: Job) -> int:
    return math.ceil(job.samples * job.epochs / job.questions)


def step_seconds(model: Model, job: Job) -> dict[str, float]:
    """Of one step, by phase, on the card with most questions."""
    _, P, G, C = tokens_of(job)
    card, many = CARDS[job.card], questions_a_card(job)
    rate, bandwidth = card.matrix_flops * MATRIX_SHARE, card.memory_bytes * MEMORY_SHARE
    seconds = {name: many * value / rate for name, value in flops(model, job).items() if name != "decode"}
    if job.stage != "sft":
        # Each token reads all weights once, however many rows there are, and the keys and values of prompt and rows.
        read = 2 * (model.layers + model.head) + many * (P + G * C / 2) * key_value_bytes(model)
        a_token = LAYER_SECONDS * model.config.text_config.num_hidden_layers + read / bandwidth
        seconds["decode"] = max((C - 1) * a_token, many * flops(model, job)["decode"] / rate)
    if T := trained(model, job):
        touched = 28 * T  # weight, gradient and two moments read, three of them written
        if sharded(model, job):
            seconds["step"] = touched / HOST_BYTES if job.offload else touched / job.gpus / bandwidth
            seconds["gathering"] = gathering_seconds(model, job)
        else:
            seconds["step"] = touched / bandwidth + (8 * T / LINK_BYTES if job.gpus > 1 else 0)
    return seconds


def gathering_seconds(model: Model, job: Job) -> float:
    """Of a step of a sharded model, as if nothing were computed meanwhile: an upper bound.

    All weights in bfloat16 once to sample, and for each question forward, backward and through the reference; float32
    gradients back for each question. Offloaded shards come from the machine's memory, float32, each time.
    """
    many, reference = questions_a_card(job), 1 if states(model, job)["reference"] else 0
    passes = many * (2 + reference) + (job.stage != "sft")
    seconds = (2 * passes * model.parameters + 4 * many * trained(model, job)) / LINK_BYTES if job.gpus > 1 else 0
    if job.offload:
        seconds += 4 * (passes * model.parameters + many * trained(model, job)) / job.gpus / HOST_LINK_BYTES
    return seconds


def hours(model: Model, job: Job) -> float:
    return steps(job) * sum(step_seconds(model, job).values()) / 3600


# --- the command line -------------------------------------------------------------------------------------------------


def parse_arguments(arguments: list[str] | None = None) -> Job:
    parser = make_parser(Job, "Memory, disk and hours of a run, before it is started.")
    job = fill(Job, given_flags(parser, arguments))
    if problem := find_problem(job):
        parser.error(problem)
    return job


def find_problem(job: Job) -> str | None:
    """What is wrong with the settings. What train.py refuses is refused here: a plan for it would be for nothing."""
    if problem := range_problem(job):
        return problem
    if job.offload and job.shard == "off":
        return "--offload keeps shards in the machine's memory; with --shard off there are none"
    if job.lora_rank and (job.shard == "on" or job.offload):
        return ("--lora_rank leaves little to shard: every card holds the frozen model; leave --shard on and --offload "
                "out")
    if job.stage == "answer" and (job.lora_rank or job.shard == "on" or job.offload):
        return ("--stage answer: a model that answers is whole, without adapters; leave --lora_rank, --shard on and "
                "--offload out")
    return None


def held(model: Model, job: Job) -> str:
    if job.lora_rank:
        return "every card holds the frozen model in bfloat16; LoRA is never sharded"
    if sharded(model, job):
        share = "all shards" if job.gpus == 1 else f"1/{job.gpus} of the model"
        return f"sharded: every card {'has its machine hold' if job.offload else 'holds'} {share}"
    return "every card holds the whole model"


def print_plan(model: Model, job: Job) -> None:
    V, P, G, C = tokens_of(job)
    t, h, w = video_grid(job)
    print(f"{model.parameters:,} parameters, {trained(model, job):,} of them trained")
    print(f"a video: {t} x {h // 2} x {w // 2} = {V} tokens; a prompt: {P}; {G} completions of {C}")
    print(f"a prompt shared by its group: {G * (P + C) / (P + G * C):.1f} times fewer tokens, G (P + C) / (P + G C)")
    print(held(model, job))
    peaks = peak_bytes(model, job)
    for title, unit, part in (("memory of a card", 1e9, memory(model, job)), ("at its peak", 1e9, peaks),
                              ("disk", 1e9, disk(model, job))):
        print(f"\n{title}, GB")
        print("\n".join(f"  {name:28}{value / unit:10.1f}" for name, value in part.items() if value))
    if job.offload:
        shards = {name: value for name, value in states(model, job).items() if value}
        print(f"\nthe machine's own memory, all processes: {sum(shards.values()) / 1e9:.1f} GB ({', '.join(shards)})")
    print(f"\n{verdict(model, job)}")
    print("\n10^12 floating point operations of a question")
    print("\n".join(f"  {name:28}{value / 1e12:10.1f}" for name, value in flops(model, job).items()))
    card = CARDS[job.card]
    print(f"\nseconds of a step, if --card {job.card} multiplies {card.matrix_flops / 1e12:g} Tflop/s ({MATRIX_SHARE:.0%} of "
          f"them used) and moves\n{card.memory_bytes / 1e12:g} TB/s ({MEMORY_SHARE:.0%}); from: {card.source}")
    print("\n".join(f"  {name:28}{value:10.2f}" for name, value in step_seconds(model, job).items()))
    print(f"\n{steps(job)} steps on {job.gpus} cards: {hours(model, job):.1f} hours, without evaluation")


def main(arguments: list[str] | None = None) -> None:
    job = parse_arguments(arguments)
    print_plan(count(load_shape(job.model)), job)


if __name__ == "__main__":
    with errors_in_one_sentence():
        main()
