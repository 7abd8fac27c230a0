"""Checkpoints are read by any number of processes, to the last bit, and none is left half written."""

import contextlib
import pickle
import time

import pytest
import shard_steps
import torch
from conftest import ALONE
from processes import start_ranks
from shard_steps import distance
from torch.distributed.checkpoint.api import CheckpointException

from lib.checkpoints import find_checkpoints, load_checkpoint, names_in, newest_checkpoint, save_checkpoint, training_state
from lib.distributed import World, stop
from model import VideoLM


@pytest.fixture(scope="module")
def alone(model_folder):
    return shard_steps.alone(model_folder)


@pytest.fixture(scope="module")
def sharded(model_folder):
    return shard_steps.sharded(model_folder)


def test_a_checkpoint_of_two_shards_is_read_by_one_process(alone, sharded, model_folder):
    """Resume on another world size: weights, averages and step counts of AdamW, and the next step taken with them."""
    out, found = sharded
    model, reference, optimizer = shard_steps.load_both(ALONE, model_folder, shard=False)
    assert load_checkpoint(out / "checkpoint-1-grpo-000008", model, optimizer, cursor=0, seconds=0.0) == \
        {"cursor": 7, "seconds": 1.25}
    assert distance(shard_steps.weights_of(model), found["results"][shard_steps.LAST][1]) == 0
    # Of ten steps one had no gradient at all, and four none for the tower.
    steps = {float(state["step"]) for state in optimizer.state.values()}
    assert steps == {5.0, 9.0} and len(optimizer.state) == len(optimizer.param_groups[0]["params"])
    logged = shard_steps.take_step(ALONE, model, reference, optimizer, "both have work")
    assert logged == pytest.approx(found["again"][0], rel=1e-4, abs=1e-5)
    assert distance(shard_steps.weights_of(model), found["again"][1]) < 1e-5


def test_a_checkpoint_of_one_process_is_read_by_two_shards(alone, sharded):
    counters, weights, averages = sharded[1]["read"]
    assert counters == {"cursor": 3} and averages == len(alone[3].param_groups[0]["params"])
    assert distance(weights, alone[0][shard_steps.LAST][1]) == 0


def test_what_is_not_trained_now_is_refused(model_folder, tmp_path):
    """A checkpoint of the language model alone, read by a run that trains the tower too, would leave the tower at the
    start and say nothing; the other way round it would throw away what was learned."""
    models = [VideoLM.load(str(model_folder)) for _ in range(2)]
    optimizers = [torch.optim.AdamW(part, lr=1e-3) for part in (models[0].text.parameters(), models[1].hf.parameters())]
    for k in range(2):
        save_checkpoint(ALONE, tmp_path / f"{k}", training_state(models[k], optimizers[k], cursor=4))
        load_checkpoint(tmp_path / f"{k}", models[k], optimizers[k], cursor=0)
        assert "cursor" in names_in(tmp_path / f"{k}")
        with pytest.raises(ValueError, match="does not hold what is trained now, and that only: .*model.visual"):
            load_checkpoint(tmp_path / f"{k}", models[1 - k], optimizers[1 - k], cursor=0)


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
    save_checkpoint(ALONE, tmp_path / "checkpoint-1-grpo-000001", training_state(models[0], optimizers[0]))
    load_checkpoint(tmp_path / "checkpoint-1-grpo-000001", models[1], optimizers[1])
    for i in range(2):
        step(i, 2)
    for a, b in zip(models[0].hf.parameters(), models[1].hf.parameters()):
        assert torch.equal(a, b) and optimizers[1].state[b]["step"].device == b.device


@pytest.mark.gpu
@pytest.mark.parametrize("shard, offload", [(False, False), (True, False), (True, True)])
def test_a_checkpoint_of_a_gpu_is_read_to_the_last_bit(model_folder, gpu, tmp_path, shard, offload):
    """Weights and both moments, from the card and from pinned memory, and back to where they are needed."""
    here = World(0, 1, torch.device(gpu, 0))
    try:
        _, model, _, optimizer = shard_steps.take_steps(here, model_folder, shard, offload,
                                                        cases=list(shard_steps.CASES)[:1])
        expected = training_state(model, optimizer, cursor=7)
        save_checkpoint(here, tmp_path / "checkpoint", expected)
        model, reference, optimizer = shard_steps.load_both(here, model_folder, shard, offload)
        assert load_checkpoint(tmp_path / "checkpoint", model, optimizer, cursor=0)["cursor"] == 7
        found = training_state(model, optimizer, cursor=7)
        assert found.keys() == expected.keys() and len(found) > 100
        for name, tensor in expected.items():
            a, b = (getattr(x, "_local_tensor", x) for x in (tensor, found[name]))
            assert torch.equal(torch.as_tensor(a).cpu(), torch.as_tensor(b).cpu()), name
            assert torch.as_tensor(a).device == torch.as_tensor(b).device, name
        logged = shard_steps.take_step(here, model, reference, optimizer, "both have work")
        assert 0 < logged["norm"] < float("inf")  # and goes on
    finally:
        stop(here)


def test_a_full_disk_of_one_rank_is_told_to_all_and_costs_nothing(sharded):
    """A rank that fails alone leaves the others waiting; a checkpoint that lacks its part must not be the newest."""
    told, newest = sharded[1]["told"], sharded[1]["newest"]
    assert len(told) == 2 and all("could not be written" in message and "rank 1" in message for message in told)
    assert newest == "checkpoint-1-grpo-000008"


def test_the_newest_checkpoint_is_the_last_of_the_last_phase(tmp_path):
    """By name as text, "checkpoint-900" is newer than "checkpoint-1000"; and SFT's last is older than GRPO's first."""
    for name in ("checkpoint-0-sft-000900", "checkpoint-0-sft-001000", "checkpoint-1-grpo-000050"):
        save_checkpoint(ALONE, tmp_path / name, {"cursor": torch.tensor(1.0)})
        assert newest_checkpoint(tmp_path).name == name
    (tmp_path / "checkpoint-1-grpo-000100").mkdir()  # without its table of contents it is none
    (tmp_path / "checkpoint-1-grpo-000100" / "__0_0.distcp").write_bytes(b"half")
    assert newest_checkpoint(tmp_path).name == "checkpoint-1-grpo-000050"


def test_a_checkpoint_of_an_earlier_version_is_named_and_not_passed_over(tmp_path):
    """Taken for no checkpoint at all, it would let --resume start that run anew, and cut its logs."""
    (tmp_path / "checkpoint-1-grpo-000100").mkdir()
    (tmp_path / "checkpoint-1-grpo-000100" / "state.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="checkpoint-1-grpo-000100.state.pt was written by an earlier version"):
        newest_checkpoint(tmp_path)


# --- torn, or made by others ---------------------------------------------------------------------------------------------


def tear(folder, name, size):
    with open(folder / name, "r+b") as file:
        file.truncate(size)


def test_a_torn_checkpoint_is_named_and_the_one_before_is_taken(tmp_path):
    """Data that a crash has cut off, and a table of contents: the library's own words name no file, and no remedy."""
    for step in (1, 2, 3):
        save_checkpoint(ALONE, tmp_path / f"checkpoint-1-grpo-00000{step}", {"cursor": torch.tensor(1.0)})
    assert find_checkpoints(tmp_path) == (tmp_path / "checkpoint-1-grpo-000003", [])
    tear(tmp_path / "checkpoint-1-grpo-000003", "__0_0.distcp", 100)
    tear(tmp_path / "checkpoint-1-grpo-000002", ".metadata", 100)
    newest, problems = find_checkpoints(tmp_path)
    assert newest.name == "checkpoint-1-grpo-000001"
    assert "000003/__0_0.distcp has 100 bytes of" in problems[0] and "000002/.metadata cannot be read" in problems[1]
    (tmp_path / "checkpoint-1-grpo-000001" / "__0_0.distcp").unlink()
    with pytest.raises(ValueError, match="no checkpoint is whole: .*000001/__0_0.distcp has 0 bytes"):
        newest_checkpoint(tmp_path)


def test_a_changed_byte_is_named_when_it_is_read(model_folder, tmp_path):
    """The sizes are right, and what is read is no tensor."""
    model = VideoLM.load(str(model_folder))
    optimizer = torch.optim.AdamW(model.hf.parameters())
    folder = tmp_path / "checkpoint-1-grpo-000001"
    save_checkpoint(ALONE, folder, training_state(model, optimizer))
    with open(folder / "__0_0.distcp", "r+b") as file:
        file.write(b"\0" * 4096)
    with pytest.raises(ValueError, match="000001 is damaged .rank 0: UnpicklingError.: delete it, and --resume goes on from the one before"):
        load_checkpoint(folder, model, optimizer)


class Payload:
    """Pickled, a call; harmless."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


@pytest.mark.parametrize("place", ["the table", "an entry"])
def test_nothing_in_a_checkpoint_is_run(model_folder, tmp_path, place):
    """The library unpickles the table of contents, and entries that are no tensors: `--resume` in a folder of a stranger ran
    the stranger's code."""
    model = VideoLM.load(str(model_folder))
    optimizer = torch.optim.AdamW(model.hf.parameters())
    folder, evidence = tmp_path / "checkpoint-1-grpo-000001", tmp_path / "it ran"
    state = training_state(model, optimizer, cursor=1)
    if place == "an entry":
        torch.distributed.checkpoint.save({**state, "cursor": Payload(evidence)}, checkpoint_id=folder)
    else:
        save_checkpoint(ALONE, folder, state)
        (folder / ".metadata").write_bytes(pickle.dumps(Payload(evidence)))
    evidence.unlink(missing_ok=True)
    for attempt in (lambda: newest_checkpoint(tmp_path), lambda: load_checkpoint(folder, model, optimizer, cursor=0)):
        with pytest.raises((ValueError, pickle.UnpicklingError), match="which no checkpoint does|is no tensor"):
            attempt()
    assert not evidence.exists()
    with contextlib.suppress(CheckpointException):  # the library alone does run it: without that this test shows nothing
        torch.distributed.checkpoint.load({"cursor": torch.tensor(0.0)}, checkpoint_id=folder)
    assert evidence.exists()


def test_ctrl_c_during_a_save_is_ctrl_c(tmp_path, monkeypatch):
    """It was told as a disk that could not be written, `with 78.6 GB free`: make room."""
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.distributed.checkpoint.FileSystemWriter, "write_data", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(ALONE, tmp_path / "checkpoint-1-grpo-000001", {"cursor": torch.tensor(1.0)})


NUMBERS = 2**22  # of a checkpoint of 16 MB, which takes some milliseconds to write


def save_for_ever(out):
    for step in range(1, 1000):
        state = {"weight": torch.full((NUMBERS,), float(step))}
        save_checkpoint(ALONE, out / f"checkpoint-1-grpo-{step:06d}", state)


def test_a_kill_in_the_middle_of_a_save_leaves_the_one_before(tmp_path):
    """What has a checkpoint's name is whole, whenever the kill comes; and the leftovers are no obstacle."""
    (process,) = start_ranks(tmp_path / "log", 1, save_for_ever, tmp_path)
    while process.is_alive() and not any(x.stat().st_size > 2**20 for x in tmp_path.glob("partial-*0003/*")):
        time.sleep(0.001)
    process.kill()
    process.join()
    newest = newest_checkpoint(tmp_path)
    assert newest.name == "checkpoint-1-grpo-000002" and list(tmp_path.glob("partial-*"))
    state = {"weight": torch.zeros(NUMBERS)}
    torch.distributed.checkpoint.load(state, checkpoint_id=newest)
    assert torch.equal(state["weight"], torch.full((NUMBERS,), 2.0))
    save_checkpoint(ALONE, tmp_path / "checkpoint-1-grpo-000003", {"weight": torch.ones(1)})
    assert newest_checkpoint(tmp_path).name == "checkpoint-1-grpo-000003" and not list(tmp_path.glob("partial-*"))
