"""Many processes: nothing is dealt twice, forgotten, or waited for in vain."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
from processes import read, run_ranks, start_ranks

from lib import distributed
from lib.distributed import Watch, World, start, stop, sum_gradients


def world(rank, size, watch=None):
    return World(rank, size, torch.device("cpu"), watch)


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_every_item_goes_to_exactly_one_rank(size):
    """Also with fewer items than ranks: the others get an empty share, not somebody else's item."""
    items = list(range(5))
    assert sorted(x for rank in range(size) for x in world(rank, size).share(items)) == items


def test_a_device_that_does_not_exist_is_named():
    with pytest.raises(ValueError, match="--device cudaa: it is auto, cuda, mps or cpu"):
        start("cudaa")


# --- together ---------------------------------------------------------------------------------------------------------


def agree(folder):
    here = start("cpu", wait_minutes=0.3)
    weight, unused = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(1))
    if here.is_first:  # the others' groups were all dropped: no gradient at all
        (weight * torch.tensor([1.0, 2.0])).sum().backward()
    sum_gradients(here, [weight, unused])
    assert unused.grad is None
    found = [here.all_reduce_sum(1.0, here.rank), here.all_reduce_max(here.rank, -1.0),
             here.all_gather(here.share(["a", "b", "c"])), weight.grad.tolist()]
    torch.save(found, folder / f"{here.rank}.pt")
    stop(here)


def test_processes_agree_on_sums_although_one_has_nothing(tmp_path):
    """A rank without groups must make the same calls as the others, or all of them wait for ever."""
    run_ranks(tmp_path, 2, agree, tmp_path)
    for rank in range(2):
        assert torch.load(tmp_path / f"{rank}.pt") == [[2.0, 1.0], [1.0, -1.0], ["a", "b", "c"], [1.0, 2.0]]


def test_gradients_are_summed_in_pieces_of_a_bounded_size():
    """A copy of all gradients at once would double them, where memory is shortest. A larger parameter is alone."""
    sizes = [3, 3, 9, 1, 2, 3]
    parameters = [torch.nn.Parameter(torch.zeros(size)) for size in sizes]
    groups = distributed.buckets(parameters, most=6)
    assert [[p.numel() for p in group] for group in groups] == [[3, 3], [9], [1, 2, 3]]
    assert [p for group in groups for p in group] == parameters and distributed.buckets([], most=6) == []


# --- waiting ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def watched(monkeypatch):
    """A world with a limit of 0.6 s for a phase, and the exit codes with which its process would have ended."""
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    watch = Watch(dist.HashStore(), 0, 2, seconds=0.6)
    yield world(0, 2, watch), ended
    watch.stop()


def test_a_rank_that_goes_from_phase_to_phase_is_not_ended(watched):
    """The limit is on a phase. One on the run, or on the time since the last collective call, would end a run that works,
    in the night before the deadline."""
    here, ended = watched
    for step in range(10):
        here.phase(f"grpo step {step}")
        time.sleep(0.1)
    assert ended == []


def test_a_rank_that_stays_in_a_phase_is_ended_although_it_waits_for_nobody(watched, capsys):
    """A loop without an end, in a decoder or a reward, is what all others wait for: nothing but the phase can tell."""
    here, ended = watched
    here.phase("grpo step 12: sample")
    end = time.time() + 20
    while not ended and time.time() < end:
        sum(range(1000))
    assert set(ended) == {1}
    message = capsys.readouterr().err
    assert "rank 0 has been in 'grpo step 12: sample' for more than 0.6 s" in message
    assert "rank 1: 'not started'" in message and "--wait_minutes" in message


def test_nothing_ends_a_process_that_has_left_the_others(watched):
    """The first rank goes on after `stop`, to write the summary or the metrics: that may take as long as it takes."""
    here, ended = watched
    stop(here)
    time.sleep(1.0)
    assert ended == []


def be_lost():
    here = start("cpu", wait_minutes=1)
    here.phase("grpo step 12: sample")
    here.sync()
    here.watch.seconds = 1.0
    if here.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)  # with all its threads: its own watch cannot end it
    here.phase("grpo step 12: score")
    here.sync()


def test_a_rank_that_waits_too_long_says_who_is_where_and_ends(tmp_path):
    """A hang is silent: all GPUs are busy, none makes a step, and nothing says which process was lost in what."""
    first, second = ranks = start_ranks(tmp_path, 2, be_lost)
    try:
        first.join(60)
        assert first.exitcode == 1 and second.exitcode is None
    finally:
        for rank in ranks:
            rank.kill()
    message = read(tmp_path, 0)
    assert "rank 0 has been in 'grpo step 12: score' for more than 1 s" in message
    assert "rank 1: 'grpo step 12: sample', for " in message and "--wait_minutes" in message


def test_a_device_that_is_not_there_is_refused_in_one_sentence(monkeypatch):
    """PyTorch's own error is a stack trace of its lazy initialisation."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for device in ("cuda", "mps"):
        with pytest.raises(ValueError, match=f"--device {device}: PyTorch sees no"):
            start(device)
