"""Steps on fixed groups, alone and replicated, or sharded over several processes: for test_sharding.py and
test_checkpoints.py.

Every case says which of the groups each of two ranks has. One process has them all; the weights must come out the same.
"""

import functools
import resource
from contextlib import nullcontext
from pathlib import Path

import torch
from conftest import ALONE, make_prompts
from processes import run_ranks
from torch.utils._python_dispatch import TorchDispatchMode

import rewards
import train
from grpo import Group, accumulate_gradients, grpo_loss, rollout
from lib.checkpoints import load_checkpoint, newest_checkpoint, save_checkpoint, training_state
from lib.distributed import World, start, stop
from lib.run import logp_gaps, means_of_sums
from lib.sharding import Sharding
from model import VideoLM

VIDEO, OTHER_VIDEO, TEXT = 0, 1, 2  # which of conftest's prompts
TARGET = 0  # as the length of a completion: the sample's target, as in the warm start
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
    "imitation, frozen vision, one rank has text only": ([(TEXT, TARGET)], [(VIDEO, TARGET), (OTHER_VIDEO, TARGET)]),
    "imitation, frozen vision, one rank has nothing": ([], [(VIDEO, TARGET)]),
}
LAST = list(CASES)[-1]
CONFIG = train.Config(weight_decay=0.1)
LOSS = functools.partial(grpo_loss, beta=0.04, clip_low=0.2, clip_high=0.2, norm="sequence")


class CollectiveCalls(TorchDispatchMode):
    """What the code inside sends to other processes, by name, in order: all ranks must call the same."""

    def __init__(self):
        super().__init__()
        self.made: list[str] = []

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        if function.namespace == "c10d":
            self.made.append(str(function))
        return function(*arguments, **(named or {}))


def make_groups(model: VideoLM, wanted: list[tuple[int, int]]) -> list[Group]:
    """Completions sampled from the policy itself, with advantages that are not all of one sign; or targets."""
    prompts, groups = make_prompts(model), []
    for which, longest in wanted:
        if longest == TARGET:
            groups.append(train.imitation_group(model, prompts[which], "answer"))
            continue
        (group,) = rollout(model, [prompts[which]], rewards.score, group_size=4, max_new_tokens=longest, temperature=1.0,
                           seeds=[longest])
        group.advantages = torch.tensor([1.0, -0.5, 0.25, -1.5], device=group.tokens.device)
        groups.append(group)
    return groups


def take_step(world: World, model: VideoLM, reference: VideoLM, optimizer, case: str) -> dict[str, float]:
    """One step of `case`: what is logged of it."""
    shares = CASES[case]
    wanted = [*shares, [], []][world.rank] if world.size > 1 else shares[0] + shares[1]  # of four, two have nothing
    is_imitation = case.startswith("imitation")
    model.visual.requires_grad_("frozen vision" not in case)
    world.phase(case)
    with model.gathered():  # ranks run different numbers of passes in here
        groups = make_groups(model, wanted)
    loss, held_to = (train.SFT_LOSS, None) if is_imitation else (LOSS, reference)
    # Alone nobody listens, and torch cannot make the mask of a GPU's attention while somebody does.
    calls = CollectiveCalls()
    with calls if world.size > 1 else nullcontext():
        stats = accumulate_gradients(model, held_to, groups, loss, 16.0)
    on_all = world.all_gather([calls.made])
    assert all(made == calls.made for made in on_all), f"{case}: {on_all}"
    assert world.size == 1 or (len(calls.made) > 5) == any(shares)  # beside the one that compares the shares
    norm = train.optimizer_step(optimizer, world, lr=1e-3, max_norm=0.5)
    gaps = {} if is_imitation else logp_gaps(world, groups)
    return {"norm": norm, **means_of_sums(world, stats), **gaps}


def weights_of(model: VideoLM) -> dict[str, torch.Tensor]:
    """On all ranks together; {} on all but the first."""
    whole = model.full_weights() if model.sharding else {name: p.detach() for name, p in model.hf.named_parameters()}
    return {name: weight.clone() for name, weight in whole.items()}


def load_both(world: World, folder: str | Path, shard: bool, offload: bool = False) -> tuple:
    """Policy, reference and optimiser. A pass takes one question, so that the ranks' numbers of passes differ."""
    models = [VideoLM.load(str(folder), world.device), VideoLM.load(str(folder), world.device)]
    for model in models:
        model.pack_tokens = 1
        if shard:
            model.checkpoint_activations()  # what is recomputed is gathered too
            model.sharding = Sharding(world, model, offload=offload)
    models[1].hf.requires_grad_(False)
    return *models, train.make_optimizer(CONFIG, models[0], lr=1e-3)


def take_steps(world: World, folder: str | Path, shard: bool, offload: bool = False, cases=tuple(CASES)) -> tuple:
    """(per case: what was logged and the weights behind it), policy, reference, optimiser."""
    model, reference, optimizer = load_both(world, folder, shard, offload)
    results = {}
    for case in cases:
        results[case] = (take_step(world, model, reference, optimizer, case), weights_of(model))
    return results, model, reference, optimizer


@functools.cache
def alone(folder: Path) -> tuple:
    """The steps in this process, replicated: what everything else is compared with."""
    return take_steps(ALONE, folder, shard=False)


@functools.cache
def sharded(folder: Path, processes: int = 2) -> tuple[Path, dict]:
    """A folder with checkpoints, and what so many sharded processes found; before, `alone` has left them a checkpoint."""
    out = folder.with_name(f"{folder.name}-sharded-{processes}")
    _, model, _, optimizer = alone(folder)
    save_checkpoint(ALONE, out / "alone", training_state(model, optimizer, cursor=3))
    run_ranks(out / "log", processes, be_a_rank, folder, out)
    return out, torch.load(out / "results.pt")


def be_a_rank(folder: Path, out: Path) -> None:
    """What each of them does."""
    world = start("cpu", wait_minutes=0.3)
    results, model, reference, optimizer = take_steps(world, folder, shard=True)
    state = training_state(model, optimizer, cursor=7, seconds=1.25)
    save_checkpoint(world, out / "checkpoint-1-grpo-000008", state)
    told = world.all_gather([fail_to_save(world, out, state)])
    newest = newest_checkpoint(out).name
    again = (take_step(world, model, reference, optimizer, "both have work"), weights_of(model))

    read, _, optimizer = load_both(world, folder, shard=True)
    counters = load_checkpoint(out / "alone", read, optimizer, cursor=0)
    read = (counters, weights_of(read), len(optimizer.state))
    if world.is_first:
        torch.save({"results": results, "again": again, "told": told, "newest": newest, "read": read}, out / "results.pt")
    stop(world)


def fail_to_save(world: World, out: Path, state: dict) -> str:
    """The disk of the last rank is full: what it is told."""
    if world.rank == world.size - 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    try:
        save_checkpoint(world, out / "checkpoint-1-grpo-000009", state)
        told = "nothing"
    except OSError as error:
        told = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return told


def distance(a: dict, b: dict) -> float:
    """Between two sets of weights: that of the number that differs most."""
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).detach().abs().max()) for name in a)
