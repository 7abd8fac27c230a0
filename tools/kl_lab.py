"""The KL, looked at: what each estimator of KL(policy || reference) is worth, as a number and as a loss.

    python -m tools.kl_lab --run runs/toy

takes the trained policy of a run (`final/`) and its reference (`warm_start/`), lets the policy answer held-out questions, and
compares k1, k2 and k3 of the sampled tokens (`grpo.kl_penalty`) with the exact KL at the same prefixes: the sum over the whole
vocabulary, which is 1,024 words in the toy, and which training leaves out because it is 152,000 in a real model.

With d = log ref - log p of a token drawn from p, and grad log p the gradient of its log-probability:

                        gradient of a token     its mean over tokens drawn from p
    exact KL                                    E[-d grad log p] = grad KL(p || ref): what one wants
    k1 as a loss        grad log p              0: nothing
    k2 as a loss        -d grad log p           grad KL(p || ref)
    k3 as a loss        (1 - e^d) grad log p    grad KL(ref || p): the other direction
    k1 in the reward    k1 grad log p           grad KL(p || ref); k1 = -d, so token for token that of k2 as a loss
    k3 in the reward    k3 grad log p           grad KL(p || ref) - grad KL(ref || p)
    rho k3 as a loss    -d grad log p           grad KL(p || ref); the sum of the line above and of k3 as a loss

An estimator without bias is not yet a loss without bias, because p, which the tokens are drawn from, moves too: rho = p / p_old
in the last line accounts for that. docs/kl.md has the figures of a run.

All of it is per token: the exact gradient is that of the KL at prefixes which are given. What a token does to the KL of the
tokens behind it no line counts, and neither does GRPO.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import rewards
import train
from data import VideoSettings
from grpo import Group, kl_penalty, rollout
from lib.distributed import World
from lib.files import read_json
from lib.flags import SEED, fill, number
from lib.loader import VideoLoader
from lib.questions import load_prompts, sampling_seed
from lib.run import write_json
from lib.terminal import errors_in_one_sentence
from model import PackedAttention, VideoLM
from tools.report import samples_of

KINDS = ("k1", "k2", "k3")
TOWARDS, BACK = "KL(p || ref)", "KL(ref || p)"


# ---- the mathematics: tensors of log-probabilities in, numbers out --------------------------------------------------


def loss_terms(logps: Tensor, ref_logps: Tensor) -> dict[str, Tensor]:
    """What can be put into the loss for each token, of the shape of `logps`; only `logps` has a gradient."""
    k = {kind: kl_penalty(logps, ref_logps, kind) for kind in KINDS}
    rho = (logps - logps.detach()).exp()  # 1, with the gradient of log p
    return {**{f"{kind} as a loss": k[kind] for kind in KINDS}, "k1 in the reward": k["k1"].detach() * logps,
            "k3 in the reward": k["k3"].detach() * logps, "rho k3 as a loss": rho * k["k3"]}


def exact_kl(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """Log-probabilities (..., W) of all words -> KL(p || ref) (...) in nats, differentiable."""
    return (logps.exp() * (logps - ref_logps)).sum(-1)


def in_expectation(terms: dict[str, Tensor], logps: Tensor) -> dict[str, Tensor]:
    """Terms (..., W) of all words -> their means (...) under p, as infinitely many samples would give them. p is a weight
    here, without a gradient: nobody differentiates how often a word was drawn."""
    return {name: (logps.detach().exp() * term).sum(-1) for name, term in terms.items()}


def value_rows(sampled: dict[str, Tensor], expected: dict[str, Tensor], exact: Tensor) -> dict[str, dict[str, float]]:
    """`sampled`: k of N tokens, `expected`: their means over the vocabulary at the same prefixes, `exact`: the KL there; (N,) each.

    The standard error is that of mean - exact. Given its prefix a token's k - E[k] is independent of what was before, so the
    N differences are uncorrelated although the tokens of a completion are not independent.
    """
    rows = {}
    for kind, k in sampled.items():
        error = (k - expected[kind]).square().mean().sqrt() / len(k) ** 0.5
        rows[kind] = {"mean": k.mean(), "std": k.std(), "negative": (k < 0).double().mean(), "off": (k - exact).mean(),
                      "standard_error": error, "bias": (expected[kind] - exact).mean()}
    rows["exact"] = {"mean": exact.mean(), "std": exact.std()}
    return {name: {key: float(value) for key, value in row.items()} for name, row in rows.items()}


def gradient_rows(expected: dict[str, Tensor], sampled: dict[str, Tensor]) -> dict[str, dict[str, float | None]]:
    """Gradients (parameters,) of each loss term -> how they compare with that of the exact KL, in length and direction."""
    wanted, back = expected[TOWARDS], expected[BACK]
    rows = {}
    for name, g in expected.items():
        rows[name] = {"norm": g.norm() / wanted.norm(), "cosine": cosine(g, wanted), "cosine_back": cosine(g, back)}
        if name in sampled:
            s = sampled[name]
            rows[name] |= {"sampled_norm": s.norm() / wanted.norm(), "sampled_cosine": cosine(s, wanted),
                           "sampled_error": (s - wanted).norm() / wanted.norm()}
    return {name: {key: value if value is None else float(value) for key, value in row.items()} for name, row in rows.items()}


def cosine(a: Tensor, b: Tensor) -> Tensor | None:
    """None where `a` is 0 but for rounding: then it has no direction."""
    return a @ b / (a.norm() * b.norm()) if a.norm() > 1e-6 * b.norm() else None


# ---- a trained toy: its policy, its reference and what it says ------------------------------------------------------


def load_run(folder: Path) -> tuple[train.Config, VideoLM, VideoLM, list[dict]]:
    """(settings, policy, reference, held-out samples) of a run; ValueError or OSError where there is none."""
    if not (folder / "config.json").exists() or not (folder / "final").exists():
        raise ValueError(f"{folder}: no finished run (config.json and final/) in it; train one first, torchrun train.py, or name "
                         "another with --run")
    saved = read_json(folder / "config.json")
    config = fill(train.Config, saved)
    start = folder / "warm_start" if config.sft_steps else config.model or folder / "initial"  # what GRPO was held to
    _, held_out, missing = samples_of(folder, saved)
    if not held_out:
        raise ValueError(missing or f"{folder}: the run has no held-out samples (--eval_data of train.py)")
    return config, VideoLM.load(str(folder / "final")), VideoLM.load(str(start)), held_out


def answers(policy: VideoLM, config: train.Config, samples: list[dict], group_size: int, seed: int) -> list[Group]:
    """Completions of each sample, sampled as in training."""
    settings = VideoSettings(config.fps, config.max_frames, config.total_pixels, config.min_pixels)
    with VideoLoader(settings, num_workers=0) as loader:
        prompts, problems = load_prompts(policy, loader, samples, config.prompt, config.max_prompt_tokens)
    if problems:
        raise next(iter(problems.values()))
    return rollout(policy, prompts, partial(rewards.score, mix=config.reward), group_size=group_size,
                   max_new_tokens=config.max_new_tokens, temperature=config.temperature,
                   seeds=[sampling_seed(seed, -1, sample["id"]) for sample in samples])


def distributions(model: VideoLM, group: Group, temperature: float) -> Tensor:
    """(G, C, W): log-probabilities of all words where `grpo.score_groups` has that of the sampled token alone, in float64."""
    tokens, (G, C) = group.tokens, group.tokens.shape
    with torch.no_grad():
        videos = model.encode_prompts([group.prompt])
        (embeds,), (fed,) = model.embed_groups([group.prompt.ids], videos, [tokens])
    P = embeds.shape[1]
    after = group.prompt.positions.max() + 1 + torch.arange(C - 1)
    positions = torch.cat([group.prompt.positions, after.repeat(G).expand(3, -1)], dim=1)
    row = torch.cat([embeds, fed.reshape(1, G * (C - 1), -1)], dim=1)  # one row: the prompt, then each completion
    hidden = model._layers(row, positions, PackedAttention([(P, G, C - 1)]).of)[0]
    states = torch.cat([hidden[P - 1].expand(G, 1, -1), hidden[P:].view(G, C - 1, -1)], dim=1)  # (G, C, D)
    return model._log_softmax(states, temperature).double()


# ---- the measurement ------------------------------------------------------------------------------------------------


def measure(policy: VideoLM, reference: VideoLM, groups: list[Group], temperature: float) -> dict:
    """Both tables, means over all tokens of all completions. Gradients are those of the parameters of the last decoder layer."""
    policy.hf.requires_grad_(False)
    parameters = [p.requires_grad_() for p in policy.text.layers[-1].parameters()]
    allowed = ~policy.is_banned  # a banned word has p = 0 in both, and log p - log ref = nan
    values: list[tuple[Tensor, ...]] = []
    gradients: dict[str, dict[str, Tensor]] = {"expected": {}, "sampled": {}}
    for group in groups:
        with torch.no_grad():
            ref = distributions(reference, group, temperature)[group.mask]
        every = distributions(policy, group, temperature)[group.mask]  # (N, W)
        chosen = group.tokens[group.mask][:, None]
        terms = loss_terms(every.gather(1, chosen)[:, 0], ref.gather(1, chosen)[:, 0])  # (N,) each
        every, ref = every[:, allowed], ref[:, allowed]
        expected = in_expectation(loss_terms(every, ref), every)
        expected |= {TOWARDS: exact_kl(every, ref), BACK: exact_kl(ref, every)}
        values.append((*(torch.stack([by[f"{kind} as a loss"] for kind in KINDS]).detach() for by in (terms, expected)),
                       expected[TOWARDS].detach()))
        for which, losses in (("expected", expected), ("sampled", terms)):
            for name, loss in losses.items():
                parts = torch.autograd.grad(loss.sum(), parameters, retain_graph=True)
                gradient = torch.cat([part.flatten() for part in parts]).double()
                gradients[which][name] = gradients[which].get(name, 0) + gradient
    sampled, means, exact = (torch.cat(parts, dim=-1) for parts in zip(*values))  # (3, N), (3, N), (N,)
    return {"tokens": len(exact), "completions": sum(len(group.tokens) for group in groups),
            "parameters": sum(p.numel() for p in parameters),
            "values": value_rows(dict(zip(KINDS, sampled)), dict(zip(KINDS, means)), exact),
            "gradients": gradient_rows(gradients["expected"], gradients["sampled"])}


# ---- what is printed ------------------------------------------------------------------------------------------------

EXPLANATION = f"""\
Values. `in expectation` sums over the vocabulary at the same prefixes, so it has no noise: k1 and k3 are off by 0 there, k2 is
biased. What the sample is off by beyond that is noise, and the standard error says how much of it to expect.

Gradients. Lengths and errors are shares of the length of grad {TOWARDS}, `cosine` is to it and `cosine back` to
grad {BACK}. As a loss k1 is 0 in expectation, and a sample of it is noise. k2 as a loss, k1 in the reward and rho k3 are
the same for every token, and in expectation grad {TOWARDS}. k3 as a loss is grad {BACK}: close to the other only
where the policy is close to its reference."""


def print_tables(found: dict) -> None:
    print(f"{found['tokens']:,} tokens of {found['completions']} completions; nats per token\n")
    print(f"{'value':18}{'mean':>10}{'std':>10}{'negative':>10}{'off exact':>12}{'std error':>11}{'in expectation':>16}")
    for name, row in found["values"].items():
        line = f"{name:18}{row['mean']:10.4f}{row['std']:10.4f}"
        if name != "exact":
            line += f"{row['negative']:10.1%}{row['off']:+12.4f}{row['standard_error']:11.4f}{row['bias']:+16.6f}"
        print(line)
    print(f"\ngradient of the last decoder layer, {found['parameters']:,} parameters\n"
          f"{'':18}{'in expectation':>38}   {'of the sampled tokens':>30}\n"
          f"{'':18}{'length':>10}{'cosine':>12}{'cosine back':>16}   {'length':>10}{'cosine':>10}{'error':>10}")
    for name, row in found["gradients"].items():
        cells = {key: "-" if value is None else f"{value:.4f}" for key, value in row.items()}
        line = f"{name:18}{cells['norm']:>10}{cells['cosine']:>12}{cells['cosine_back']:>16}"
        if "sampled_norm" in row:
            line += f"   {cells['sampled_norm']:>10}{cells['sampled_cosine']:>10}{cells['sampled_error']:>10}"
        print(line)
    print(f"\n{EXPLANATION}")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Estimators of the KL, and their gradients, beside the exact one.")
    parser.add_argument("--run", type=Path, default=Path("runs/toy"), help="folder of a finished run (default: runs/toy)")
    parser.add_argument("--questions", type=number(int, 1, 1000), default=64, help="held-out questions (default: 64)")
    parser.add_argument("--group_size", type=number(int, 1, 1000), default=16, help="completions of each (default: 16)")
    parser.add_argument("--seed", type=number(int, *SEED), default=0, help="of the sampling (default: 0)")
    parser.add_argument("--out", type=Path, help="write the tables as JSON into this file")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    config, policy, reference, held_out = load_run(args.run)
    samples = held_out[::max(len(held_out) // args.questions, 1)][:args.questions]
    train.choose_threads(World(0, 1, policy.device), str(args.run / "final"))
    groups = answers(policy, config, samples, args.group_size, args.seed)
    found = {"run": str(args.run), "questions": len(samples), "group_size": args.group_size, "seed": args.seed,
             **measure(policy, reference, groups, config.temperature)}
    print_tables(found)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.out, found)


if __name__ == "__main__":
    with errors_in_one_sentence():
        main()
