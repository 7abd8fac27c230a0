"""Our step against the step of two other GRPO trainers: `python tests/bench.py`, in one process, as ratios.

    python tests/bench.py                                            a tiny model on the CPU, about a minute
    python tests/bench.py --device cuda --shape 3b --out bench-3b    random weights of the published size

The other sides are written out here, over the installed transformers: the model, its positions, its attention, `generate`.

    VideoChat-R1   `generate(num_return_sequences=G)`; pixels repeated G times; logits of prompt and completion; log-softmax
                   of one row after another in the logits' own precision (`VideoChatStep`).
    TRL            G copies of the prompt, video included, into `generate`; logits of the completion only
                   (`logits_to_keep`); `TRL_ROWS` completions at a time, forward and backward (`TrlStep`). TRL has no video
                   column: this is what it does with images.

Both have bfloat16 weights on a GPU, as VideoChat-R1 has, where ours are float32 with autocast, as train.py has them. Tokens
and gradient checkpointing are the same on all sides, and what they compute is compared.

Every step of a run has other sizes, as real questions have, and there is no warm-up: what a shape costs when it is new
(buffers, tuning, recorded graphs) is in the figures. They are medians over the steps.

Seconds depend on the machine and on the sizes, and so do ratios: on another one memory, matrix products and the start of a
kernel compare otherwise. Beside each stands what the arithmetic allows: floating point operations and bytes over the rates of
this machine, measured first.

Left out: decoding of videos, the optimiser's step, rewards of real text, TRL's entropy for its log; vLLM as sampler.
Completions are all C tokens long.

Letters: P prompt tokens with V video tokens among them, G completions of C tokens.
"""

import argparse
import contextlib
import copy
import ctypes
import json
import math
import platform
import statistics
import sys
import threading
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
import transformers  # noqa: E402

import rewards  # noqa: E402
from data import Prompt, mrope_positions  # noqa: E402
from grpo import grpo_loss, rollout, score_groups  # noqa: E402
from lib import toy  # noqa: E402
from model import VideoLM, flash_attn_func  # noqa: E402
from tools import plan  # noqa: E402

# --- the case: a model, a question, sizes -----------------------------------------------------------------------------

DEFAULTS = {"tiny": (1000, 64), "3b": (3800, 150), "7b": (3800, 150)}  # P, C
SAMPLE = {"id": "bench", "task": "qa", "question": "?", "options": ["a", "b"], "answer": "A", "video": "none"}
SIZES = ((1, 0), (0.85, -1), (1.15, 0), (0.92, -1), (1.08, 1))  # of one step after the other: share of P, more of G
TRL_ROWS = 2  # per_device_train_batch_size: what is chosen where memory is short, as it is with videos
NO_END = [-1]  # no token ends a completion: random weights say nothing, and both sides shall say as much of it


@dataclass
class Case:
    policy: VideoLM
    reference: VideoLM  # the same weights, in bfloat16 on a GPU; no step is taken, so it is also the others' policy
    shape: plan.Model
    prompt: Prompt
    G: int
    C: int

    @property
    def P(self) -> int:
        return len(self.prompt.ids)

    @property
    def V(self) -> int:
        return math.prod(self.prompt.grid) // 4


def build_model(shape: str, device: str) -> transformers.Qwen2_5_VLForConditionalGeneration:
    """Random weights, made where they will be used: 7B in float32 would fill the memory of most machines."""
    if shape == "tiny":
        return toy.build_model(toy.build_tokenizer(["a benchmark needs no words"]), 0, hidden=256, layers=3).to(device)
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        return transformers.Qwen2_5_VLForConditionalGeneration(published_config(shape))


def published_config(shape: str) -> transformers.Qwen2_5_VLConfig:
    """A size of plan.py, with what is not needed for counting: how the axes share the frequencies of a head."""
    config = plan.load_shape(shape)
    config.text_config.rope_parameters["mrope_section"] = [16, 24, 24]
    return config


def build_case(hf: transformers.Qwen2_5_VLForConditionalGeneration, P: int, frames: int, G: int, C: int,
               dtype: torch.dtype | None = None) -> Case:
    """`dtype` is that of the reference: bfloat16 on a GPU and float32 elsewhere, as train.py loads it."""
    tokenizer = toy.build_tokenizer(["a benchmark needs no words"])
    shape = plan.count(hf.config)  # before VideoLM names attentions in it that no new model can be built with
    reference = cast_weights(copy.deepcopy(hf), dtype or (torch.bfloat16 if hf.device.type == "cuda" else torch.float32))
    models = [VideoLM(x, tokenizer, "", pack_tokens=1) for x in (hf, reference)]
    for model in models:
        model.checkpoint_activations()
        model.eos_ids = NO_END
    return Case(*models, shape, build_prompt(models[0], P, frames), G, C)


def cast_weights(hf: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """Parameters alone, as `from_pretrained(dtype=...)` does. `hf.to(dtype)` casts the rotary frequencies too, and in
    bfloat16 the angle of position 3,800 is wrong by several radians."""
    for p in hf.parameters():
        p.data = p.data.to(dtype)
    return hf


def cases_of(case: Case, frames: int, steps: int) -> list[Case]:
    """The case in the sizes of one step after the other. What a library keeps for a shape that it has seen before (tuned
    kernels, memory of the right size) is seldom there in training, and must not be there in the figures."""
    sizes = [SIZES[i % len(SIZES)] for i in range(steps)]
    return [replace(case, prompt=build_prompt(case.policy, round(case.P * share), frames), G=max(case.G + more, 1))
            for share, more in sizes]


def build_prompt(model: VideoLM, P: int, frames: int, text: int = 200) -> Prompt:
    """P tokens: a video of `frames` frames in the middle of at least `text` text tokens, patches of noise."""
    t = max(frames // 2, 1)
    side = math.isqrt(max(P - min(text, P // 2), t) // t)  # in tokens; a token is 2 x 2 patches
    grid = (t, 2 * side, 2 * side)
    V = t * side * side
    if side < 1 or V >= P:
        raise SystemExit(f"--prompt {P} has no room for --frames {frames} of a token each; take fewer frames")
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(20, 200, (P - V - 2,), generator=generator)
    config = model.hf.config
    video = torch.tensor([config.vision_start_token_id, *[config.video_token_id] * V, config.vision_end_token_id])
    ids = torch.cat([words[:10], video, words[10:]])
    positions = mrope_positions(ids, grid, seconds_per_grid(model, grid), video_token_id=model.video_token_id,
                                tokens_per_second=model.geometry.tokens_per_second)
    return Prompt(SAMPLE, ids, torch.randn(4 * V, 1176, generator=generator).to(model.device), grid, positions)


def seconds_per_grid(model: VideoLM, grid: tuple[int, int, int]) -> float:
    """The installed library goes on behind the larger axis of space, the published checkpoints behind the largest of all
    three. With so little time between the frames that it is never the largest, both mean the same."""
    t, _, w = grid
    return (w / 2 - 1) / (t * model.geometry.tokens_per_second)


# --- our step ---------------------------------------------------------------------------------------------------------


class OurStep:
    """The functions that train.py calls, one question."""

    def __init__(self, case: Case):
        self.case, self.group = case, None

    def phases(self) -> list[tuple]:
        return [(name, getattr(self, name)) for name in PHASES]

    def sample(self) -> None:
        case = self.case
        (self.group,) = rollout(case.policy, [case.prompt], rewards.score, group_size=case.G, max_new_tokens=case.C,
                                temperature=1.0, seeds=[0])
        self.tokens = self.group.tokens  # (G, C)

    @torch.no_grad()
    def reference(self) -> None:
        ((self.ref_logps, _),) = score_groups(self.case.reference, [self.group], 1.0)

    def forward(self) -> None:
        ((self.logps, _),) = score_groups(self.case.policy, [self.group], 1.0)

    def backward(self) -> None:
        loss_of(self.logps, self.ref_logps, self.case.G).backward()


def loss_of(logps: torch.Tensor, ref_logps: torch.Tensor, G: int, rows: slice = slice(None)) -> torch.Tensor:
    """Of `rows` of the G completions, with advantages made up, since random answers are all equally wrong."""
    advantages = torch.linspace(-1, 1, G, device=logps.device)[rows]
    return grpo_loss(logps, logps.detach(), advantages, torch.ones_like(logps, dtype=torch.bool), ref_logps=ref_logps,
                     beta=0.04, clip_low=0.2, clip_high=0.2, denominator=G)[0]


# --- the step as the others do it -------------------------------------------------------------------------------------


class VideoChatStep:
    """One question, by the library's own model, positions and attention, with the inputs that its processor would make.
    It scores the tokens that our side has sampled, so that the two can be compared. Its policy is the copy of the weights
    that serves as the reference: it has the precision these trainers train in, and no step makes the two differ."""

    def __init__(self, case: Case, tokens: torch.Tensor):
        self.case, self.tokens, self.policy = case, tokens, case.reference
        self.patches_seen: int | None = None  # by the vision tower in `generate`
        self.copies = 1  # of the question, given to `generate`
        self.rows = case.G  # that go through the model together
        self.kept = case.P + case.C  # positions with logits: all

    def pieces(self) -> list[slice]:
        return [slice(i, i + self.rows) for i in range(0, self.case.G, self.rows)]

    def phases(self) -> list[tuple]:
        learning = [(name, partial(getattr(self, name), piece)) for piece in self.pieces() for name in PHASES[2:]]
        return [("sample", self.sample), ("reference", self.reference), *learning]

    def inputs(self, ids: torch.Tensor) -> dict:
        """ids (B, S) that begin with the prompt; the pixels come once for each row."""
        case, rows, device = self.case, len(ids), self.policy.device
        ids = ids.to(device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids),
                "mm_token_type_ids": 2 * (ids == self.policy.video_token_id).int(),  # 2: video
                "pixel_values_videos": case.prompt.patches.repeat(rows, 1),
                "video_grid_thw": torch.tensor([case.prompt.grid] * rows, device=device),
                "second_per_grid_ts": torch.full((rows,), seconds_per_grid(case.policy, case.prompt.grid), device=device)}

    @torch.no_grad()
    def sample(self) -> None:
        model, C, G = self.policy, self.case.C, self.case.G
        model.hf.eval()
        ids = self.case.prompt.ids.expand(self.copies, -1)
        with library_attention(model), counted_patches(model) as counts:
            out = model.hf.generate(**self.inputs(ids), num_return_sequences=G // self.copies, do_sample=True,
                                    temperature=1.0, top_k=0, top_p=1.0, min_new_tokens=C, max_new_tokens=C,
                                    suppress_tokens=model.banned_ids)
        assert out.shape == (G, self.case.P + C)
        self.patches_seen = sum(counts)

    def score(self, model: VideoLM, rows: slice, banned: list[int] = ()) -> torch.Tensor:
        """-> (rows, C). `banned` ids are left out of the softmax, as on our side, where it is compared."""
        case, grad = self.case, torch.is_grad_enabled()
        model.hf.train(grad)
        tokens = self.tokens[rows]
        ids = torch.cat([case.prompt.ids.expand(len(tokens), -1).to(model.device), tokens], dim=1)  # (rows, P + C)
        with library_attention(model):
            logits = model.hf(**self.inputs(ids), use_cache=False, logits_to_keep=self.kept).logits  # (rows, kept, W)
        logps = []
        for row, row_ids in zip(logits[:, :-1], ids[:, 1 - self.kept:]):  # one at a time, and never all in float32
            row = row.index_fill(-1, torch.tensor(banned, device=row.device), -math.inf) if banned else row
            logps.append(row.log_softmax(-1).gather(-1, row_ids[:, None]).squeeze(-1))
        return torch.stack(logps)[:, -case.C:]

    @torch.no_grad()
    def reference(self) -> None:
        self.ref_logps = torch.cat([self.score(self.case.reference, piece) for piece in self.pieces()])

    def forward(self, rows: slice) -> None:
        self.logps = self.score(self.policy, rows)

    def backward(self, rows: slice) -> None:
        with library_attention(self.policy):  # checkpointing runs the layers again
            loss_of(self.logps, self.ref_logps[rows], self.case.G, rows).backward()


class TrlStep(VideoChatStep):
    """Today's TRL: a batch holds the question G times; logits begin one position before the completion; the batch is
    scored, and its gradient accumulated, in pieces."""

    def __init__(self, case: Case, tokens: torch.Tensor):
        super().__init__(case, tokens)
        self.copies, self.rows, self.kept = case.G, TRL_ROWS, case.C + 1


PEERS = {"videochat": VideoChatStep, "trl": TrlStep}
SIDES = ("ours", *PEERS)


@contextlib.contextmanager
def counted_patches(model: VideoLM):
    """The patches of each pass of the vision tower while the block runs."""
    counts: list[int] = []
    hook = model.visual.patch_embed.register_forward_hook(lambda module, inputs, out: counts.append(len(out)))
    try:
        yield counts
    finally:
        hook.remove()


@contextlib.contextmanager
def library_attention(model: VideoLM):
    """The library's own attention, flash where it is installed, for both towers."""
    configs = model.text.config, model.visual.config
    before = [config._attn_implementation for config in configs]
    for config in configs:
        config._attn_implementation = "flash_attention_2" if flash_attn_func and model.device.type == "cuda" else "sdpa"
    try:
        yield
    finally:
        for config, name in zip(configs, before):
            config._attn_implementation = name


# --- what the arithmetic allows ---------------------------------------------------------------------------------------


def flops_of(case: Case) -> dict[str, dict[str, float]]:
    """Floating point operations of each side in {prefill, decode, forward}; backward is two forwards more."""
    m, P, G, C = case.shape, case.P, case.G, case.C
    seeing, head = plan.vision_flops(m, case.prompt.grid), 2 * m.head
    own, decode_pairs = G * (C - 1), G * (C - 1) * (P + C / 2)  # the last token of a completion is never fed in
    decode = plan.decoder_flops(m, own, decode_pairs) + head * own
    repeated = G * plan.decoder_flops(m, P, P**2) + head * G
    whole = seeing + plan.decoder_flops(m, P + C, (P + C) ** 2)
    return {"ours": {"prefill": seeing + plan.decoder_flops(m, P, P**2) + head * G, "decode": decode,
                     "forward": seeing + plan.decoder_flops(m, P + own, P**2 + own * (P + C - 1)) + head * G * C},
            "videochat": {"prefill": seeing + repeated, "decode": decode, "forward": G * (whole + head * (P + C))},
            "trl": {"prefill": G * seeing + repeated, "decode": decode, "forward": G * (whole + head * (C + 1))}}


def decode_bytes(case: Case, prompts: int, questions: int) -> float:
    """Read by one decode step: the weights once, keys and values of `prompts` prompts and of the tokens said so far."""
    m, size = case.shape, 2 if case.policy.device.type == "cuda" else 4
    kv = plan.key_value_bytes(m) / 2 * size
    return size * (m.layers + m.head) + kv * (prompts * case.P + questions * case.G * case.C / 2)


def bounds_of(case: Case, rates: dict[str, float]) -> dict[str, dict[str, float]]:
    """Least seconds of each phase on either side. Gradient checkpointing recomputes the forward pass in the backward."""
    bounds = {}
    for side, flops in flops_of(case).items():
        step = max(flops["decode"] / rates["flops"] / (case.C - 1),
                   decode_bytes(case, 1 if side == "ours" else case.G, 1) / rates["bytes"])
        forward = flops["forward"] / rates["flops"]
        bounds[side] = {"sample": flops["prefill"] / rates["flops"] + (case.C - 1) * step, "reference": forward,
                        "forward": forward, "backward": 3 * forward}
    return bounds


def measure_rates(device: torch.device) -> dict[str, float]:
    """{"flops": of matrix products, "bytes": of a copy, read and written} a second, in the precision of the step."""
    cuda = device.type == "cuda"
    n, dtype = (8192, torch.bfloat16) if cuda else (768, torch.float32)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    source = torch.ones((2**30 if cuda else 2**25) // 4, device=device)
    target = torch.empty_like(source)
    product = min(clock(device, lambda: a @ b)[0] for _ in range(10))
    copied = min(clock(device, lambda: target.copy_(source))[0] for _ in range(10))
    return {"flops": 2 * n**3 / product, "bytes": 2 * source.nbytes / copied}


# --- measuring --------------------------------------------------------------------------------------------------------


def clock(device: torch.device, work) -> tuple[float, float]:
    """(seconds, bytes of memory at the peak above what there was before) of one call. On a CPU these are seconds of its
    work, all threads together: what else runs on the machine does not lengthen them."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        return time.perf_counter() - start, torch.cuda.max_memory_allocated() - before
    with ResidentPeak() as memory:
        start = time.process_time()
        work()
        seconds = time.process_time() - start
    return seconds, memory.peak - memory.before


class ResidentPeak:
    """The process's resident memory while the block runs, looked at every 5 ms; 0 where there is no /proc."""

    def __enter__(self):
        with contextlib.suppress(OSError, AttributeError):  # glibc alone: what was freed before is given back, or the
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # next phase would use it without being seen
        self.before = self.peak = self.now()
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        return self

    def watch(self) -> None:
        while not self.stop.wait(0.005):
            self.peak = max(self.peak, self.now())

    def __exit__(self, *_):
        self.stop.set()
        self.thread.join()
        self.peak = max(self.peak, self.now())

    @staticmethod
    def now() -> int:
        statm = Path("/proc/self/statm")
        return int(statm.read_text().split()[1]) * 4096 if statm.exists() else 0


PHASES = ("sample", "reference", "forward", "backward")


def measure_step(case: Case, step) -> dict[str, dict[str, float] | None]:
    """{phase: {seconds, peak memory}} of one step; None from the phase on that found no memory."""
    for model in (case.policy, case.reference):
        model.hf.zero_grad(set_to_none=True)
    figures: dict = dict.fromkeys(PHASES)
    for phase, work in step.phases():
        try:
            seconds, peak = clock(case.policy.device, work)
        except torch.OutOfMemoryError:
            step.logps = None  # and with it the graph of the forward pass
            torch.cuda.empty_cache()
            return figures | dict.fromkeys(PHASES[PHASES.index(phase):])
        before = figures[phase] or {"seconds": 0.0, "peak_bytes": 0}  # of the pieces in front
        figures[phase] = {"seconds": before["seconds"] + seconds, "peak_bytes": max(before["peak_bytes"], peak)}
    step.logps = None
    return figures


def compare_sides(case: Case, theirs: VideoChatStep, ours: OurStep) -> dict[str, float]:
    """Largest and mean |difference| of log-probabilities, ours against the library's, and as sampled against as scored.
    The library computes here with our weights and our autocast, in which a softmax is float32: what is left to differ is
    what is computed, not how precisely."""
    with torch.no_grad():
        ((scored, _),) = score_groups(case.policy, [ours.group], 1.0)
        with case.policy._compute():
            library = torch.cat([theirs.score(case.policy, rows, case.policy.banned_ids) for rows in theirs.pieces()])
    gaps = {"library": (scored - library).abs(), "sampled": (scored - ours.group.sampled_logps).abs()}
    return {f"{name}_{kind}": float(value) for name, gap in gaps.items()
            for kind, value in (("max", gap.max()), ("mean", gap.mean()))}


def find_problems(case: Case, theirs: VideoChatStep, differences: dict[str, float]) -> list[str]:
    """Why the comparison does not hold, if it does not: some releases of the library do more than they have to, or
    something else, and would make us look good."""
    problems, patches = [], len(case.prompt.patches)
    if theirs.patches_seen not in (None, patches):  # None: there was no memory for it
        problems.append(f"transformers {transformers.__version__} puts {theirs.patches_seen / patches:.3g} videos through the "
                        f"vision tower in generate(num_return_sequences={case.G}) where one is enough")
    limit = 0.05 if case.policy.autocast else 1e-3
    if not differences["library_mean"] < limit:
        problems.append(f"log-probabilities of transformers {transformers.__version__} differ from ours by "
                        f"{differences['library_mean']:.1g} on average: both sides do not compute the same")
    return problems


def measure_decode(case: Case, rates: dict[str, float], questions: int) -> dict[str, float]:
    """Decode steps of `questions` questions with G completions each, after the prefill, recording of graphs included."""
    model, D = case.policy, case.policy.text.config.hidden_size
    embeds = [torch.randn(1, case.P, D, device=model.device) * 0.02 for _ in range(questions)]
    positions = [case.prompt.positions] * questions

    def seconds(C: int) -> float:
        return clock(model.device, lambda: model.generate(embeds, positions, group_size=case.G, max_new_tokens=C,
                                                          temperature=1.0, seeds=list(range(questions))))[0]

    step = (seconds(case.C) - seconds(1)) / (case.C - 1)
    bound = max(decode_bytes(case, questions, questions) / rates["bytes"],
                questions * flops_of(case)["ours"]["decode"] / (case.C - 1) / rates["flops"])
    return {"questions": questions, "ms": 1e3 * step, "bound_ms": 1e3 * bound, "share_of_bound": bound / step,
            "tokens_per_second": questions * case.G / step}


def measure_scoring(case: Case) -> dict[str, float]:
    """Forward and backward of the completions' log-probabilities alone, prompt shared and prompt repeated: what sharing
    saves where nothing else differs. No pixels, logits of completions only on both sides."""
    model, results = case.policy, {}
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(20, 200, (case.G, case.C), generator=generator).to(model.device)
    embeds = torch.randn(1, case.P, model.text.config.hidden_size, generator=generator).to(model.device).requires_grad_()

    def score(share_prefix: bool) -> None:
        model.hf.zero_grad(set_to_none=True)
        logps = model.logprobs(embeds.clone(), case.prompt.positions, tokens, 1.0, share_prefix)
        logps.sum().backward()
        results[share_prefix] = logps.detach()

    shared, repeated = (clock(model.device, lambda: score(share))[0] for share in (True, False))
    G, P, C = case.G, case.P, case.C
    return {"shared": shared, "repeated": repeated, "ratio": repeated / shared, "bound": G * (P + C) / (P + G * C),
            "largest_difference": float((results[True] - results[False]).abs().max())}


# --- the report -------------------------------------------------------------------------------------------------------


def table_of(case: Case, figures: dict[str, dict], bounds: dict) -> list[dict]:
    """One step: one row a phase and one for the whole; ratios are None where the other side ran out of memory."""
    rows = []
    for name, parts in (("encode and sample", PHASES[:1]), ("reference", PHASES[1:2]), ("policy forward", PHASES[2:3]),
                        ("policy backward", PHASES[3:]), ("whole step", PHASES)):
        row: dict = {"phase": name}
        for side, measured in figures.items():
            fits = all(measured[p] for p in parts)
            seconds = sum(measured[p]["seconds"] for p in parts) if fits else None
            row[side] = {"seconds": seconds, "peak_bytes": max(measured[p]["peak_bytes"] for p in parts) if fits else None,
                         "tokens_per_second": case.G * case.C / seconds if fits else None,
                         "bound_seconds": sum(bounds[side][p] for p in parts)}
        for side in PEERS:
            theirs, ours = row[side], row["ours"]
            theirs["ratio"] = theirs["seconds"] / ours["seconds"] if theirs["seconds"] and ours["seconds"] else None
            theirs["bound_ratio"] = theirs["bound_seconds"] / ours["bound_seconds"]
        rows.append(row)
    return rows


def median_of(steps: list):
    """The medians of figures that stand at equal places in dicts and lists; None where one of them is: a side that found no
    memory in one step has no time for it. Of memory the largest: that is what a card must have."""
    first = steps[0]
    if isinstance(first, dict):
        columns = {key: [step[key] for step in steps] for key in first}
        return {key: max(column) if key == "peak_bytes" and None not in column else median_of(column)
                for key, column in columns.items()}
    if isinstance(first, list):
        return [median_of(column) for column in zip(*steps)]
    if isinstance(first, str):  # the name of a phase
        return first
    return None if None in steps else statistics.median(steps)


def print_report(report: dict) -> None:
    cases, C = report["cases"], report["cases"][0]["C"]
    rates, gaps, scoring = report["rates"], report["differences"], report["scoring"]
    sizes = "; ".join(f"{c['P']} ({c['V']} of video), {c['G']}" for c in cases)
    print(f"{report['shape']} on {report['machine']}; torch {report['torch']}, transformers {report['transformers']}")
    print(f"{len(cases)} step(s), P and G: {sizes}; C = {C}; medians, of memory the largest")
    print(f"measured rates: {rates['flops'] / 1e12:.3g} Tflop/s of matrix products, {rates['bytes'] / 1e9:.3g} GB/s copied\n")
    print_problems(report)
    print(f"{'':18}|{'seconds':^24}|{'times faster than':^32}|{'peak memory, MB':^24}| of the")
    print(f"{'':18}|{'':24}|{'VideoChat-R1':^16}{'TRL':^16}|{'':24}| bound")
    names = f"{'VideoCh.':>8}{'TRL':>8}{'ours':>8}"
    print(f"{'':18}|{names}|{'got':>8}{'allowed':>8}{'got':>8}{'allowed':>8}|{names}|{'ours':>8}")
    for row in report["table"]:
        sides = [row[side] for side in (*PEERS, "ours")]
        seconds = [show(side["seconds"], 2, "no room") for side in sides]
        ratios = [show(row[side][kind], 1) for side in PEERS for kind in ("ratio", "bound_ratio")]
        memory = [show(side["peak_bytes"] and side["peak_bytes"] / 1e6, 0) for side in sides]
        share = row["ours"]["bound_seconds"] / row["ours"]["seconds"]
        print(f"{row['phase']:18}|{''.join(seconds)}|{''.join(ratios)}|{''.join(memory)}|{share:8.0%}")
    tokens = [f"{name} {show(report['table'][-1][side]['tokens_per_second'], 0).strip()}"
              for side, name in (("videochat", "VideoChat-R1"), ("trl", "TRL"), ("ours", "ours"))]
    print(f"tokens/s of the whole step: {', '.join(tokens)}")
    print("\ndecode step, ours:")
    for d in report["decode"]:
        print(f"  {d['questions']:.0f} question(s): {d['ms']:.2f} ms, bound {d['bound_ms']:.2f} ms ({d['share_of_bound']:.0%}), "
              f"{d['tokens_per_second']:.0f} tokens/s")
    print(f"backward: {report['mfu']:.0%} of the matrix rate ({report['hfu']:.0%} with the recomputed forward pass)")
    print(f"the same {cases[0]['G'] * C} tokens scored by both: |log p ours - library's| at most {gaps['library_max']:.0e}, on "
          f"average {gaps['library_mean']:.0e}; sampled and scored differ by {gaps['sampled_max']:.0e} at most")
    print("scoring alone, forward and backward, prompt repeated and shared:")
    print(f"  {scoring['repeated']:.3f} s and {scoring['shared']:.3f} s")
    print(f"  ratio {scoring['ratio']:.1f} x (bound by tokens {scoring['bound']:.1f} x), largest difference "
          f"{scoring['largest_difference']:.0e}")
    print_problems(report)


def print_problems(report: dict) -> None:
    for problem in report["problems"]:
        print(f"THE COMPARISON DOES NOT HOLD: {problem}")


def show(value: float | None, digits: int, otherwise: str = "-") -> str:
    return f"{otherwise:>8}" if value is None else f"{value:8.{digits}f}"


def measure_sides(case: Case) -> tuple[dict[str, dict], dict]:
    """One step on every side, ours first: the others score what it has sampled. -> figures and steps, by side."""
    ours = OurStep(case)
    figures = {"ours": measure_step(case, ours)}
    if None in figures["ours"].values():
        raise SystemExit(f"\nour own step does not fit this device: {figures['ours']}; take a shorter --prompt or a smaller "
                         "--group")
    steps = {"ours": ours} | {side: cls(case, ours.tokens) for side, cls in PEERS.items()}
    figures |= {side: measure_step(case, steps[side]) for side in PEERS}
    for model in (case.policy, case.reference):
        model.hf.zero_grad(set_to_none=True)
    return figures, steps


def run(case: Case, frames: int, steps: int) -> dict:
    """All that is printed, and more, as one JSON object."""
    rates, tables, differences, problems, hardware = measure_rates(case.policy.device), [], None, [], []
    cases = cases_of(case, frames, steps)
    for number, case in enumerate(cases):
        print(f"step {number + 1} of {steps}, ", end="", file=sys.stderr, flush=True)
        figures, sides = measure_sides(case)
        tables.append(table_of(case, figures, bounds_of(case, rates)))
        hardware.append(flops_of(case)["ours"]["forward"] / figures["ours"]["backward"]["seconds"] / rates["flops"])
        if number == 0:  # once: it says what is computed, not how fast
            differences = compare_sides(case, sides["trl"], sides["ours"])  # the side that needs little memory
            problems = find_problems(case, sides["videochat"], differences)
    print("decoding, ", end="", file=sys.stderr, flush=True)
    decode = [median_of([measure_decode(case, rates, questions) for case in cases]) for questions in (1, 4)]
    print("scoring\n", file=sys.stderr, flush=True)
    scoring = [measure_scoring(case) for case in cases]
    table, backward = median_of(tables), statistics.median(hardware)
    if problems:
        for row in table:
            for side in PEERS:
                row[side]["ratio"] = None  # a number would be quoted without its reservation
    return {"cases": [{"P": c.P, "V": c.V, "G": c.G, "C": c.C, "grid": c.prompt.grid} for c in cases], "problems": problems,
            "rates": rates, "table": table, "steps": tables, "flops": [flops_of(c) for c in cases], "decode": decode,
            "mfu": 2 * backward, "hfu": 3 * backward, "differences": differences,
            "scoring": median_of(scoring) | {"largest_difference": max(s["largest_difference"] for s in scoring)}}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", default="cpu", choices=("cpu", "cuda"), help="bfloat16 arithmetic on cuda (default: cpu)")
    add("--shape", default="tiny", choices=tuple(DEFAULTS), help="3 layers of 256, or a published size (default: tiny)")
    add("--prompt", type=int, help="prompt tokens P, video included (default: 1000; published sizes: 3800)")
    add("--frames", type=int, default=32, help="frames of the video; two make a grid of tokens (default: 32)")
    add("--group", type=int, default=8, help="completions G (default: 8)")
    add("--completion", type=int, help="tokens of each, C, at least 2 (default: 64; published sizes: 150)")
    add("--repeats", type=int, default=3, help="steps, each of another P and G; medians count (default: 3)")
    add("--out", default="", help="folder for bench.json with all figures")
    args = parser.parse_args(arguments)
    P, C = (given or default for given, default in zip((args.prompt, args.completion), DEFAULTS[args.shape]))
    if min(C - 1, args.group, args.repeats, args.frames - 1) < 1:
        parser.error("--completion and --frames are at least 2, --group and --repeats at least 1")
    device = torch.device(args.device)
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"a CPU, {torch.get_num_threads()} thread(s), seconds of CPU time"
    about = {"shape": args.shape, "machine": machine, "date": time.strftime("%Y-%m-%d"), "python": platform.python_version(),
             "torch": torch.__version__, "transformers": transformers.__version__, "flash": flash_attn_func is not None}
    case = build_case(build_model(args.shape, args.device), P, args.frames, args.group, C)
    report = about | run(case, args.frames, args.repeats)
    if args.out:
        Path(args.out).mkdir(parents=True, exist_ok=True)
        (Path(args.out) / "bench.json").write_text(json.dumps(report, indent=1) + "\n")
    print_report(report)


if __name__ == "__main__":
    main()
