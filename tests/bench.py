"""What sharing the prompt saves: `python tests/bench.py` prints one ratio, measured in one process.

Scoring G completions of C tokens behind a prompt of P tokens, forward and backward with gradient checkpointing, once with
the prompt shared and once with it repeated for every completion, as other GRPO code for video does. Seconds depend on the
machine, the ratio hardly does; the bound is that of the token counts, G (P + C) / (P + G C).
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

import toy  # noqa: E402
from model import VideoLM  # noqa: E402


def seconds_of(model: VideoLM, embeds, positions, tokens, share_prefix: bool, repeats: int) -> tuple[float, torch.Tensor]:
    """The fastest of `repeats` runs, and the log-probabilities."""
    best = float("inf")
    for _ in range(repeats):
        model.hf.zero_grad()
        start = time.perf_counter()
        logps = model.logprobs(embeds.clone(), positions, tokens, 1.0, share_prefix)
        logps.sum().backward()
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best, logps.detach()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--prompt", type=int, default=2000, help="prompt tokens P (default: 2000)")
    add("--group", type=int, default=8, help="completions G (default: 8)")
    add("--completion", type=int, default=64, help="tokens of each C (default: 64)")
    add("--hidden", type=int, default=256, help="hidden size (default: 256)")
    add("--layers", type=int, default=6, help="decoder layers (default: 6)")
    add("--repeats", type=int, default=3, help="runs, of which the fastest counts (default: 3)")
    add("--device", default="cpu", help="cpu or cuda (default: cpu)")
    args = parser.parse_args()
    P, G, C = args.prompt, args.group, args.completion

    tokenizer = toy.build_tokenizer(["a benchmark needs no words"])
    model = VideoLM(toy.build_model(tokenizer, 0, args.hidden, args.layers).to(args.device), tokenizer, "")
    model.hf.gradient_checkpointing_enable({"use_reentrant": False})
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(20, 200, (G, C), generator=generator).to(args.device)
    embeds = torch.randn(1, P, args.hidden, generator=generator).to(args.device).requires_grad_()
    positions = torch.arange(P, device=args.device).expand(3, -1)

    shared, a = seconds_of(model, embeds, positions, tokens, True, args.repeats)
    repeated, b = seconds_of(model, embeds, positions, tokens, False, args.repeats)
    bound = G * (P + C) / (P + G * C)
    print(f"scoring, forward and backward: P = {P}, G = {G}, C = {C}, {args.layers} layers of {args.hidden}, {args.device}")
    print(f"  prompt repeated {repeated:8.3f} s\n  prompt shared   {shared:8.3f} s")
    print(f"  ratio {repeated / shared:.1f} x (bound by tokens {bound:.1f} x), largest difference {(a - b).abs().max():.0e}")


if __name__ == "__main__":
    main()
