"""Our step against the step as other GRPO code for video does it: `python tests/bench.py`, in one process, as ratios.

    python tests/bench.py                                            a tiny model on the CPU, about a minute
    python tests/bench.py --device cuda --shape 3b --out bench-3b    random weights of the published size

The other side is written out here (`PeersStep`): the installed transformers' `generate(num_return_sequences=G)`, which runs
the vision tower once and the prompt G times; then pixels repeated G times, log-probabilities of full sequences from full
logits, for the policy and for the reference. Weights, tokens, precision and gradient checkpointing are the same on both
sides, and what both compute is compared. Seconds depend on the machine, ratios hardly do. Beside each stands what the
arithmetic allows: floating point operations and bytes over the rates of this machine, measured first.

Left out: decoding of videos, the optimiser's step, rewards of real text. Completions are all C tokens long.

Letters: P prompt tokens with V video tokens among them, G completions of C tokens.
"""

import argparse
import contextlib
import copy
import ctypes
import json
import math
import platform
import sys
import threading
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
import transformers  # noqa: E402

from data import Prompt, mrope_positions  # noqa: E402
from grpo import grpo_loss, rollout, score_groups  # noqa: E402
from lib import toy  # noqa: E402
from model import VideoLM, flash_attn_func  # noqa: E402
from tools import plan  # noqa: E402

# --- the case: a model, a question, sizes -----------------------------------------------------------------------------

DEFAULTS = {"tiny": (2000, 64), "3b": (3800, 150), "7b": (3800, 150)}  # P, C
SAMPLE = {"id": "bench", "task": "qa", "question": "?", "options": ["a", "b"], "answer": "A", "video": "none"}
NO_END = [-1]  # no token ends a completion: random weights say nothing, and both sides shall say as much of it


@dataclass
class Case:
    policy: VideoLM
    reference: VideoLM
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
        return toy.build_model(toy.build_tokenizer(["a benchmark needs no words"]), 0, hidden=256, layers=6).to(device)
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        return transformers.Qwen2_5_VLForConditionalGeneration(published_config(shape))


def published_config(shape: str) -> transformers.Qwen2_5_VLConfig:
    """A size of plan.py, with what is not needed for counting: how the axes share the frequencies of a head."""
    config = plan.load_shape(shape)
    config.text_config.rope_parameters["mrope_section"] = [16, 24, 24]
    return config


def build_case(hf: transformers.Qwen2_5_VLForConditionalGeneration, P: int, frames: int, G: int, C: int) -> Case:
    tokenizer = toy.build_tokenizer(["a benchmark needs no words"])
    shape = plan.count(hf.config)  # before VideoLM names attentions in it that no new model can be built with
    reference = copy.deepcopy(hf).requires_grad_(False)
    if hf.device.type == "cuda":
        reference.to(torch.bfloat16)  # as train.py loads it
    models = [VideoLM(x, tokenizer, "", pack_tokens=1) for x in (hf, reference)]
    for model in models:
        with warnings.catch_warnings(action="ignore"):  # of a newer name
            model.hf.gradient_checkpointing_enable({"use_reentrant": False})
        model.eos_ids = NO_END
    return Case(*models, shape, build_prompt(models[0], P, frames), G, C)


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
    # The installed library goes on behind the larger axis of space, the published checkpoints behind the largest of all
    # three. With so little time between the frames that it is never the largest, both mean the same.
    seconds = (side - 1) / (t * model.tokens_per_second)
    positions = mrope_positions(ids, grid, seconds, video_token_id=model.video_token_id,
                                tokens_per_second=model.tokens_per_second)
    return Prompt(SAMPLE, ids, torch.randn(4 * V, 1176, generator=generator).to(model.device), grid, positions, seconds)


# --- our step ---------------------------------------------------------------------------------------------------------


class OurStep:
    """The functions that train.py calls, one question."""

    def __init__(self, case: Case):
        self.case, self.group = case, None

    def sample(self) -> None:
        case = self.case
        (self.group,) = rollout(case.policy, [case.prompt], group_size=case.G, max_new_tokens=case.C, temperature=1.0,
                                seeds=[0])
        self.tokens = self.group.tokens  # (G, C)

    @torch.no_grad()
    def reference(self) -> None:
        (self.ref_logps,) = score_groups(self.case.reference, [self.group], 1.0, reuse_video=False)

    def forward(self) -> None:
        (self.logps,) = score_groups(self.case.policy, [self.group], 1.0, reuse_video=False)

    def backward(self) -> None:
        loss_of(self.logps, self.ref_logps).backward()


def loss_of(logps: torch.Tensor, ref_logps: torch.Tensor) -> torch.Tensor:
    """With advantages made up, since random answers are all equally wrong."""
    advantages = torch.linspace(-1, 1, len(logps), device=logps.device)
    return grpo_loss(logps, logps.detach(), advantages, torch.ones_like(logps, dtype=torch.bool), ref_logps=ref_logps,
                     beta=0.04, clip_low=0.2, clip_high=0.2)[0]


# --- the step as the peers do it --------------------------------------------------------------------------------------


class PeersStep:
    """One question, by the library's own model, positions and attention, with the inputs that its processor would make.
    It scores the tokens that our side has sampled, so that the two can be compared."""

    def __init__(self, case: Case, tokens: torch.Tensor):
        self.case, self.tokens = case, tokens

    def inputs(self, ids: torch.Tensor) -> dict:
        """ids (B, S) that begin with the prompt; the pixels come once for each row."""
        case, rows, device = self.case, len(ids), self.case.policy.device
        ids = ids.to(device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids),
                "mm_token_type_ids": 2 * (ids == case.policy.video_token_id).int(),  # 2: video
                "pixel_values_videos": case.prompt.patches.repeat(rows, 1),
                "video_grid_thw": torch.tensor([case.prompt.grid] * rows, device=device),
                "second_per_grid_ts": torch.full((rows,), case.prompt.seconds_per_grid, device=device)}

    @torch.no_grad()
    def sample(self) -> None:
        model, C = self.case.policy, self.case.C
        model.hf.eval()
        with library_attention(model), model._compute():
            out = model.hf.generate(**self.inputs(self.case.prompt.ids[None]), num_return_sequences=self.case.G,
                                    do_sample=True, temperature=1.0, top_k=0, top_p=1.0, min_new_tokens=C,
                                    max_new_tokens=C, suppress_tokens=model.banned_ids)
        assert out.shape == (self.case.G, self.case.P + C)

    def score(self, model: VideoLM, banned: list[int] = ()) -> torch.Tensor:
        """(G, C). `banned` ids are left out of the softmax, as on our side, where it is compared."""
        case, grad = self.case, torch.is_grad_enabled()
        model.hf.train(grad)
        ids = torch.cat([case.prompt.ids.expand(case.G, -1).to(model.device), self.tokens], dim=1)  # (G, P + C)
        with library_attention(model), model._compute():
            logits = model.hf(**self.inputs(ids), use_cache=False).logits  # (G, P + C, W)
        rows = []
        for row, row_ids in zip(logits[:, :-1], ids[:, 1:]):  # one at a time: peers save memory here
            row = row.index_fill(-1, torch.tensor(banned, device=row.device), -math.inf) if banned else row
            rows.append(row.float().log_softmax(-1).gather(-1, row_ids[:, None]).squeeze(-1))
        return torch.stack(rows)[:, case.P - 1:]

    @torch.no_grad()
    def reference(self) -> None:
        self.ref_logps = self.score(self.case.reference)

    def forward(self) -> None:
        self.logps = self.score(self.case.policy)

    def backward(self) -> None:
        with library_attention(self.case.policy):  # checkpointing runs the layers again
            loss_of(self.logps, self.ref_logps).backward()


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
    """Floating point operations of {ours, peers} in {prefill, decode, forward}; backward is two forwards more."""
    m, P, G, C = case.shape, case.P, case.G, case.C
    seeing, head = plan.vision_flops(m, case.prompt.grid), 2 * m.head
    own, decode_pairs = G * (C - 1), G * (C - 1) * (P + C / 2)  # the last token of a completion is never fed in
    decode = plan.decoder_flops(m, own, decode_pairs) + head * own
    return {"ours": {"prefill": seeing + plan.decoder_flops(m, P, P**2) + head * G, "decode": decode,
                     "forward": seeing + plan.decoder_flops(m, P + own, P**2 + own * (P + C - 1)) + head * G * C},
            "peers": {"prefill": seeing + G * plan.decoder_flops(m, P, P**2) + head * G, "decode": decode,
                      "forward": G * (seeing + plan.decoder_flops(m, P + C, (P + C)**2) + head * (P + C))}}


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


def measure_step(case: Case, step, repeats: int) -> dict[str, dict[str, float] | None]:
    """{phase: {seconds of the fastest run, largest peak memory}}; None from the phase on that found no memory."""
    best: dict = {}
    for _ in range(repeats):
        case.policy.hf.zero_grad(set_to_none=True)
        for phase in PHASES:
            try:
                seconds, peak = clock(case.policy.device, getattr(step, phase))
            except torch.OutOfMemoryError:
                step.logps = None  # and with it the graph of the forward pass
                torch.cuda.empty_cache()
                return {name: best.get(name) if PHASES.index(name) < PHASES.index(phase) else None for name in PHASES}
            old = best.get(phase, {"seconds": math.inf, "peak_bytes": 0})
            best[phase] = {"seconds": min(seconds, old["seconds"]), "peak_bytes": max(peak, old["peak_bytes"])}
    return best


def compare_sides(case: Case, peers: PeersStep, ours: OurStep) -> dict[str, float]:
    """Largest and mean |difference| of log-probabilities, ours against the library's, and as sampled against as scored."""
    with torch.no_grad():
        (scored,) = score_groups(case.policy, [ours.group], 1.0, reuse_video=False)
        theirs = peers.score(case.policy, case.policy.banned_ids)
    gaps = {"library": (scored - theirs).abs(), "sampled": (scored - ours.group.sampled_logps).abs()}
    return {f"{name}_{kind}": float(value) for name, gap in gaps.items()
            for kind, value in (("max", gap.max()), ("mean", gap.mean()))}


def measure_decode(case: Case, rates: dict[str, float], questions: int, repeats: int) -> dict[str, float]:
    """Decode steps of `questions` questions with G completions each, after the prefill, recording of graphs included."""
    model, D = case.policy, case.policy.text.config.hidden_size
    embeds = [torch.randn(1, case.P, D, device=model.device) * 0.02 for _ in range(questions)]
    positions = [case.prompt.positions] * questions

    def seconds(C: int) -> float:
        return min(clock(model.device, lambda: model.generate(
            embeds, positions, group_size=case.G, max_new_tokens=C, temperature=1.0, seeds=list(range(questions))))[0]
            for _ in range(repeats))

    step = (seconds(case.C) - seconds(1)) / (case.C - 1)
    bound = max(decode_bytes(case, questions, questions) / rates["bytes"],
                questions * flops_of(case)["ours"]["decode"] / (case.C - 1) / rates["flops"])
    return {"questions": questions, "ms": 1e3 * step, "bound_ms": 1e3 * bound, "share_of_bound": bound / step,
            "tokens_per_second": questions * case.G / step}


def measure_scoring(case: Case, repeats: int) -> dict[str, float]:
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

    shared, repeated = (min(clock(model.device, lambda: score(share))[0] for _ in range(repeats)) for share in (True, False))
    G, P, C = case.G, case.P, case.C
    return {"shared": shared, "repeated": repeated, "ratio": repeated / shared, "bound": G * (P + C) / (P + G * C),
            "largest_difference": float((results[True] - results[False]).abs().max())}


# --- the report -------------------------------------------------------------------------------------------------------


def table_of(case: Case, ours: dict, peers: dict, bounds: dict) -> list[dict]:
    """One row a phase and one for the step; ratios are None where the other side ran out of memory."""
    rows = []
    for name, parts in (("encode and sample", PHASES[:1]), ("reference", PHASES[1:2]), ("policy forward", PHASES[2:3]),
                        ("policy backward", PHASES[3:]), ("whole step", PHASES)):
        row = {"phase": name, "bound_ratio": sum(bounds["peers"][p] for p in parts) / sum(bounds["ours"][p] for p in parts)}
        for side, measured in (("ours", ours), ("peers", peers)):
            fits = all(measured[p] for p in parts)
            seconds = sum(measured[p]["seconds"] for p in parts) if fits else None
            row[side] = {"seconds": seconds, "peak_bytes": max(measured[p]["peak_bytes"] for p in parts) if fits else None,
                         "tokens_per_second": case.G * case.C / seconds if fits else None,
                         "bound_seconds": sum(bounds[side][p] for p in parts)}
        both = row["ours"]["seconds"] and row["peers"]["seconds"]
        row["ratio"] = row["peers"]["seconds"] / row["ours"]["seconds"] if both else None
        rows.append(row)
    return rows


def print_report(report: dict) -> None:
    P, V, G, C = (report["case"][name] for name in "PVGC")
    rates, gaps, scoring = report["rates"], report["differences"], report["scoring"]
    print(f"{report['shape']} on {report['machine']}: P = {P} ({V} of video), G = {G}, C = {C}; torch {torch.__version__}, "
          f"transformers {transformers.__version__}")
    print(f"measured rates: {rates['flops'] / 1e12:.3g} Tflop/s of matrix products, {rates['bytes'] / 1e9:.3g} GB/s copied\n")
    print(f"{'':18}|{'seconds':^18}|{'times faster':^18}|{'tokens/s':^18}|{'peak memory, MB':^18}| of the bound")
    print(f"{'':18}|{'peers':>9}{'ours':>9}|{'got':>9}{'allowed':>9}|{'peers':>9}{'ours':>9}|{'peers':>9}{'ours':>9}|{'ours':>13}")
    for row in report["table"]:
        sides = row["peers"], row["ours"]
        cells = [*(s["seconds"] for s in sides), row["ratio"], row["bound_ratio"], *(s["tokens_per_second"] for s in sides),
                 *(s["peak_bytes"] and s["peak_bytes"] / 1e6 for s in sides)]
        texts = [f"{'no room':>9}" if x is None else f"{x:9.{d}f}" for x, d in zip(cells, (2, 2, 1, 1, 0, 0, 0, 0))]
        pairs = "|".join("".join(texts[i:i + 2]) for i in range(0, 8, 2))
        print(f"{row['phase']:18}|{pairs}|{row['ours']['bound_seconds'] / row['ours']['seconds']:13.0%}")
    print("\ndecode step, ours:")
    for d in report["decode"]:
        print(f"  {d['questions']} x {G} rows: {d['ms']:.2f} ms, bound {d['bound_ms']:.2f} ms ({d['share_of_bound']:.0%}), "
              f"{d['tokens_per_second']:.0f} tokens/s")
    print(f"backward: {report['mfu']:.0%} of the matrix rate ({report['hfu']:.0%} with the recomputed forward pass)")
    print(f"the same {G * C} tokens scored on both sides: |log p ours - library's| at most {gaps['library_max']:.0e}, on "
          f"average {gaps['library_mean']:.0e}; sampled and scored differ by {gaps['sampled_max']:.0e} at most")
    print("scoring alone, forward and backward, prompt repeated and shared:")
    print(f"  {scoring['repeated']:.3f} s and {scoring['shared']:.3f} s")
    print(f"  ratio {scoring['ratio']:.1f} x (bound by tokens {scoring['bound']:.1f} x), largest difference "
          f"{scoring['largest_difference']:.0e}")


def run(case: Case, repeats: int) -> dict:
    """All that is printed, and more, as one JSON object."""
    rates = measure_rates(case.policy.device)
    bounds, ours = bounds_of(case, rates), OurStep(case)
    print("measuring: our step", end="", file=sys.stderr, flush=True)
    our_figures = measure_step(case, ours, repeats)
    if None in our_figures.values():
        raise SystemExit(f"\nour own step does not fit this device: {our_figures}; take a shorter --prompt or a smaller --group")
    print(", theirs", end="", file=sys.stderr, flush=True)
    peers = PeersStep(case, ours.tokens)
    their_figures = measure_step(case, peers, repeats)
    ours.logps = peers.logps = None  # graphs
    case.policy.hf.zero_grad(set_to_none=True)
    print(", the same numbers", end="", file=sys.stderr, flush=True)
    differences = compare_sides(case, peers, ours)
    print(", decoding", end="", file=sys.stderr, flush=True)
    decode = [measure_decode(case, rates, questions, repeats) for questions in (1, 4)]
    print(", scoring\n", file=sys.stderr, flush=True)
    backward = flops_of(case)["ours"]["forward"] / our_figures["backward"]["seconds"] / rates["flops"]
    return {"case": {"P": case.P, "V": case.V, "G": case.G, "C": case.C, "grid": case.prompt.grid}, "rates": rates,
            "table": table_of(case, our_figures, their_figures, bounds), "flops": flops_of(case), "decode": decode,
            "mfu": 2 * backward, "hfu": 3 * backward, "differences": differences, "scoring": measure_scoring(case, repeats)}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", default="cpu", choices=("cpu", "cuda"), help="bfloat16 arithmetic on cuda (default: cpu)")
    add("--shape", default="tiny", choices=tuple(DEFAULTS), help="6 layers of 256, or a published size (default: tiny)")
    add("--prompt", type=int, help="prompt tokens P, video included (default: 2000; published sizes: 3800)")
    add("--frames", type=int, default=32, help="frames of the video; two make a grid of tokens (default: 32)")
    add("--group", type=int, default=8, help="completions G (default: 8)")
    add("--completion", type=int, help="tokens of each, C, at least 2 (default: 64; published sizes: 150)")
    add("--repeats", type=int, default=2, help="runs, of which the fastest counts (default: 2)")
    add("--out", default="", help="folder for bench.json with all figures")
    args = parser.parse_args(arguments)
    P, C = (given or default for given, default in zip((args.prompt, args.completion), DEFAULTS[args.shape]))
    if min(C - 1, args.group, args.repeats, args.frames - 1) < 1:
        parser.error("--completion and --frames are at least 2, --group and --repeats at least 1")
    device = torch.device(args.device)
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"a CPU, {torch.get_num_threads()} thread(s), seconds of CPU time"
    about = {"shape": args.shape, "machine": machine, "date": time.strftime("%Y-%m-%d"), "python": platform.python_version(),
             "torch": torch.__version__, "transformers": transformers.__version__, "flash": flash_attn_func is not None}
    report = about | run(build_case(build_model(args.shape, args.device), P, args.frames, args.group, C), args.repeats)
    if args.out:
        Path(args.out).mkdir(parents=True, exist_ok=True)
        (Path(args.out) / "bench.json").write_text(json.dumps(report, indent=1) + "\n")
    print_report(report)


if __name__ == "__main__":
    main()
