"""Many processes and many checkpoints: nothing is lost, dealt twice, waited for in vain, or left half written."""

import dataclasses
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import shard_steps
import torch
from conftest import ROOT

from lib import distributed as scale
from model import VideoLM

ALONE = scale.World(0, 1, torch.device("cpu"))
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}


def world(rank, size):
    return scale.World(rank, size, torch.device("cpu"))


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_every_item_goes_to_exactly_one_rank(size):
    """Also with fewer items than ranks: the others get an empty share, not somebody else's item."""
    items = list(range(5))
    assert sorted(x for rank in range(size) for x in world(rank, size).share(items)) == items


# --- the same steps, alone and sharded over two processes -------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(model_folder):
    """The steps of shard_steps in this process, replicated: what everything else is compared with."""
    return shard_steps.take_steps(ALONE, str(model_folder), shard=False)


def run_sharded(model_folder: Path, out: Path, processes: int) -> dict:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
               str(ROOT / "tests" / "shard_steps.py"), str(model_folder), str(out)]
    result = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    return torch.load(out / "results.pt")


@pytest.fixture(scope="module")
def sharded(model_folder, alone, tmp_path_factory):
    """The folder, and what two sharded processes found; before, `alone` has left them a checkpoint."""
    out = tmp_path_factory.mktemp("sharded")
    _, model, _, optimizer = alone
    scale.save_checkpoint(ALONE, out / "alone", scale.training_state(model, optimizer, cursor=3))
    return out, run_sharded(model_folder, out, processes=2)


def distance(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def test_processes_agree_on_sums_although_one_has_nothing(sharded):
    """A rank without groups must make the same calls as the others, or all of them wait for ever."""
    assert sharded[1]["numbers"] == {"total": [2.0, 1.0], "largest": [1.0, -1.0], "gather": ["a", "b", "c"],
                                     "gradient": [1.0, 2.0], "unused": None}


@pytest.mark.parametrize("case", shard_steps.CASES)
def test_a_sharded_step_is_the_step_of_one_process(alone, sharded, case):
    """In every case but the first, a rank that makes only the calls of its own share hangs all, or sums wrong parts.

    A mean over ranks in place of the sum, or the norm of one shard, changes the weights; zeros where nobody has a
    gradient (a vision tower in a step of text) let momentum change them.
    """
    (logged, weights), (expected, expected_weights) = sharded[1]["results"][case], alone[0][case]
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
        vision = {name for name in moved if ".visual." in name}
        assert bool(moved) == (case != "all groups of both are dropped")
        assert bool(vision) == bool(moved) and case not in ("nobody has a video", "frozen vision") or not vision


@pytest.mark.slow
def test_four_sharded_processes_take_the_same_steps(alone, model_folder, tmp_path):
    """Two of the four have nothing at all to do."""
    _, model, _, optimizer = alone
    scale.save_checkpoint(ALONE, tmp_path / "alone", scale.training_state(model, optimizer, cursor=3))
    found = run_sharded(model_folder, tmp_path, processes=4)["results"]
    for case, (expected, weights) in alone[0].items():
        assert found[case][0] == pytest.approx(expected, rel=1e-4, abs=1e-5)
        assert distance(found[case][1], weights) < 1e-5


def test_offloaded_steps_are_the_same_steps(alone, model_folder):
    """One process, as on a single GPU whose memory is too small for the optimiser."""
    try:
        results, model, *_ = shard_steps.take_steps(ALONE, str(model_folder), shard=True, offload=True,
                                                     cases=list(shard_steps.CASES)[:2])
    finally:
        scale.stop()
    for case, (logged, weights) in results.items():
        assert logged == pytest.approx(alone[0][case][0], rel=1e-4, abs=1e-5)
        assert distance(weights, alone[0][case][1]) < 1e-5


def updates(results: dict, folder: Path) -> dict[str, torch.Tensor]:
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
    here, cases = scale.World(0, 1, torch.device(gpu, 0)), list(shard_steps.CASES)[:2]
    expected = shard_steps.take_steps(here, str(model_folder), shard=False, cases=cases)[0]
    try:
        found = shard_steps.take_steps(here, str(model_folder), shard=True, offload=offload, cases=cases)[0]
    finally:
        scale.stop()
    ours, theirs = updates(found, model_folder), updates(expected, model_folder)
    for case in cases:
        (logged, _), (wanted, _) = found[case], expected[case]
        assert logged["norm"] == pytest.approx(wanted["norm"], rel=0.2) and wanted["norm"] > 0.05
        assert logged["loss"] == pytest.approx(wanted["loss"], abs=0.05) and logged["logp_gap_mean"] < 0.05
        assert torch.cosine_similarity(ours[case], theirs[case], dim=0) > 0.8
        assert float(ours[case].norm()) == pytest.approx(float(theirs[case].norm()), rel=0.1)


@pytest.mark.gpu
@pytest.mark.parametrize("shard, offload", [(False, False), (True, False), (True, True)])
def test_a_checkpoint_of_a_gpu_is_read_to_the_last_bit(model_folder, gpu, tmp_path, shard, offload):
    """Weights and both moments, from the card and from pinned memory, and back to where they are needed."""
    here = scale.World(0, 1, torch.device(gpu, 0))
    try:
        _, model, _, optimizer = shard_steps.take_steps(here, str(model_folder), shard, offload,
                                                        cases=list(shard_steps.CASES)[:1])
        expected = scale.training_state(model, optimizer, cursor=7)
        scale.save_checkpoint(here, tmp_path / "checkpoint", expected)
        model, reference, optimizer = shard_steps.load_both(here, str(model_folder), shard, offload)
        assert scale.load_checkpoint(tmp_path / "checkpoint", model, optimizer, cursor=0)["cursor"] == 7
        found = scale.training_state(model, optimizer, cursor=7)
        assert found.keys() == expected.keys() and len(found) > 100
        for name, tensor in expected.items():
            a, b = (getattr(x, "_local_tensor", x) for x in (tensor, found[name]))
            assert torch.equal(torch.as_tensor(a).cpu(), torch.as_tensor(b).cpu()), name
            assert torch.as_tensor(a).device == torch.as_tensor(b).device, name
        logged = shard_steps.take_step(here, model, reference, optimizer, "both have work")
        assert 0 < logged["norm"] < float("inf")  # and goes on
    finally:
        scale.stop()


def test_a_sharded_model_leaves_a_hugging_face_folder(alone, model_folder, tmp_path):
    """final/ holds whole weights under their original names, tied ones once, and the architecture's own name."""
    try:
        model = VideoLM.load(str(model_folder))
        scale.shard(ALONE, model)
        model.save(tmp_path / "final", scale.full_weights(ALONE, model))
    finally:
        scale.stop()
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "final" / file).exists()
    assert "FSDP" not in (tmp_path / "final" / "config.json").read_text()
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (tmp_path / "final", model_folder)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.01)
    a, b = (VideoLM.load(str(folder)).hf.state_dict() for folder in (tmp_path / "final", model_folder))
    assert distance(a, b) == 0


@pytest.mark.parametrize("choice, offload, size, expected", [("on", False, 1, True), ("off", False, 8, False),
                                                             ("auto", True, 1, True), ("auto", False, 8, False)])
def test_sharding_is_chosen_by_flag_and_never_automatic_on_cpus(choice, offload, size, expected):
    assert scale.worth_sharding(choice, offload, world(0, size), 10**12) is expected


@pytest.mark.parametrize("size, gigabytes, billions, expected", [(8, 80, 3.75, True), (8, 141, 3.75, False),
                                                                 (8, 141, 8.3, True), (1, 80, 8.3, False)])
def test_sharding_is_automatic_where_the_weights_fill_half_a_gpu(monkeypatch, size, gigabytes, billions, expected):
    """On one GPU there is nobody to share with; where everything fits, gathering only costs time."""
    class Properties:
        total_memory = gigabytes * 2**30

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    gpus = scale.World(0, size, torch.device("cuda:0"))
    assert scale.worth_sharding("auto", False, gpus, int(billions * 1e9)) is expected


# --- waiting ----------------------------------------------------------------------------------------------------------

STUCK = """
import sys, time, torch
from lib import distributed as scale
world = scale.start("cpu", wait_minutes=1)
world.phase("grpo step 12: sample")
scale.wait_for_all(world)
world.watch.seconds = 2
if world.rank == 1:
    time.sleep(60)
world.phase("grpo step 12: score")
scale.total(world, [1.0])
"""

def start_two(program: str) -> list[subprocess.Popen]:
    """Two processes without an agent that would end one for the other's failure."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    shared = {**ENVIRONMENT, "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    return [subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, env={**shared, "RANK": str(rank)}, text=True,
                             stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) for rank in (0, 1)]


def test_a_rank_that_waits_too_long_says_who_is_where_and_ends(tmp_path):
    """A hang is silent: all GPUs are busy, none makes a step, and nothing says which process was lost in what."""
    first, second = start_two(STUCK)
    try:
        _, message = first.communicate(timeout=120)
        assert first.returncode == 1 and second.poll() is None
    finally:
        first.kill(), second.kill()
    assert "rank 0 has waited 2 s for other processes in 'grpo step 12: score'" in message
    assert "rank 1: 'grpo step 12: sample', for " in message and "--wait_minutes" in message


# --- checkpoints ------------------------------------------------------------------------------------------------------


def test_a_checkpoint_of_two_shards_is_read_by_one_process(alone, sharded, model_folder):
    """Resume on another world size: weights, averages and step counts of AdamW, and the next step taken with them."""
    out, found = sharded
    model, reference, optimizer = shard_steps.load_both(ALONE, str(model_folder), shard=False)
    assert scale.load_checkpoint(out / "checkpoint-1-grpo-000008", model, optimizer, cursor=0, seconds=0.0) == \
        {"cursor": 7, "seconds": 1.25}
    assert distance(shard_steps.weights_of(ALONE, model), found["results"]["frozen vision"][1]) == 0
    steps = {float(state["step"]) for state in optimizer.state.values()}
    assert steps == {5.0, 7.0} and len(optimizer.state) == len(optimizer.param_groups[0]["params"])
    logged = shard_steps.take_step(ALONE, model, reference, optimizer, "both have work")
    assert logged == pytest.approx(found["again"][0], rel=1e-4, abs=1e-5)
    assert distance(shard_steps.weights_of(ALONE, model), found["again"][1]) < 1e-5


def test_a_checkpoint_of_one_process_is_read_by_two_shards(alone, sharded):
    counters, weights, averages = sharded[1]["read"]
    assert counters == {"cursor": 3} and averages == len(alone[3].param_groups[0]["params"])
    assert distance(weights, alone[0]["frozen vision"][1]) == 0


def test_the_fused_optimiser_goes_on_from_a_checkpoint(model_folder, tmp_path):
    """It counts its steps on the parameter's device; a count restored to the CPU would end the run on a GPU. Here the
    same code on the CPU: the next step must be that of a run that was never interrupted."""
    models = [VideoLM.load(str(model_folder)) for _ in range(2)]
    optimizers = [torch.optim.AdamW(model.hf.parameters(), lr=1e-3, fused=True) for model in models]

    def step(i, number):
        generator = torch.Generator().manual_seed(number)
        for p in models[i].hf.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizers[i].step()

    step(0, 1)
    scale.save_checkpoint(ALONE, tmp_path / "checkpoint-1-grpo-000001", scale.training_state(models[0], optimizers[0]))
    scale.load_checkpoint(tmp_path / "checkpoint-1-grpo-000001", models[1], optimizers[1])
    for i in range(2):
        step(i, 2)
    for a, b in zip(models[0].hf.parameters(), models[1].hf.parameters()):
        assert torch.equal(a, b) and optimizers[1].state[b]["step"].device == b.device


def test_a_full_disk_of_one_rank_is_told_to_all_and_costs_nothing(sharded):
    """A rank that fails alone leaves the others waiting; a checkpoint that lacks its part must not be the newest."""
    told, newest = sharded[1]["told"], sharded[1]["newest"]
    assert len(told) == 2 and all("could not be written" in message and "rank 1" in message for message in told)
    assert newest == "checkpoint-1-grpo-000008"


def test_the_newest_checkpoint_is_the_last_of_the_last_phase(tmp_path):
    """By name as text, "checkpoint-900" is newer than "checkpoint-1000"; and SFT's last is older than GRPO's first."""
    for name in ("checkpoint-0-sft-000900", "checkpoint-0-sft-001000", "checkpoint-1-grpo-000050"):
        scale.save_checkpoint(ALONE, tmp_path / name, {"cursor": torch.tensor(1.0)})
        assert scale.newest_checkpoint(tmp_path).name == name
    (tmp_path / "checkpoint-1-grpo-000100").mkdir()  # without its table of contents it is none
    (tmp_path / "checkpoint-1-grpo-000100" / "__0_0.distcp").write_bytes(b"half")
    assert scale.newest_checkpoint(tmp_path).name == "checkpoint-1-grpo-000050"


def test_a_checkpoint_of_an_earlier_version_is_named_and_not_passed_over(tmp_path):
    """Taken for no checkpoint at all, it would let --resume start that run anew, and cut its logs."""
    (tmp_path / "checkpoint-1-grpo-000100").mkdir()
    (tmp_path / "checkpoint-1-grpo-000100" / "state.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="checkpoint-1-grpo-000100.state.pt was written by an earlier version"):
        scale.newest_checkpoint(tmp_path)


SAVING = """
import sys, pathlib, torch
from lib import distributed as scale
world, out = scale.World(0, 1, torch.device("cpu")), pathlib.Path(sys.argv[1])
for step in range(1, 1000):
    scale.save_checkpoint(world, out / f"checkpoint-1-grpo-{step:06d}", {"weight": torch.full((2**24,), float(step))})
"""


def test_a_kill_in_the_middle_of_a_save_leaves_the_one_before(tmp_path):
    """What has a checkpoint's name is whole, whenever the kill comes; and the leftovers are no obstacle."""
    process = subprocess.Popen([sys.executable, "-c", SAVING, str(tmp_path)], cwd=ROOT, env=ENVIRONMENT)
    while process.poll() is None and not any(x.stat().st_size > 2**20 for x in tmp_path.glob("partial-*0003/*")):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    newest = scale.newest_checkpoint(tmp_path)
    assert newest.name == "checkpoint-1-grpo-000002" and list(tmp_path.glob("partial-*"))
    state = {"weight": torch.zeros(2**24)}
    torch.distributed.checkpoint.load(state, checkpoint_id=newest)
    assert torch.equal(state["weight"], torch.full((2**24,), 2.0))
    scale.save_checkpoint(ALONE, tmp_path / "checkpoint-1-grpo-000003", {"weight": torch.ones(1)})
    assert scale.newest_checkpoint(tmp_path).name == "checkpoint-1-grpo-000003" and not list(tmp_path.glob("partial-*"))
    shutil.rmtree(tmp_path)


def test_a_device_that_does_not_exist_is_named():
    with pytest.raises(ValueError, match="--device cudaa: it is auto, cuda, mps or cpu"):
        scale.start("cudaa")
