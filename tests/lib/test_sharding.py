"""A model that is dealt out over processes takes the steps of one that is whole, and no rank waits for ever."""

import dataclasses

import pytest
import shard_steps
import torch
from conftest import ALONE, make_prompts
from shard_steps import distance

import train
from grpo import idle_group
from lib.distributed import World, stop
from lib.sharding import Sharding, worth_sharding
from model import VideoLM


@pytest.fixture(scope="module")
def alone(model_folder):
    return shard_steps.alone(model_folder)


@pytest.fixture(scope="module")
def sharded(model_folder):
    return shard_steps.sharded(model_folder)[1]


# --- the same steps, alone and sharded over two processes -------------------------------------------------------------


@pytest.mark.parametrize("case", shard_steps.CASES)
def test_a_sharded_step_is_the_step_of_one_process(alone, sharded, case):
    """In every case but the first, a rank that makes only the calls of its own share hangs all, or sums wrong parts.

    A mean over ranks in place of the sum, or the norm of one shard, changes the weights; zeros where nobody has a
    gradient (a vision tower in a step of text) let momentum change them. In imitation nothing was sampled, so that even a
    frozen tower has to be passed, by all ranks if by any.
    """
    (logged, weights), (expected, expected_weights) = sharded["results"][case], alone[0][case]
    assert logged == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert distance(weights, expected_weights) < 1e-5
    if case == "all groups of both are dropped":
        assert logged["norm"] == 0
    else:
        assert logged["norm"] > 0.05


def test_the_steps_compared_above_did_something(alone, model_folder):
    """And what should stand still does: weights without an update are equal in any two programs."""
    behind = [weights for _, weights in alone[0].values()]
    start = dict(VideoLM.load(str(model_folder)).hf.named_parameters())
    for case, before, after in zip(alone[0], [start, *behind], behind):
        moved = {name for name in after if not torch.equal(before[name], after[name])}
        assert bool(moved) == (case != "all groups of both are dropped")
        sees = moved and case != "nobody has a video" and "frozen vision" not in case
        assert any(".visual." in name for name in moved) == bool(sees)


class TwoRanks:
    """As one of two ranks sees them, where the other has as many packs as it says."""

    size = 2

    def __init__(self, *others):
        self.others = others

    def all_reduce_max(self, *numbers):
        return [float(max(pair)) for pair in zip(numbers, self.others)]


@pytest.mark.parametrize("mine, others, expected", [
    ([["video"]], (1, True), [["video"]]),
    ([["text"]], (1, False), [["text"]]),
    ([["text"]], (1, True), [["text", "idle video"]]),
    ([["text"], ["video"]], (2, False), [["text", "idle video"], ["video"]]),
    ([], (2, True), [["idle video"], ["idle video"]]),
    ([], (1, False), [["idle text"]]),
    ([["encoded"]], (1, False), [["encoded"]]),  # frozen, and kept from sampling: nobody needs the tower
    ([["encoded"]], (1, True), [["encoded", "idle video"]]),
    ([], (0, False), [])])
def test_idle_groups_make_up_for_what_a_rank_does_not_have(model, mine, others, expected):
    """As many passes on all ranks, and through the tower in each of them if in any. Whether a group needs the tower is not
    whether it has a video: one of imitation does, even where the tower is frozen."""
    prompts = make_prompts(model)
    group_of = {"video": train.imitation_group(model, prompts[0], "answer"),
                "text": train.imitation_group(model, prompts[2], "answer")}
    group_of["encoded"] = dataclasses.replace(group_of["video"], video=torch.zeros(1))
    sharding = Sharding.__new__(Sharding)  # without FSDP, which needs processes
    sharding.world, sharding.placeholder, sharding.end = TwoRanks(*others), model.video_token_id, 0
    sharding.patch_width = prompts[0].patches.shape[1]
    packs = [[group_of[name] for name in pack] for pack in mine]
    names = {id(group): name for name, group in group_of.items()}
    found = [[names.get(id(group)) or ("idle video" if group.needs_tower else "idle text") for group in pack]
             for pack in sharding.equalise_passes(packs, lambda prompt: idle_group(model, prompt))]
    assert found == expected
    assert [len(pack) for pack in packs] == [len(pack) for pack in mine]  # the caller's own lists stay


def test_a_sharded_qwen3_takes_the_same_steps(qwen3_folder):
    """The mergers of deepstack lie between the blocks of the tower, and are used inside its forward pass: they are gathered
    with what lies between the layers, or their gradients are lost."""
    cases = list(shard_steps.CASES)[:2]
    expected = shard_steps.take_steps(ALONE, qwen3_folder, shard=False, cases=cases)[0]
    try:
        found = shard_steps.take_steps(ALONE, qwen3_folder, shard=True, offload=True, cases=cases)[0]
    finally:
        stop(ALONE)
    for case, (logged, weights) in found.items():
        assert logged == pytest.approx(expected[case][0], rel=1e-4, abs=1e-5)
        assert distance(weights, expected[case][1]) < 1e-5


@pytest.mark.slow
def test_four_sharded_processes_take_the_same_steps(alone, model_folder):
    """Two of the four have nothing at all to do."""
    found = shard_steps.sharded(model_folder, processes=4)[1]["results"]
    for case, (expected, weights) in alone[0].items():
        assert found[case][0] == pytest.approx(expected, rel=1e-4, abs=1e-5)
        assert distance(found[case][1], weights) < 1e-5


def test_offloaded_steps_are_the_same_steps_and_leave_a_hugging_face_folder(alone, model_folder, tmp_path):
    """One process, as on a single GPU whose memory is too small for the optimiser. final/ holds whole weights under their
    original names, tied ones once, and the architecture's own name."""
    try:
        results, model, *_ = shard_steps.take_steps(ALONE, model_folder, shard=True, offload=True,
                                                    cases=list(shard_steps.CASES)[:2])
        model.save(tmp_path / "final", model.full_weights())
    finally:
        stop(ALONE)
    for case, (logged, weights) in results.items():
        assert logged == pytest.approx(alone[0][case][0], rel=1e-4, abs=1e-5)
        assert distance(weights, alone[0][case][1]) < 1e-5
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "final" / file).exists()
    assert "FSDP" not in (tmp_path / "final" / "config.json").read_text()
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (tmp_path / "final", model_folder)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.01)
    saved = dict(VideoLM.load(str(tmp_path / "final")).hf.named_parameters())
    assert distance(saved, results[case][1]) == 0


# --- on a GPU ---------------------------------------------------------------------------------------------------------


def updates(results: dict, folder) -> dict[str, torch.Tensor]:
    """How far all weights have moved until the end of each case, as one vector on the CPU."""
    start = VideoLM.load(str(folder)).hf.requires_grad_(False)
    start = dict(start.named_parameters())
    return {case: torch.cat([(weights[name].cpu() - start[name]).flatten() for name in start])
            for case, (_, weights) in results.items()}


@pytest.fixture
def same_groups(monkeypatch):
    """Steps on a GPU differ by rounding, and one token that rounding has chosen makes another step: whoever comes first
    samples, the others score the same completions."""
    kept, make = {}, shard_steps.make_groups

    def make_or_remember(model, wanted):
        if str(wanted) not in kept:
            kept[str(wanted)] = make(model, wanted)
        return [dataclasses.replace(group, old_logps=None) for group in kept[str(wanted)]]

    monkeypatch.setattr(shard_steps, "make_groups", make_or_remember)


@pytest.mark.gpu
@pytest.mark.parametrize("offload", [False, True])
def test_steps_of_one_gpu_are_the_same_with_shards_and_without(model_folder, gpu, offload, same_groups):
    """NCCL, gathering in bfloat16, shards in pinned memory: none of it exists on a CPU. Weights are rounded before they
    are gathered, and where a gradient is near zero AdamW steps to either side: steps agree in direction and length."""
    here, cases = World(0, 1, torch.device(gpu, 0)), list(shard_steps.CASES)[:2]
    expected = shard_steps.take_steps(here, model_folder, shard=False, cases=cases)[0]
    try:
        found = shard_steps.take_steps(here, model_folder, shard=True, offload=offload, cases=cases)[0]
    finally:
        stop(here)
    ours, theirs = updates(found, model_folder), updates(expected, model_folder)
    for case in cases:
        (logged, _), (wanted, _) = found[case], expected[case]
        assert logged["norm"] == pytest.approx(wanted["norm"], rel=0.2) and wanted["norm"] > 0.05
        assert logged["loss"] == pytest.approx(wanted["loss"], abs=0.05) and logged["logp_gap_mean"] < 0.05
        assert torch.cosine_similarity(ours[case], theirs[case], dim=0) > 0.8
        assert float(ours[case].norm()) == pytest.approx(float(theirs[case].norm()), rel=0.1)


# --- whether to shard -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice, offload, size, expected", [("on", False, 1, True), ("off", False, 8, False),
                                                             ("auto", True, 1, True), ("auto", False, 8, False)])
def test_sharding_is_chosen_by_flag_and_never_automatic_on_cpus(choice, offload, size, expected):
    assert worth_sharding(choice, offload, World(0, size, torch.device("cpu")), 10**12) is expected


@pytest.mark.parametrize("size, gigabytes, billions, expected", [(8, 80, 3.75, True), (8, 141, 3.75, False),
                                                                 (8, 141, 8.3, True), (1, 80, 8.3, False)])
def test_sharding_is_automatic_where_the_weights_fill_half_a_gpu(monkeypatch, size, gigabytes, billions, expected):
    """On one GPU there is nobody to share with; where everything fits, gathering only costs time."""
    class Properties:
        total_memory = gigabytes * 2**30

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    gpus = World(0, size, torch.device("cuda:0"))
    assert worth_sharding("auto", False, gpus, int(billions * 1e9)) is expected
