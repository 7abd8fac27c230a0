"""A rehearsal of a training run (`train.py --dry_run`): will it fit, and how long will it take?

One step of the warm start and one of GRPO, as large as they get: on the longest prompts of the data, with completions of full
length. Nothing is left behind.
"""

import math
import sys
from itertools import islice

import torch
from tqdm import tqdm

from data import build_prompt
from grpo import accumulate_gradients
from lib.distributed import World
from lib.memory import message
from lib.questions import load_prompts, number_of_steps, order_of
from lib.run import Clock, Run
from lib.samples import files_of
from model import VideoLM
from train import (
    NOTHING_READABLE,
    SFT_LOSS,
    Config,
    check_target_lengths,
    imitation_group,
    load_model,
    load_reference,
    loss_of,
    make_optimizer,
    make_questions,
    optimizer_step,
    sample_groups,
    size_of,
)

CANDIDATES = 64  # videos that are decoded in search of the longest prompts


def dry_run(run: Run, initial: str, samples: list[dict], held_out: list[dict], score) -> dict:
    """A step of the warm start and one of GRPO on the longest prompts, with completions of full length. Prints and
    returns tokens, peak bytes, seconds of a step and of the run: an upper bound, as no step of the run does more."""
    config, world = run.config, run.world
    model = load_model(config, world, initial)
    model.eos_ids = model.banned_ids[:1]  # never sampled: nothing ends a completion before its limit
    clock = run.clock = Clock(world, "dry run")
    try:
        clock("decode")
        longest = longest_prompts(run, model, samples, max(config.questions, config.sft_questions))
        if config.sft_steps:
            clock("sft")
            check_target_lengths(config, model, samples)
            dry_sft_step(run, model, [sample for _, sample in longest[: config.sft_questions]])
        if config.steps:
            dry_grpo_step(run, model, initial, [sample for _, sample in longest[: config.questions]], score)
        clock.stop()
    except torch.OutOfMemoryError as error:
        raise SystemExit(f"the run does not fit, in phase {clock.phase!r}: {message(error, world.device)}\n"
                         "--gradient_checkpointing, --lora_rank and --shard on save most") from None
    clock.seconds["decode"] /= min(len(samples), max(CANDIDATES, config.questions, config.sft_questions))  # a video
    cost = dict(zip(clock.seconds, world.all_reduce_max(*clock.seconds.values())))
    (peak,) = world.all_reduce_max(peak_memory(world.device))
    result = {"tokens": [tokens for tokens, _ in longest], "peak_bytes": peak, "seconds": cost,
              "run": predict_seconds(config, cost, samples, held_out)}
    if world.is_first:
        print_dry_run(config, world, result)
    return result


def longest_prompts(run: Run, model: VideoLM, samples: list[dict], count: int) -> list[tuple[int, dict]]:
    """(tokens, sample) of the `count` longest prompts, longest first, among the candidates that promise most.

    How many tokens a video has is known once it is open; until then its seconds and the text must do. A sample that
    does not say how long its video is may be the longest of all, and goes first. As many with pictures are tried, those
    with the most of them."""

    def promise(sample: dict) -> tuple[float, int]:
        text = len(str(build_prompt(sample, run.config.prompt)))
        if "video" not in sample:
            return float(len(files_of(sample))), text
        whole = sample.get("duration", math.inf)
        return sample.get("end", whole) - sample.get("start", 0.0), text

    shuffled = islice(order_of(samples, run.config.seed), len(samples))  # where nothing is known, a fair draw
    ordered = sorted(shuffled, key=promise, reverse=True)
    candidates = [sample for kind in (False, True)
                  for sample in [s for s in ordered if ("image" in s) is kind][: max(CANDIDATES, count)]]
    mine, found = run.world.share(list(enumerate(candidates))), []
    bar = tqdm(mine, "looking for long prompts", unit="video", disable=not run.world.is_first, leave=False)
    for i, (place, sample) in enumerate(bar):
        run.world.phase(f"dry run: prompt {i + 1}")
        for _, coming in mine[i: i + 9]:
            run.loader.submit(coming)
        (prompt,), _ = load_prompts(model, run.loader, [sample], run.config.prompt, run.config.max_prompt_tokens)
        if prompt is not None:
            found.append((len(prompt.ids), place))
    found = sorted(run.world.all_gather(found), key=lambda pair: (-pair[0], pair[1]))[:count]
    if not found:
        raise SystemExit(NOTHING_READABLE)
    return [(tokens, candidates[place]) for tokens, place in found]


def used_optimizer(config: Config, model: VideoLM) -> torch.optim.AdamW:
    """With moments, as from the second step on: a first step learns without them and needs 8 bytes a parameter less."""
    optimizer = make_optimizer(config, model, 0.0)
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return optimizer


def dry_sft_step(run: Run, model: VideoLM, samples: list[dict]) -> None:
    config = run.config
    optimizer = used_optimizer(config, model)
    batch = make_questions(run, model, samples, config.seed).next(config.sft_questions)
    groups = [imitation_group(model, prompt, config.prompt) for prompt in batch.prompts]
    (tokens,) = run.world.all_reduce_sum(size_of(groups, "token"))
    accumulate_gradients(model, None, groups, SFT_LOSS, max(tokens, 1))
    optimizer_step(optimizer, run.world, config.sft_lr)


def dry_grpo_step(run: Run, model: VideoLM, initial: str, samples: list[dict], score) -> None:
    """As in `train_grpo`, but every group is trained on: cut completions all score alike, and without a gradient
    AdamW would not even make room for its moments."""
    config, world, clock = run.config, run.world, run.clock
    reference = load_reference(config, world, model, initial)
    optimizer = used_optimizer(config, model)
    sampled = sample_groups(run, model, make_questions(run, model, samples, config.seed), score, step=0)
    for group in sampled.groups:
        group.advantages = torch.linspace(-1, 1, len(group.texts), device=group.tokens.device)  # (G,)
    (denominator,) = world.all_reduce_sum(size_of(sampled.groups, "sequence"))
    for _ in range(config.inner_steps):
        clock("score")
        accumulate_gradients(model, reference, sampled.groups, loss_of(config), max(denominator, 1),
                             temperature=config.temperature, with_entropy=config.entropy_bonus > 0)
        clock("step")
        optimizer_step(optimizer, world, config.lr)
    clock.stop()


def peak_memory(device: torch.device) -> int:
    """Bytes: allocated on the GPU, else resident in this process (loading and Python included)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def predict_seconds(config: Config, cost: dict[str, float], samples: list[dict], held_out: list[dict]) -> dict:
    """Seconds of each stage of the run, given those of one step by phase and of decoding one video.

    Videos are decoded while the model works, so the slower of the two counts. Loading and saving models is not in it;
    without a GRPO step nothing was sampled, and evaluation is not in it either."""
    sft_steps = number_of_steps(config.sft_steps, samples, config.sft_questions)
    steps = number_of_steps(config.steps, samples, config.questions)
    a_step = sum(cost.get(name, 0.0) for name in ("wait", "sample", "score", "step"))
    a_step = max(a_step, config.questions * cost["decode"])
    asking = (cost["wait"] + cost["sample"]) / config.questions if "sample" in cost else 0.0  # a group of one question
    asking = max(asking, cost["decode"])
    evaluations = 1 + bool(sft_steps) + bool(steps)
    evaluations += steps // config.eval_every if config.eval_every else 0
    return {"warm start": sft_steps * max(cost.get("sft", 0.0), config.sft_questions * cost["decode"]),
            "selection": len(samples) * asking * max(1.0, config.select_k / config.group_size) * bool(config.select_k),
            "GRPO": steps * a_step, "evaluation": evaluations * len(held_out) * asking}


def print_dry_run(config: Config, world: World, result: dict) -> None:
    tokens, cost, stages = result["tokens"], result["seconds"], result["run"]
    memory, where = result["peak_bytes"] / 1e9, "resident in a process"
    if world.device.type == "cuda":
        where = f"allocated, of {torch.cuda.get_device_properties(world.device).total_memory / 1e9:.1f} GB on the GPU"
    print(f"\ndry run: prompts of {tokens[-1]} to {tokens[0]} tokens, {config.group_size} completions of "
          f"{config.max_new_tokens} each")
    print(f"peak memory: {memory:.2f} GB {where}")
    print("seconds: " + ", ".join(f"{name} {value:.2f}" for name, value in cost.items()) + " (decode: a video)")
    print("the run, at most: " + ", ".join(f"{name} {value / 3600:.2f} h" for name, value in stages.items() if value)
          + f"; in all {sum(stages.values()) / 3600:.2f} h")
