"""What a GPU does with this code, measured, and beside it what was expected.

    bash tests/gpu_run.sh                                     on a machine with a card: all of it, in about 10 minutes
    bash tests/gpu_run.sh --device cpu --tiny                 without a card, in tiny sizes: does the script itself work?
    python tests/gpu_check.py --out results exact decode_3b   some sections
    python tests/gpu_check.py --out results --table           the table of what was measured so far

Every section runs in a `try` of its own: the first failure hides nothing behind it. A section says rows, and a row is
one line of gpu_check.jsonl; table.txt in the same folder has all of them, and is written again after each section.

Sections that ask whether it is right run the toy model; sections that measure run the published sizes with random
weights. Where the code could do the same in another way, the other way is written out here and timed beside it.

Letters: P prompt tokens, G completions of C tokens, Q questions, W vocabulary, D hidden size.
"""

import argparse
import contextlib
import dataclasses
import functools
import gc
import io
import json
import math
import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import bench  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import transformers  # noqa: E402
from conftest import TEXTS, make_prompts  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.autograd import DeviceType  # noqa: E402
from torch.nn.attention.bias import causal_lower_right  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402

import model as model_file  # noqa: E402
import rewards  # noqa: E402
import train  # noqa: E402
from grpo import accumulate_gradients, grpo_loss, rollout  # noqa: E402
from lib import toy  # noqa: E402
from lib.distributed import World  # noqa: E402
from model import GroupCache, LayerCache, VideoLM, decoder_layer  # noqa: E402
from tools import evaluate, plan  # noqa: E402

# --- what is expected -------------------------------------------------------------------------------------------------

# By reading and arithmetic for an H100 or H200, nothing measured: (least, most, ideal). They were counted for a decode
# step of 57 kernels a layer, attention with a mask written out and norms of several kernels. "Ideal" counts nothing but
# the bytes, or the operations, that cannot be avoided.
ESTIMATES = {
    "decode 3b, 8 rows: a step": (6.4, 7.1, 2.1),
    "decode 3b, 32 rows: a step": (7.7, 8.4, 2.3),
    "decode 7b, 8 rows: a step": (8.9, 9.4, 4.8),
    "decode 7b, 32 rows: a step": (10.7, 11.2, 5.1),
    "decode 3b: kernels of a step": (2062, 2062, None),
    "decode 7b: kernels of a step": (1614, 1614, None),
    "scoring 3b, as the code does it: forward": (129, 129, 47),
    "scoring 3b, as the code does it: backward": (396, 396, 141),
    "scoring 7b, as the code does it: forward": (229, 229, 103),
    "scoring 7b, as the code does it: backward": (678, 678, 309),
}
# Of the card's bandwidth in a decode step: what is aimed at, with the compiled layer.
SHARES = {"3b": 0.45, "7b": 0.6}
# What must hold: (least, most).
LIMITS = {
    "float32, prompt shared: largest |log p - CPU's|": (0, 1e-3),
    "float32, prompt shared: |gradient - CPU's|, of its length": (0, 1e-3),
    "float32, prompt repeated: largest |log p - CPU's|": (0, 1e-3),
    "float32, prompt repeated: |gradient - CPU's|, of its length": (0, 1e-3),
    "bfloat16, prompt shared: mean |log p - CPU's|": (0, 0.05),
    "bfloat16, prompt shared: |gradient - CPU's|, of its length": (0, 0.1),
    "bfloat16, prompt repeated: mean |log p - CPU's|": (0, 0.05),
    "bfloat16, prompt repeated: |gradient - CPU's|, of its length": (0, 0.1),
    "graph: the same tokens as without": (1, 1),
    "graph: largest difference of log p": (0, 1e-3),
    "decode step without a wait for the device": (1, 1),
    "toy plain: mean gap, sampled and scored": (0, 0.05),
    "toy lora: mean gap, sampled and scored": (0, 0.05),
    "toy shard: mean gap, sampled and scored": (0, 0.05),
    "toy offload: mean gap, sampled and scored": (0, 0.05),
    "toy resumed: steps in the log": (4, 4),
    "attention: largest difference, code and lower right": (0, 0.02),
    "sampling: tokens that differ, of 40": (0, 0),
    "decoder layer: largest difference compiled, of the largest number": (0, 0.02),
    "compiled decoding: mean gap of log p while the tokens agree": (0, 0.05),
}


# --- rows and times ---------------------------------------------------------------------------------------------------


class Check:
    """Where and how large the sections run, and where their rows go."""

    def __init__(self, device: str, tiny: bool, out: Path):
        self.device, self.tiny, self.out, self.cuda = device, tiny, Path(out), device == "cuda"
        self.section, self.failed = "", False
        self.out.mkdir(parents=True, exist_ok=True)

    @functools.cached_property
    def rates(self) -> dict[str, float]:
        """Operations and bytes a second that one large product and one large copy reach here."""
        return bench.measure_rates(torch.device(self.device))

    def say(self, what: str, value, unit: str = "", **more) -> None:
        """One row. In `more`: `expected`, a number that stands in the table, `limits` (least, most), and details."""
        value = float(f"{value:.5g}") if isinstance(value, float) else value
        line = json.dumps({"section": self.section, "what": what, "value": value, "unit": unit, "tiny": self.tiny, **more})
        print(line, flush=True)
        with open(self.out / "gpu_check.jsonl", "a", encoding="utf-8") as file:
            file.write(line + "\n")  # one short write: sections in other processes append to the same file

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def ms(self, work: Callable, repeats: int = 3) -> tuple[float, float]:
        """(first call, fastest of `repeats` more): what the first has more is what a new shape costs."""
        times = [self.seconds(work) for _ in range(2 if self.tiny else 1 + repeats)]
        return 1e3 * times[0], 1e3 * min(times[1:])

    def seconds(self, work: Callable) -> float:
        self.wait()
        start = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - start

    def both_ms(self, forward: Callable[[], Tensor], repeats: int = 3) -> tuple[float, float]:
        """Of the forward and of the backward pass, the fastest of each, without the first."""
        times = []
        for _ in range(2 if self.tiny else 1 + repeats):
            out: list[Tensor] = []
            ahead = self.seconds(lambda: out.append(forward()))
            times.append((ahead, self.seconds(lambda: out[0].float().sum().backward())))
        return tuple(1e3 * min(column) for column in zip(*times[1:]))

    def small_ms(self, work: Callable, calls: int = 20) -> float:
        """Of a few small kernels as a recorded decode step runs them: without Python between them."""
        def loop():
            for _ in range(calls):
                work()
        if not self.cuda:
            return self.ms(loop)[1] / calls
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            work()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph, stream=stream):
            loop()
        return self.ms(graph.replay)[1] / calls

    def peak_gb(self, work: Callable) -> float:
        """10^9 bytes allocated at the worst moment of `work`; without a card, what the process grew by."""
        if not self.cuda:
            return bench.clock(torch.device("cpu"), work)[1] / 1e9
        torch.cuda.reset_peak_memory_stats()
        work()
        self.wait()
        return torch.cuda.max_memory_allocated() / 1e9

    def kernels(self, work: Callable) -> list:
        """The profiler's averages of all that ran on the card (what starts it is listed too), the longest first."""
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            work()
            self.wait()
        events = [event for event in profiler.key_averages() if event.device_type == DeviceType.CUDA]
        return sorted(events, key=lambda event: -event.device_time_total)


# --- models -----------------------------------------------------------------------------------------------------------


def build(check: Check, shape: str, dtype: torch.dtype = torch.float32, layers: int = 0, blocks: int = 0):
    """Random weights of a published size, or of only so many of its layers and vision blocks."""
    if check.tiny:
        return bench.build_model("tiny", check.device)
    config = bench.published_config(shape)
    narrow(config, layers or config.text_config.num_hidden_layers, blocks or config.vision_config.depth)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(check.device):
            return transformers.Qwen2_5_VLForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(torch.float32)


def narrow(config, layers: int, blocks: int) -> None:
    config.text_config.num_hidden_layers, config.vision_config.depth = layers, blocks
    config.text_config.layer_types = config.text_config.layer_types[:layers]


def video_lm(hf) -> VideoLM:
    """A policy whose completions never end: random weights say nothing."""
    model = VideoLM(hf, toy.build_tokenizer(["a benchmark needs no words"]), "", pack_tokens=1)
    model.eos_ids = bench.NO_END
    return model


def checkpointed(model: VideoLM) -> VideoLM:
    model.checkpoint_activations()
    return model


def random_embeds(model: VideoLM, P: int) -> Tensor:
    """(1, P, D), as small as embeddings are, in float32 as the model's own."""
    weight = model.text.embed_tokens.weight
    return torch.randn(1, P, weight.shape[1], device=weight.device) * 0.02


# --- is it right? The toy on the card against the toy on the CPU ------------------------------------------------------


def write_toy(folder: Path) -> None:
    """Weights large enough that predictions differ from uniform."""
    toy.write_model(folder, TEXTS, seed=0)
    model, generator = VideoLM.load(str(folder)), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.hf.parameters():
            if p.dim() > 1:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.15)
    model.hf.save_pretrained(folder)


def values_and_gradients(model: VideoLM, share: bool) -> tuple[Tensor, Tensor]:
    """Log-probabilities of fixed tokens after three prompts, and the gradient of a weighted sum of them, on the CPU."""
    prompts = make_prompts(model)
    model.hf.zero_grad()
    tokens = [torch.randint(20, 200, (3, 5), generator=torch.Generator().manual_seed(i)) for i in range(3)]
    embeds = [model.embed(prompt.ids, video) for prompt, video in zip(prompts, model.encode_prompts(prompts))]
    logps = [x.logps for x in model.logprobs_packed(embeds, [prompt.positions for prompt in prompts], tokens, 1.0, share)]
    weights = [torch.linspace(-1, 1, lp.numel(), device=lp.device).view(lp.shape) for lp in logps]
    sum((lp * weight).sum() for lp, weight in zip(logps, weights)).backward()
    gradients = [p.grad.flatten().cpu() for p in model.hf.parameters() if p.grad is not None]
    return torch.cat([lp.detach().flatten().cpu() for lp in logps]), torch.cat(gradients)


def compare_with_cpu(folder: str, device: str, autocast: torch.dtype | None, share: bool) -> dict[str, float]:
    """The model of `folder` on `device` against the same on the CPU in float32 with the prompt shared."""
    other = VideoLM.load(folder, device)
    other.autocast = autocast
    (logps, gradient), (found, found_gradient) = (values_and_gradients(VideoLM.load(folder), True),
                                                  values_and_gradients(other, share))
    gap = (found - logps).abs()
    return {"largest |log p - CPU's|": float(gap.max()), "mean |log p - CPU's|": float(gap.mean()),
            "|gradient - CPU's|, of its length": float((found_gradient - gradient).norm() / gradient.norm())}


def exact(check: Check) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_toy(Path(folder))
        for dtype in (torch.float32, torch.bfloat16):
            for how, share in (("shared", True), ("repeated", False)):
                autocast = None if dtype == torch.float32 else dtype
                for what, value in compare_with_cpu(folder, check.device, autocast, share).items():
                    check.say(f"{str(dtype).split('.')[1]}, prompt {how}: {what}", value)


def waits_for_nothing(model: VideoLM, generate: Callable) -> bool:
    """Whether a decode step that Python runs never asks the device for a number."""
    step, graph = model.decode_step, model.new_graph

    def strict(run):
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(run)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    model.decode_step, model.new_graph = strict, lambda: None
    try:
        generate(8)
        return True
    except RuntimeError as error:
        print(error)
        return False
    finally:
        model.decode_step, model.new_graph = step, graph


def graph(check: Check) -> None:
    """Recorded steps against steps that Python runs. Three times: later ones meet memory that the first has left."""
    with tempfile.TemporaryDirectory() as folder:
        write_toy(Path(folder))
        model = VideoLM.load(folder, check.device)
    prompts = make_prompts(model)
    with torch.no_grad():
        embeds = [model.embed(prompt.ids, video) for prompt, video in zip(prompts, model.encode_prompts(prompts))]

    def generate(C: int) -> list:
        return model.generate(embeds, [prompt.positions for prompt in prompts], group_size=8, max_new_tokens=C,
                              temperature=1.0, seeds=[1, 2, 3])

    C, recorded = 20 if check.tiny else 150, model.new_graph
    model.new_graph = lambda: None
    expected = generate(C)
    if check.cuda:
        check.say("decode step without a wait for the device", waits_for_nothing(model, generate))
    model.new_graph = recorded
    same, gap = True, 0.0
    for _ in range(3):
        for (tokens, logps), (as_expected, by_python) in zip(generate(C), expected):
            same &= torch.equal(tokens, as_expected)
            gap = max(gap, float((logps - by_python).abs().max())) if same else math.inf
    check.say("graph: the same tokens as without", same)
    check.say("graph: largest difference of log p", gap)


# --- is it right? train.py and eval.py on synthetic clips -------------------------------------------------------------

TOY = ["--select_k", "0", "--save_every", "2", "--keep_dead_groups", "--overwrite", "--seed", "1", "--out", "run"]
SIZES = {False: ["--toy_train", "40", "--toy_eval", "12", "--sft_steps", "12", "--steps", "3"],
         True: ["--toy_train", "4", "--toy_eval", "2", "--sft_steps", "2", "--steps", "3", "--questions", "2",
                "--sft_questions", "2", "--max_new_tokens", "48", "--group_size", "2", "--tasks", "qa", "--num_workers", "0"]}


@contextlib.contextmanager
def new_folder():
    """The working folder, while this lasts: train.py writes its clips where it is started."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield Path(folder)
        finally:
            os.chdir(before)


def grpo_lines() -> list[dict]:
    lines = [json.loads(line) for line in open("run/metrics.jsonl", encoding="utf-8")]
    return [line for line in lines if line["phase"] == "grpo"]


def toy_run(check: Check, name: str, *flags: str) -> None:
    """All stages in miniature; the plain run is resumed too, and its model evaluated by eval.py."""
    with new_folder():
        train.main([*TOY, *SIZES[check.tiny], "--device", check.device, *flags])
        lines = grpo_lines()
        check.say(f"toy {name}: mean gap, sampled and scored", max(line["logp_gap_mean"] for line in lines))
        check.say(f"toy {name}: largest gap, sampled and scored", max(line["logp_gap_max"] for line in lines))
        check.say(f"toy {name}: fastest GRPO step", min(sum(line["seconds"].values()) for line in lines), "s")
        if name == "plain":
            train.main(["--resume", "--out", "run", "--steps", "4"])
            check.say("toy resumed: steps in the log", grpo_lines()[-1]["step"])
            (clips,) = Path("toy").iterdir()
            tasks = ["qa"] if check.tiny else ["grounding", "qa", "gqa"]
            evaluate.run(["--model", "run/final", "--data", str(clips / "eval.jsonl"), "--out", "answers", "--device",
                       check.device, "--tasks", *tasks])
            found, after = (json.loads(Path(f).read_text()) for f in ("answers/metrics.json", "run/summary.json"))
            numbers = [name for name, value in after["after"].items() if isinstance(value, float)]
            check.say("toy evaluated: largest difference of a metric, eval.py and train.py",
                      max(abs(found[name] - after["after"][name]) for name in numbers))


# --- single operations: as the code does it, and in other ways --------------------------------------------------------


def patch_embed(check: Check) -> None:
    """Patches to vectors: a product with the flattened kernel, and the library's convolution."""
    N = 64 if check.tiny else 14400
    module = video_lm(build(check, "3b", layers=1, blocks=1)).visual.patch_embed
    x, weight = torch.randn(N, 1176, device=check.device), module.proj.weight
    ways = {"as the code does it": lambda: module(x), "product": lambda: F.linear(x, weight.flatten(1)),
            "conv3d": lambda: type(module).forward(module, x)}
    for name, way in ways.items():
        with torch.autocast(check.device, torch.bfloat16):
            with torch.no_grad():
                first, again = check.ms(way)
            check.say(f"patch_embed, {name}: forward", again, "ms", first=first, patches=N)
            check.say(f"patch_embed, {name}: backward", check.both_ms(way, 1)[1], "ms")


def explicit_mask(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Keys and values repeated for the heads that share them, and a mask of ones and zeros."""
    S, S_all = query.shape[2], key.shape[2]
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    mask = None if S == S_all else torch.ones(S, S_all, dtype=torch.bool, device=query.device).tril(S_all - S)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling)


def lower_right(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """The mask as a name, which fused kernels know; heads share keys without repeating them."""
    mask = causal_lower_right(query.shape[2], key.shape[2])
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=True)


# Name: (attention or None for the code's own, whether cuDNN may be chosen or None for what the code has set)
ATTENTIONS = {"as the code does it": (None, None), "explicit mask, no cuDNN": (explicit_mask, False),
              "lower right, no cuDNN": (lower_right, False), "lower right, cuDNN": (lower_right, True)}


@contextlib.contextmanager
def attention(way: str):
    """While this lasts the code uses one of ATTENTIONS."""
    function, cudnn = ATTENTIONS[way]
    before, allowed = model_file.causal_attention, torch.backends.cuda.cudnn_sdp_enabled()
    model_file.causal_attention = function or before
    torch.backends.cuda.enable_cudnn_sdp(allowed if cudnn is None else cudnn)
    try:
        yield
    finally:
        model_file.causal_attention = before
        torch.backends.cuda.enable_cudnn_sdp(allowed)


def heads(check: Check, B: int, S: int, S_all: int) -> list[Tensor]:
    """query, key, value of a 3B layer: 16 heads that share 2."""
    return [torch.randn(B, H, n, 128, device=check.device, dtype=torch.bfloat16, requires_grad=True)
            for H, n in ((16, S), (2, S_all), (2, S_all))]


def sdpa(check: Check) -> None:
    """A prompt, and G completions behind it. Prompts differ by a few tokens, so each is a new shape: what that costs is
    what the first call has more than the fastest."""
    P, C = (96, 20) if check.tiny else (3800, 255)
    for way in ATTENTIONS:
        for part, (B, S, S_all) in {"prompt": (1, P, P), "completions": (8, C, P + C)}.items():
            with attention(way):
                new = []
                for i in range(1, 2 if check.tiny else 4):
                    q, k, v = heads(check, B, S + 13 * i * (S == S_all), S_all + 13 * i)
                    work = partial(model_file.causal_attention, q, k, v, 0.09)
                    with torch.no_grad():
                        first, again = check.ms(work)
                    new.append(first - again)
                check.say(f"attention, {part}, {way}: forward", again, "ms", new_shapes_ms=new)
                check.say(f"attention, {part}, {way}: a new shape", sorted(new)[len(new) // 2], "ms")
                check.say(f"attention, {part}, {way}: backward", check.both_ms(work)[1], "ms")
    q, k, v = heads(check, 2, 60, 200)
    with torch.no_grad():
        difference = model_file.causal_attention(q, k, v, 0.09) - lower_right(q, k, v, 0.09)
    check.say("attention: largest difference, code and lower right", float(difference.abs().max()))


def one_level(logps: Tensor, noise: Tensor) -> Tensor:
    """The cumulative sum over the whole vocabulary, in float64."""
    cdf = logps.double().exp().cumsum(-1)
    return torch.searchsorted(cdf, noise.unsqueeze(-1) * cdf[..., -1:], right=True).squeeze(-1)


def two_levels(logps: Tensor, noise: Tensor, width: int = 512) -> Tensor:
    """First the block of `width` tokens, then the token in it: a cumulative sum of W / width numbers and one of width."""
    p = F.pad(logps, (0, -logps.shape[-1] % width), value=-math.inf).double().exp().unflatten(-1, (-1, width))
    blocks = p.sum(-1).cumsum(-1)
    target = noise.unsqueeze(-1) * blocks[..., -1:]
    block = torch.searchsorted(blocks, target, right=True)
    before = torch.where(block > 0, blocks.gather(-1, (block - 1).clamp(min=0)), 0.0)
    inside = p.take_along_dim(block.unsqueeze(-1), -2).squeeze(-2).cumsum(-1)
    place = torch.searchsorted(inside, target - before, right=True).clamp(max=width - 1)
    return (block * width + place).squeeze(-1)


def sampling(check: Check) -> None:
    differ, W = 0, 5000 if check.tiny else 151936
    for rows in (8, 32):
        logps = torch.randn(rows, W, device=check.device).log_softmax(-1)
        noise = torch.rand(rows, device=check.device, dtype=torch.float64)
        for name, way in (("as the code does it", model_file.sample_tokens), ("one level", one_level),
                          ("two levels", two_levels)):
            check.say(f"sampling, {rows} rows, {name}", check.small_ms(lambda: way(logps, noise)), "ms")
            differ += int((way(logps, noise) != one_level(logps, noise)).sum())
    check.say("sampling: tokens that differ, of 40", differ)


def value_product(check: Check) -> None:
    """A decode step's product of weights (Q, K, R n, P) and prompt values (Q, K, P, d), whole and cut along P."""
    P, K, d = 256 if check.tiny else 3840, 2, 128
    for Q in (1, 4):
        weights, values = (torch.rand(*shape, device=check.device, dtype=torch.bfloat16)
                           for shape in ((Q, K, 64, P), (Q, K, P, d)))
        cut = lambda: (weights.unflatten(-1, (16, -1)).transpose(2, 3) @ values.unflatten(2, (16, -1))).sum(2)
        check.say(f"weights by values, {Q} questions, as one product", check.small_ms(lambda: weights @ values), "ms")
        check.say(f"weights by values, {Q} questions, in 16 parts", check.small_ms(cut), "ms")


def library_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As the library writes it: about six kernels."""
    x = hidden.float()
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return weight * x.to(hidden.dtype)


def fused_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(hidden, weight.shape, weight, eps)


def norms(check: Check) -> None:
    """Of the rows of a decode step, and of a packed row of a scoring pass."""
    norm = video_lm(build(check, "3b", layers=1, blocks=1)).text.norm
    weight, eps = norm.weight, norm.variance_epsilon
    ways = {"as the code does it": norm, "library": lambda x: library_norm(x, weight, eps),
            "F.rms_norm": lambda x: fused_norm(x, weight, eps)}
    with torch.no_grad():
        for tokens in (8, 64 if check.tiny else 5840):
            hidden = torch.randn(1, tokens, len(weight), device=check.device)
            for name, way in ways.items():
                check.say(f"norm of {tokens} tokens, {name}", check.small_ms(lambda: way(hidden)), "ms")


# --- one decoder layer of a decode step, compiled and not -------------------------------------------------------------


def filled_cache(model: VideoLM, P: int, G: int, C: int) -> LayerCache:
    """Keys and values of one question for the first layer, looked at as in the middle of a completion."""
    config = model.text.config
    K, d = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    cache = GroupCache(1, [P], G, C)
    cache.add_prompt(0, *torch.randn(2, K, P, d, device=model.device).to(model.autocast or torch.float32))
    cache.seal()
    cache.widen(C // 2)
    cache.begin_step()
    return cache.of(0)


def compiled_layer(check: Check) -> None:
    """torch.compile of one layer, which all layers of a model can share. What it saves is kernels between products."""
    P, G, C = (64, 8, 20) if check.tiny else (3800, 8, 256)
    model = video_lm(build(check, "3b", layers=1, blocks=1))
    model.hf.eval()
    layer = model.text.layers[0]
    compiled = torch.compile(decoder_layer, fullgraph=True, backend="inductor" if check.cuda else "eager")
    with torch.no_grad(), model._compute():
        cache, hidden = filled_cache(model, P, G, C), torch.randn(G, 1, len(model.text.norm.weight), device=check.device)
        rope = model.text.rotary_emb(hidden, torch.full((3, G, 1), P, device=check.device))
        expected = decoder_layer(layer, hidden, rope, cache)
        seconds = check.seconds(lambda: compiled(layer, hidden, rope, cache))
        difference = (compiled(layer, hidden, rope, cache) - expected).abs().max() / expected.abs().max()
        for name, way in (("not compiled", decoder_layer), ("compiled", compiled)):
            check.say(f"decoder layer 3b, 8 rows, {name}", check.small_ms(lambda: way(layer, hidden, rope, cache)), "ms")
    check.say("decoder layer: largest difference compiled, of the largest number", float(difference))
    check.say("decoder layer: seconds of compiling", seconds, "s")


def compiled_decoding(check: Check) -> None:
    """`--compile` as the code does it, on a few layers of 3B; no row where the code has no such attribute."""
    P, C = (64, 8) if check.tiny else (3800, 128)
    model = video_lm(build(check, "3b", layers=8, blocks=1))
    if not hasattr(model, "compile_decoding"):
        return
    found, embeds, positions = {}, random_embeds(model, P), torch.arange(P, device=check.device).expand(3, -1)
    for compiling in (False, True):
        model.compile_decoding = compiling

        def generate(C: int) -> None:
            (found[compiling],) = model.generate([embeds], [positions], group_size=8, max_new_tokens=C, temperature=1.0,
                                                 seeds=[0])

        _, two = check.ms(partial(generate, 2), 2)
        first, whole = check.ms(partial(generate, C), 2)
        name = "compiled" if compiling else "not compiled"
        check.say(f"decode 8 layers of 3b, 8 rows, {name}: a step", (whole - two) / (C - 2), "ms", first=first)
    (tokens, logps), (others, other_logps) = found[False], found[True]
    agree = (tokens == others).long().cumprod(1).bool()  # behind a token that rounding has chosen all is different
    check.say("compiled decoding: share of tokens that agree to there", float(agree.float().mean()))
    check.say("compiled decoding: mean gap of log p while the tokens agree", float((logps - other_logps)[agree].abs().mean()))


# --- the published sizes ----------------------------------------------------------------------------------------------


def env(check: Check) -> None:
    if check.cuda:
        memory = torch.cuda.get_device_properties(0).total_memory / 1e9
        check.say("machine", f"{torch.cuda.get_device_name()}, {memory:.0f} GB, CUDA {torch.version.cuda}")
        check.say("cuDNN attention allowed", torch.backends.cuda.cudnn_sdp_enabled())
    else:
        check.say("machine", f"a CPU, {torch.get_num_threads()} thread(s)")
    check.say("versions", f"Python {sys.version.split()[0]}, torch {torch.__version__}, transformers "
              f"{transformers.__version__}")
    check.say("flash attention installed", model_file.flash_attn_func is not None)


def rates(check: Check) -> None:
    """What tools/plan.py assumes for a card, and what one large product and one large copy reach on this one."""
    card = next((card for name, card in plan.CARDS.items() if check.cuda and name in torch.cuda.get_device_name().lower()),
                None)
    for what, name, unit in (("a large product", "flops", "Tflop/s"), ("a large copy", "bytes", "TB/s")):
        assumed = card and {"flops": card.matrix_flops, "bytes": card.memory_bytes}[name] / 1e12
        check.say(f"rate of {what}", check.rates[name] / 1e12, unit, **({"expected": assumed} if assumed else {}))


def decode(check: Check, shape: str, dtype: torch.dtype) -> None:
    """Milliseconds of a decode step, recordings of graphs included, and what it consists of; then with --compile."""
    P, C, G = (64, 12, 8) if check.tiny else (3800, 256, 8)
    model = video_lm(build(check, shape, dtype, blocks=1))
    embeds, positions = random_embeds(model, P), torch.arange(P, device=check.device).expand(3, -1)

    def generate(Q: int, C: int) -> None:
        model.generate([embeds] * Q, [positions] * Q, group_size=G, max_new_tokens=C, temperature=1.0,
                       seeds=list(range(Q)))

    for model.compile_decoding in (False, True):
        compiled = ", compiled" if model.compile_decoding else ""
        for Q in (1, 4):
            (begin, first), (_, whole) = (check.ms(partial(generate, Q, length), 1) for length in (2, C))
            name, step = f"decode {shape}, {G * Q} rows{compiled}", (whole - first) / (C - 2)
            check.say(f"{name}: a step", step, "ms", first_call_ms=begin)
            check.say(f"{name}: prefill and one step", first, "ms")
            share = step_bytes(model, P, G, C, Q) / check.rates["bytes"] / (step / 1e3)
            check.say(f"{name}: share of the bandwidth", share, expected=SHARES.get(shape, 0.5))
        if check.cuda:
            say_kernels(check, f"decode {shape}{compiled}", model, partial(generate, 1))


def say_kernels(check: Check, name: str, model: VideoLM, generate: Callable[[int], None]) -> None:
    """What a decode step consists of, by kernel: that of 50 tokens without that of 2, started by Python one by one."""
    made, model.new_graph = model.new_graph, lambda: None
    generate(50)
    of_50, of_2 = ({event.key: (event.device_time_total / 1e3, event.count) for event in check.kernels(partial(generate, C))}
                   for C in (50, 2))
    model.new_graph = made
    steps = {key: [(a - b) / 48 for a, b in zip(value, of_2.get(key, (0, 0)))] for key, value in of_50.items()}
    check.say(f"{name}: kernels of a step", sum(count for _, count in steps.values()))
    check.say(f"{name}: busy in a step", sum(ms for ms, _ in steps.values()), "ms")
    for key, (ms, count) in sorted(steps.items(), key=lambda item: -item[1][0])[:24]:
        check.say(f"profile of {name}: {key[:150]}", ms, "ms", n=count)


def step_bytes(model: VideoLM, P: int, G: int, C: int, Q: int) -> float:
    """Read by a decode step in bfloat16 in the middle of the completions, at least: weights once, prompts once, own words."""
    shape = plan.count(model.hf.config)
    return 2 * (shape.layers + shape.head) + plan.key_value_bytes(shape) * Q * (P + G * C / 2)


@contextlib.contextmanager
def norms_by(hf, norm: Callable):
    """While this lasts all RMS norms of a model are computed by `norm`."""
    modules = [m for m in hf.modules() if type(m).__name__.endswith("RMSNorm")]
    before = [m.__dict__.get("forward") for m in modules]
    for m in modules:
        m.forward = partial(lambda m, hidden: norm(hidden, m.weight, m.variance_epsilon), m)
    try:
        yield
    finally:
        for m, forward in zip(modules, before):
            del m.forward
            if forward is not None:
                m.forward = forward


def scoring(check: Check, shape: str, dtype: torch.dtype, ways: dict) -> None:
    """The text part of a scoring pass and its gradient. Each way has prompts of its own length: new shapes, as in a run."""
    P, G, C = (60, 3, 8) if check.tiny else (3800, 8, 256)
    model = checkpointed(video_lm(build(check, shape, dtype, blocks=1)))
    tokens = torch.randint(20, 200, (G, C), device=check.device)
    for i, (name, (way, norm)) in enumerate(ways.items()):
        embeds = random_embeds(model, P + 5 * i).requires_grad_()
        positions = torch.arange(P + 5 * i, device=check.device).expand(3, -1)
        score = lambda: model.logprobs(embeds * 1, positions, tokens, 1.0)
        model.hf.zero_grad(set_to_none=True)
        with attention(way), norms_by(model.hf, norm) if norm else contextlib.nullcontext():
            forward, backward = check.both_ms(score, 2)
            peak = check.peak_gb(lambda: score().sum().backward())
            check.say(f"scoring {shape}, {name}: forward", forward, "ms")
            check.say(f"scoring {shape}, {name}: backward", backward, "ms", peak_gb=peak)
            share = 4 * scoring_flops(model, P + 5 * i, G, C) / check.rates["flops"] / ((forward + backward) / 1e3)
            check.say(f"scoring {shape}, {name}: share of the matrix rate, recomputation counted", share, expected=0.5)
            if check.cuda and i == 0:
                for event in check.kernels(lambda: score().sum().backward())[:15]:
                    check.say(f"profile of scoring {shape}: {event.key[:60]}", event.device_time_total / 1e3, "ms",
                              n=event.count)


def scoring_flops(model: VideoLM, P: int, G: int, C: int) -> float:
    """Of the text part of one forward pass; pairs above the diagonal, which causal attention skips, are not counted."""
    shape, own = plan.count(model.hf.config), G * (C - 1)
    return plan.decoder_flops(shape, P + own, P**2 / 2 + own * (P + C / 2)) + 2 * shape.head * G * C


SCORING_WAYS = {**{name: (name, None) for name in ATTENTIONS},
                "norms of the library": ("as the code does it", library_norm),
                "F.rms_norm": ("as the code does it", fused_norm)}


def vision(check: Check) -> None:
    """The tower of 3B on a video of 32 frames, forward and with its gradient; and with the library's MLP, whose width of 3,420 is no
    multiple of 8."""
    model = checkpointed(video_lm(build(check, "3b", layers=1)))
    prompt = bench.build_prompt(model, 60 if check.tiny else 3800, 4 if check.tiny else 32)
    encode = lambda: model.encode_video(prompt.patches, prompt.grid)
    for name in ("", ", MLP of the library"):
        if name:
            for block in model.visual.blocks:
                block.mlp.__dict__.pop("forward", None)
        forward, backward = check.both_ms(encode, 2)
        check.say(f"vision 3b, 32 frames{name}: forward", forward, "ms")
        check.say(f"vision 3b, 32 frames{name}: backward", backward, "ms")
        if check.cuda:
            for event in check.kernels(lambda: encode().float().sum().backward())[:24]:
                check.say(f"profile of vision{name}: {event.key[:150]}", event.device_time_total / 1e3, "ms", n=event.count)


# --- memory: a real step against tools/plan.py, and train.py --dry_run against tools/plan.py --------------------------------------


def job_of(model: VideoLM, prompt, **settings) -> plan.Job:
    """tools/plan.py's job with the video of this prompt: its frames and size, all other tokens as text."""
    (t, h, w), P = prompt.grid, len(prompt.ids)
    job = plan.Job(frames=2 * t, height=14 * h, width=14 * w, min_pixels=784, total_pixels=10**9,
                   text_tokens=P - t * h * w // 4, gpus=1, **settings)
    assert plan.video_grid(job) == prompt.grid and plan.tokens_of(job)[1] == P
    return job


def say_memory(check: Check, what: str, measured: float, predicted: float) -> None:
    """Without a card the two are not the same thing, and no limit holds."""
    compared = {"expected": round(predicted, 2), "limits": (0.9 * predicted, 1.1 * predicted)} if check.cuda else {}
    check.say(what, measured, "GB", **compared)


def memory(check: Check) -> None:
    """GRPO steps of 3B in full, one card, two questions: the peak of each phase. The second step counts: in the first one
    there are no moments yet."""
    P, G, C, frames = (60, 2, 6, 4) if check.tiny else (2000, 4, 128, 16)
    model, reference = (checkpointed(video_lm(build(check, "3b", dtype))) for dtype in (torch.float32, torch.bfloat16))
    reference.hf.requires_grad_(False)
    config = train.parse_config(["--model", "random", "--train_data", "none"])
    world, optimizer = World(0, 1, torch.device(check.device)), train.make_optimizer(config, model, 1e-6)
    prompts = [bench.build_prompt(model, P, frames)] * 2
    groups = []

    def sample():
        groups[:] = rollout(model, prompts, rewards.score, group_size=G, max_new_tokens=C, temperature=1.0, seeds=[0, 1])
        for group in groups:
            group.advantages = torch.linspace(-1, 1, G, device=check.device)  # random answers are all equally wrong

    def learn():
        accumulate_gradients(model, reference, groups, partial(grpo_loss, beta=0.04, clip_low=0.2, clip_high=0.2), 2.0 * G)

    phases = {"sampling": sample, "learning": learn,
              "stepping": lambda: train.optimizer_step(optimizer, world, 1e-6)}
    for _ in range(2):
        measured = {name: check.peak_gb(work) for name, work in phases.items()}
    shape = plan.count(bench.published_config("3b") if not check.tiny else bench.build_model("tiny", "cpu").config)
    predicted = plan.peak_bytes(shape, job_of(model, prompts[0], questions=2, group_size=G, completion_tokens=C,
                                              max_new_tokens=C))
    for name, value in measured.items():
        say_memory(check, f"memory of a step, 3b, {name}", value, predicted[name] / 1e9)
    say_memory(check, "memory of a step, 3b", max(measured.values()), max(predicted.values()) / 1e9)
    del optimizer, phases, reference
    adamw(check, model)


def adamw(check: Check, model: VideoLM) -> None:
    """One step of the optimiser, fused and not. Not fused it needs 4 bytes a parameter more, which may not be there."""
    for p in model.hf.parameters():
        p.grad = torch.zeros_like(p)
    for name, fused in (("fused", True), ("not fused", False)):
        optimizer = torch.optim.AdamW(model.hf.parameters(), lr=0.0, fused=fused)
        try:
            optimizer.step()
            check.say(f"AdamW 3b, {name}: a step", check.ms(optimizer.step, 1)[1], "ms", peak_gb=check.peak_gb(optimizer.step))
        except torch.OutOfMemoryError:
            check.say(f"AdamW 3b, {name}: a step", "out of memory")
        del optimizer
        if check.cuda:
            torch.cuda.empty_cache()


def write_middle_model(check: Check, folder: str) -> None:
    """8 layers and 8 vision blocks of 3B's width, in bfloat16, with the toy's tokenizer: train.py loads it as any other."""
    toy.write_model(Path(folder), TEXTS, seed=0)
    if check.tiny:
        return
    small = transformers.Qwen2_5_VLConfig.from_pretrained(folder)
    ends = transformers.GenerationConfig.from_pretrained(folder)
    config = bench.published_config("3b")
    narrow(config, 8, 8)
    for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
        setattr(config, name, getattr(small, name))
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(check.device):
            hf = transformers.Qwen2_5_VLForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(torch.float32)
    hf.generation_config = ends
    hf.save_pretrained(folder)


def dry_run(check: Check) -> None:
    """The figure that `train.py --dry_run` prints against that of tools/plan.py for the same model, clips and flags."""
    G, C = (2, 8) if check.tiny else (8, 256)
    with new_folder():
        write_middle_model(check, "middle")
        toy.write_dataset(Path("clips"), 4, 1, seed=0)
        if check.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            train.main(["--model", "middle", "--train_data", "clips/train.jsonl", "--dry_run", "--group_size", str(G),
                        "--max_new_tokens", str(C), "--questions", "2", "--steps", "2", "--num_workers", "0", "--device",
                        check.device, "--tasks", "qa", "--shard", "off"])
        shape = plan.count(plan.load_shape("middle"))
    print(printed.getvalue())
    longest = int(re.search(r"prompts of \d+ to (\d+) tokens", printed.getvalue())[1])
    measured = float(re.search(r"peak memory: ([\d.]+) GB", printed.getvalue())[1])
    job = plan.Job(gpus=1, seconds=toy.DURATION, width=toy.SIZE, height=toy.SIZE, questions=2, group_size=G,
                   completion_tokens=C, max_new_tokens=C)
    job = dataclasses.replace(job, text_tokens=longest - plan.tokens_of(job)[0])
    say_memory(check, "memory that train.py --dry_run prints, 8 layers of 3b", measured, plan.needed(shape, job) / 1e9)


def peers(check: Check) -> None:
    """tests/bench.py: the whole step against the step as other code does it, whose logits need 100 GB in the full size."""
    sizes = ["--shape", "3b", "--repeats", "2"]
    if check.cuda and torch.cuda.get_device_properties(0).total_memory < 120e9:
        sizes += ["--prompt", "2000", "--frames", "8", "--group", "4"]
    if check.tiny:
        sizes = ["--prompt", "60", "--frames", "4", "--group", "2", "--completion", "4", "--repeats", "1"]
    bench.main([*sizes, "--device", check.device, "--out", str(check.out / "bench")])
    report = json.loads((check.out / "bench" / "bench.json").read_text())
    for row in report["table"]:
        for side in bench.PEERS:
            ratio = row[side]["ratio"]
            check.say(f"bench, {row['phase']}: times faster than {side}", ratio or "no room for it, or no comparison",
                      **({"expected": round(row[side]["bound_ratio"], 1)} if ratio else {}))
    for what, name in (("mean |log p ours - library's|", "library_mean"), ("mean gap, sampled and scored", "sampled_mean")):
        check.say(f"bench: {what}", report["differences"][name], limits=(0, 0.05))
    check.say("bench: backward, share of the matrix rate", report["mfu"])


def default_run(check: Check) -> None:
    """train.py without flags, as the README begins: seconds of each stage, and what it has learned."""
    flags = [*TOY, *SIZES[True]] if check.tiny else ["--out", "run", "--seed", "0"]
    with new_folder():
        seconds = check.seconds(lambda: train.main([*flags, "--device", check.device]))
        check.say("default run: all of it", seconds, "s")
        lines = [json.loads(line) for line in open("run/metrics.jsonl", encoding="utf-8")]
        summary = json.loads(Path("run/summary.json").read_text())
        (check.out / "default_run.json").write_text(json.dumps({"summary": summary, "lines": lines}))
    for stage, seconds in summary["seconds"].items():
        check.say(f"default run, {stage}", seconds, "s")
    steps = [line for line in lines if line["phase"] == "grpo"]
    for phase in steps[-1]["seconds"]:
        middle = sorted(line["seconds"][phase] for line in steps)[len(steps) // 2]
        check.say(f"default run, a GRPO step, {phase}", middle, "s")
    for name, value in summary["after"].items():
        if isinstance(value, float):
            check.say(f"default run, after: {name}", value)


# --- all sections, and the table --------------------------------------------------------------------------------------

SECTIONS: dict[str, Callable[[Check], None]] = {
    "env": env, "exact": exact, "graph": graph,
    "toy_plain": lambda check: toy_run(check, "plain"),
    "toy_lora": lambda check: toy_run(check, "lora", "--lora_rank", "4", "--gradient_checkpointing", "--pack_tokens", "1"),
    "toy_shard": lambda check: toy_run(check, "shard", "--shard", "on", "--gradient_checkpointing"),
    "toy_offload": lambda check: toy_run(check, "offload", "--offload"),
    "dry_run": dry_run, "rates": rates, "patch_embed": patch_embed, "sdpa": sdpa, "sampling": sampling,
    "value_product": value_product, "norms": norms, "compiled_layer": compiled_layer,
    "compiled_decoding": compiled_decoding,
    "decode_3b": lambda check: decode(check, "3b", torch.float32),
    "decode_7b": lambda check: decode(check, "7b", torch.bfloat16),
    "scoring_3b": lambda check: scoring(check, "3b", torch.float32, SCORING_WAYS),
    "scoring_7b": lambda check: scoring(check, "7b", torch.bfloat16, dict(list(SCORING_WAYS.items())[:1])),
    "vision": vision, "memory": memory, "peers": peers,
    "default_run": default_run,
}


def run_section(check: Check, name: str) -> None:
    """Whatever happens, there is a row that says so."""
    check.section, start = name, time.time()
    try:
        SECTIONS[name](check)
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        check.failed = True
        check.say(f"FAILED: section {name}", f"{type(error).__name__}: {error}"[:200])
    check.say(f"section {name}", time.time() - start, "s in all")
    gc.collect()  # modules and the methods bound to them hold each other
    if check.cuda:
        torch.cuda.empty_cache()
    write_table(check.out)


def read_rows(out: Path) -> dict[str, dict]:
    """The newest row of each name, in the order of the sections."""
    file, rows = Path(out) / "gpu_check.jsonl", {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):  # the last line of a run that was killed
            row = json.loads(line)
            rows[row["what"]] = row
    place = {name: i for i, name in enumerate(["parts", *SECTIONS])}
    return dict(sorted(rows.items(), key=lambda item: place.get(item[1]["section"], len(place))))


def expectation(row: dict) -> tuple[str, str]:
    """(what was expected of this row, how it compares): yes or NO for what must hold, a ratio for an estimate."""
    value, limits = row["value"], row.get("limits") or LIMITS.get(row["what"])
    if row["section"] == "parts":
        limits = (0, 0)
    is_number = isinstance(value, (int, float))
    if limits:
        predicted = f"{row['expected']:g}: " if "expected" in row else ""
        holds = is_number and limits[0] <= value <= limits[1]
        return predicted + between(*limits), "yes" if holds else "NO"
    if row["what"] in ESTIMATES:
        least, most, ideal = ESTIMATES[row["what"]]
    elif "expected" in row:
        least, most, ideal = row["expected"], row["expected"], None
    else:
        return "", "NO" if row["what"].startswith("FAILED") else ""
    ratio = f"x {2 * value / (least + most):.2f}" if is_number and not row.get("tiny") else ""
    return between(least, most) + (f" (ideal {ideal:g})" if ideal else ""), ratio


def between(least: float, most: float) -> str:
    return f"{least:g}" if least == most else f"{least:.4g} to {most:.4g}"


def table(out: Path) -> str:
    """All rows, and what was expected and not measured."""
    row_of = "{:74.74}|{:>22} |{:>26} | {}".format
    lines = ["Expected: by reading and arithmetic, for one H100 or H200; nothing of it measured. Ideal: bytes or operations",
             "that cannot be avoided. Last: whether what must hold does, or measured / expected.", "",
             row_of("what", "measured", "expected", ""), "-" * 134]
    rows = read_rows(out)
    for what, row in rows.items():
        value = row["value"]
        shown = f"{value:.4g}" if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)
        shown = f"{shown} {row['unit']}".strip()
        if len(shown) > 22:  # a text: of a machine, of an error
            lines.append(f"{what}: {shown}")
        else:
            lines.append(row_of(what, shown, *expectation(row)).rstrip())
    for what in [name for name in {**ESTIMATES, **LIMITS} if name not in rows]:
        missing = {"section": "", "what": what, "value": "not measured"}
        lines.append(row_of(what, "not measured", expectation(missing)[0], "").rstrip())
    return "\n".join(lines) + "\n"


def all_holds(out: Path) -> bool:
    return all(expectation(row)[1] != "NO" for row in read_rows(out).values())


def write_table(out: Path) -> None:
    """Under another name first: several processes write it, and one may be killed."""
    partial_file = Path(out) / f"table.{os.getpid()}"
    partial_file.write_text(table(out), encoding="utf-8")
    partial_file.replace(Path(out) / "table.txt")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"default: all of {', '.join(SECTIONS)}")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="small models and sizes, whose times mean nothing")
    parser.add_argument("--out", default=os.environ.get("OUT", "."), help="folder of the results (default: $OUT, or here)")
    parser.add_argument("--table", action="store_true", help="print and write the table; exit code 1 where something that "
                                                             "must hold does not")
    args = parser.parse_args(arguments)
    if unknown := set(args.sections) - set(SECTIONS):
        parser.error(f"unknown sections: {', '.join(sorted(unknown))}")
    check = Check(args.device, args.tiny, Path(args.out).resolve())
    if args.table:
        write_table(check.out)
        print(table(check.out))
        return int(not all_holds(check.out))
    if check.cuda:
        video_lm(bench.build_model("tiny", check.device))  # sets what the code sets on a card
    for name in args.sections or SECTIONS:
        run_section(check, name)
    return int(check.failed)


if __name__ == "__main__":
    sys.exit(main())
