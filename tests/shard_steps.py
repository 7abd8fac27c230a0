"""Steps of GRPO on fixed groups, for test_distributed.py: alone and replicated, or by torchrun on several sharded processes.

    torchrun --nproc_per_node=2 tests/shard_steps.py MODEL OUT

Every case says which of the groups each of two ranks has. One process has them all; the weights must come out the same.
"""

import resource
import sys
from pathlib import Path

import torch
from conftest import make_prompts

import train
from grpo import accumulate_gradients, rollout
from lib import distributed as scale
from model import VideoLM

VIDEO, OTHER_VIDEO, TEXT = 0, 1, 2  # which of conftest's prompts
# name: (groups of rank 0, groups of rank 1), a group as (prompt, most tokens of a completion)
CASES = {
    "both have work": ([(VIDEO, 12), (OTHER_VIDEO, 12)], [(OTHER_VIDEO, 12), (TEXT, 12)]),
    "one video is unreadable": ([(VIDEO, 12)], [(VIDEO, 9), (OTHER_VIDEO, 12), (TEXT, 5)]),
    "all groups of one rank are dropped": ([], [(VIDEO, 12), (TEXT, 12)]),
    "one rank has text only": ([(TEXT, 12), (TEXT, 7)], [(VIDEO, 12)]),
    "nobody has a video": ([(TEXT, 12)], [(TEXT, 7), (TEXT, 5)]),
    "completions of one token": ([(VIDEO, 1), (TEXT, 1)], [(OTHER_VIDEO, 12)]),
    "all groups of both are dropped": ([], []),
    "frozen vision": ([(TEXT, 12)], [(VIDEO, 12), (OTHER_VIDEO, 12)]),
}
CONFIG = train.Config(max_grad_norm=0.5, weight_decay=0.1)


def make_groups(model: VideoLM, wanted: list[tuple[int, int]]) -> list:
    """Completions sampled from the policy itself, with advantages that are not all of one sign."""
    prompts, groups = make_prompts(model), []
    for which, longest in wanted:
        (group,) = rollout(model, [prompts[which]], group_size=4, max_new_tokens=longest, temperature=1.0,
                           seeds=[longest])
        group.advantages = torch.tensor([1.0, -0.5, 0.25, -1.5], device=group.tokens.device)
        groups.append(group)
    return groups


def take_step(world: scale.World, model: VideoLM, reference: VideoLM, optimizer, case: str) -> dict[str, float]:
    """One step of `case`: what is logged of it."""
    shares = CASES[case]
    wanted = [*shares, [], []][world.rank] if world.size > 1 else shares[0] + shares[1]  # of four, two have nothing
    frozen = case == "frozen vision"
    model.visual.requires_grad_(not frozen)
    world.phase(case)
    with scale.gathered(world, model):  # ranks run different numbers of passes in here
        groups = make_groups(model, wanted)
    with world.waiting():
        sums = accumulate_gradients(model, reference, groups, temperature=1.0, beta=0.04, clip_low=0.2, clip_high=0.2,
                                    norm="sequence", denominator=16.0, reuse_video=frozen)
    norm = train.optimizer_step(CONFIG, world, optimizer, lr=1e-3)
    return {"norm": norm, **train.mean_sums(world, sums)}


def weights_of(world: scale.World, model: VideoLM) -> dict[str, torch.Tensor]:
    whole = scale.full_weights(world, model)
    whole = {name: p.detach() for name, p in model.hf.named_parameters()} if whole is None else whole
    return {name: weight.clone() for name, weight in whole.items()}


def load_both(world: scale.World, folder: str, shard: bool, offload: bool = False) -> tuple:
    """Policy, reference and optimiser. A pass takes one question, so that the ranks' numbers of passes differ."""
    models = [VideoLM.load(folder, world.device), VideoLM.load(folder, world.device)]
    for model in models:
        model.pack_tokens = 1
        if shard:
            model.hf.gradient_checkpointing_enable({"use_reentrant": False})  # what is recomputed is gathered too
            scale.shard(world, model, offload=offload)
    models[1].hf.requires_grad_(False)
    return *models, train.make_optimizer(CONFIG, models[0], lr=1e-3)


def take_steps(world: scale.World, folder: str, shard: bool, offload: bool = False, cases=tuple(CASES)) -> tuple:
    """(per case: what was logged and the weights behind it), policy, reference, optimiser."""
    model, reference, optimizer = load_both(world, folder, shard, offload)
    results = {}
    for case in cases:
        results[case] = (take_step(world, model, reference, optimizer, case), weights_of(world, model))
    return results, model, reference, optimizer


def fail_to_save(world: scale.World, out: Path, state: dict) -> str:
    """The disk of the last rank is full: what all ranks are told, and what the newest checkpoint is then."""
    if world.rank == world.size - 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    try:
        scale.save_checkpoint(world, out / "checkpoint-1-grpo-000009", state)
        told = "nothing"
    except OSError as error:
        told = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return told


def main(folder: str, out: Path) -> None:
    world = scale.start("cpu", wait_minutes=0.3)
    weight, unused = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(1))
    if world.is_first:  # the others' groups were all dropped: no gradient at all
        (weight * torch.tensor([1.0, 2.0])).sum().backward()
    scale.sum_gradients(world, [weight, unused])
    numbers = {"total": scale.total(world, [1.0, world.rank]), "largest": scale.largest(world, [world.rank, -1.0]),
               "gather": scale.gather(world, world.share(["a", "b", "c"])), "gradient": weight.grad.tolist(),
               "unused": unused.grad}

    results, model, reference, optimizer = take_steps(world, folder, shard=True)
    state = scale.training_state(model, optimizer, cursor=7, seconds=1.25)
    scale.save_checkpoint(world, out / "checkpoint-1-grpo-000008", state)
    told = scale.gather(world, [fail_to_save(world, out, state)])
    newest = scale.newest_checkpoint(out).name
    again = (take_step(world, model, reference, optimizer, "both have work"), weights_of(world, model))

    read, _, optimizer = load_both(world, folder, shard=True)
    counters = scale.load_checkpoint(out / "alone", read, optimizer, cursor=0)
    read = (counters, weights_of(world, read), len(optimizer.state))
    if world.is_first:
        found = {"numbers": numbers, "results": results, "again": again, "told": told, "newest": newest, "read": read}
        torch.save(found, out / "results.pt")
    everybody = scale.gather(world, [numbers])
    assert all(other == numbers for other in everybody), everybody
    scale.stop()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
