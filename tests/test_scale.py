"""Many processes and many checkpoints: nothing is lost, dealt twice, or left half written."""

import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import scale


def world(rank, size):
    return scale.World(rank, size, torch.device("cpu"))


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_every_item_goes_to_exactly_one_rank(size):
    """Also with fewer items than ranks: the others get an empty share, not somebody else's item."""
    items = list(range(5))
    assert sorted(x for rank in range(size) for x in world(rank, size).share(items)) == items


PROGRAM = """
import sys, torch, scale
world = scale.start("cpu")
out = {"total": scale.total(world, [1.0, world.rank]), "largest": scale.largest(world, [world.rank, -1.0])}
out["gather"] = scale.gather(world, world.share(["a", "b", "c"]))
weight, unused = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(1))
if world.rank == 0:  # the other rank's groups were all dropped: it has no gradient at all
    (weight * torch.tensor([1.0, 2.0])).sum().backward()
scale.sum_gradients(world, [weight, unused])
out["gradient"] = weight.grad.tolist()
scale.wait_for_all(world)
for turn in range(world.size):
    if turn == world.rank:
        print("RANK", world.rank, out, flush=True)
    scale.wait_for_all(world)
scale.stop()
"""


def test_two_processes_agree_although_one_has_nothing(tmp_path):
    """A rank without groups must make the same calls as the others, or all of them wait for ever."""
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    result = subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1"},
                            capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
    expected = {"total": [2.0, 1.0], "largest": [1.0, -1.0], "gather": ["a", "b", "c"], "gradient": [1.0, 2.0]}
    for rank in (0, 1):
        assert f"RANK {rank} {expected}" in result.stdout


def test_the_newest_checkpoint_is_the_last_of_the_last_phase(tmp_path):
    """By name as text, "checkpoint-900" is newer than "checkpoint-1000"; and SFT's last is older than GRPO's first."""
    for name in ("checkpoint-0-sft-000900", "checkpoint-0-sft-001000", "checkpoint-1-grpo-000050"):
        scale.save_checkpoint(tmp_path / name, {"name": name})
        assert scale.load_checkpoint(scale.newest_checkpoint(tmp_path)) == {"name": name}
    (tmp_path / "checkpoint-1-grpo-000100").mkdir()  # a folder without its state is none
    assert scale.newest_checkpoint(tmp_path).name == "checkpoint-1-grpo-000050"


def test_a_checkpoint_that_was_cut_short_never_has_its_final_name(tmp_path, monkeypatch):
    """A kill or a full disk in the middle of a save must not leave something that a resume would load."""
    scale.save_checkpoint(tmp_path / "checkpoint-1-grpo-000050", {"step": 50})

    def full_disk(state, file):
        file.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError):
        scale.save_checkpoint(tmp_path / "checkpoint-1-grpo-000100", {"step": 100})
    monkeypatch.undo()
    assert scale.load_checkpoint(scale.newest_checkpoint(tmp_path)) == {"step": 50}
    scale.save_checkpoint(tmp_path / "checkpoint-1-grpo-000100", {"step": 100})  # the leftovers are no obstacle
    assert scale.load_checkpoint(scale.newest_checkpoint(tmp_path)) == {"step": 100}


def test_a_device_that_does_not_exist_is_named():
    with pytest.raises(ValueError, match="--device cudaa: it is auto, cuda, mps or cpu"):
        scale.start("cudaa")
