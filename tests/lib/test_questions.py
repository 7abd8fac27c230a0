"""What is asked, in which order and by which rank, and where the noise of an answer comes from."""

from collections import Counter

import pytest
import torch
from conftest import ALONE

from lib.distributed import World
from lib.questions import Questions, number_of_steps, order_of, sampling_seed, with_style
from lib.readers import VideoError


def samples(n):
    return [{"id": str(i), "task": "qa", "question": "?", "options": ["x", "y"], "answer": "A"} for i in range(n)]


def ids(pairs):
    """Of what peek and take give: pairs of place and sample."""
    return [sample["id"] for _, sample in pairs]


def test_style_decides_whether_a_thought_is_asked_for_and_scored():
    """Prompt and format reward must agree: else a model is punished for doing what it was told."""
    sample = {"id": "a", "task": "qa", "question": "?", "options": ["x", "y"], "answer": "A"}
    for style, think in (("think", True), ("answer", False), ("temporal_r1", True)):
        (styled,) = with_style([sample], style)
        assert styled["think"] is think and "think" not in sample
    assert with_style([{**sample, "think": False}], "think")[0]["think"] is False


def test_noise_is_a_function_of_seed_step_and_place():
    """In training a place in the stream, a number; in evaluation and selection a question, by its id."""
    seeds = {sampling_seed(seed, step, place) for seed in (0, 1) for step in (-1, 0, 10) for place in ("a", "b", "0 a", 0, 17)}
    assert len(seeds) == 30 and sampling_seed(0, -1, "a") == sampling_seed(0, -1, "a")


# --- the stream -------------------------------------------------------------------------------------------------------


def test_every_sample_is_seen_exactly_once_an_epoch():
    """Ranks that shuffle with seeds of their own see 65 % of an epoch; here there is one order for all."""
    questions = Questions(samples(10), 0, ALONE)
    epochs = [ids(questions.take(10)) for _ in range(3)]
    assert all(sorted(epoch, key=int) == [str(i) for i in range(10)] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_the_order_is_that_of_the_seed():
    """Two seeds with one order are one seed for whatever the order decides."""
    first = [[sample["id"] for sample, _ in zip(order_of(samples(10), seed), range(10))] for seed in (0, 0, 1)]
    assert first[0] == first[1] != first[2]


def test_a_stream_goes_on_where_it_stood():
    """Resume skips to the place; looking ahead must not move it."""
    questions = Questions(samples(7), 1, ALONE)
    questions.take(9)
    questions.peek(5)
    assert questions.cursor == 9
    again = Questions(samples(7), 1, ALONE)
    again.skip(9)
    assert questions.take(6) == again.take(6)


def test_ranks_share_a_stream_by_place_however_much_is_taken():
    """With replaced groups odd numbers are taken: what a rank has decoded ahead must stay its own, and nothing be lost."""
    ranks = [Questions(samples(12), 0, World(r, 2, torch.device("cpu"))) for r in (0, 1)]
    ahead = [questions.peek(12) for questions in ranks]
    taken = [[pair for count in (4, 3, 1, 4) for pair in questions.take(count)] for questions in ranks]
    assert sorted(ids(taken[0] + taken[1]), key=int) == [str(i) for i in range(12)]
    assert taken == ahead


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_sample_that_comes_twice_in_a_step_has_two_places(size):
    """Four samples and eight questions a step. Places, not ids, are what noise comes from: two groups with the noise of
    one id were the same completions twice, in one process on one rank, in two by both."""
    ranks = [Questions(samples(4), 0, World(r, size, torch.device("cpu"))) for r in range(size)]
    for step in range(3):
        pairs = sorted((pair for questions in ranks for pair in questions.take(8)), key=lambda pair: pair[0])
        assert [place for place, _ in pairs] == list(range(8 * step, 8 * step + 8))
        assert set(Counter(ids(pairs)).values()) == {2}
        assert len({sampling_seed(0, step, place) for place, _ in pairs}) == 8
        assert ids(pairs) == [sample["id"] for _, sample in zip(range(8 * step + 8), order_of(samples(4), 0))][8 * step:]


def test_one_pass_through_the_data_is_a_number_of_steps():
    assert number_of_steps(-1, samples(17), 8) == 3 and number_of_steps(5, samples(17), 8) == 5


def test_several_passes_have_no_gap_between_them():
    """Three epochs of 17 in steps of 8 are 51 questions in 7 steps; 3 x 3 steps would show 21 samples a fourth time."""
    assert number_of_steps(-3, samples(17), 8) == 7 and number_of_steps(-2, samples(16), 8) == 4
    assert number_of_steps(0, samples(17), 8) == 0
    questions = Questions(samples(17), 0, ALONE)
    seen = [name for _ in range(7) for name in ids(questions.take(8))]
    assert set(Counter(seen[:51]).values()) == {3}


# --- their prompts ----------------------------------------------------------------------------------------------------


class FakeLoader:
    """Has no videos, and cannot read that of sample `broken`; remembers what was submitted."""

    def __init__(self, broken: str = ""):
        self.submitted, self.broken = [], broken

    def submit(self, sample):
        self.submitted.append(sample["id"])

    def load(self, sample):
        if sample["id"] == self.broken:
            raise VideoError("x\x1b[2J.mp4", "no video stream")


def test_a_video_that_cannot_be_read_costs_its_own_question_and_no_place(model, capsys):
    """Were the places of the others counted over what is readable, the noise of a run would depend on a busy disk."""
    questions = Questions(samples(12), 0, ALONE, model=model, loader=FakeLoader(), style="answer")
    questions.skip(3)
    order = ids(questions.peek(6))
    questions.loader.broken = order[2]
    batch = questions.next(6)
    assert [prompt.sample["id"] for prompt in batch.prompts] == order[:2] + order[3:]
    assert batch.places == [3, 4, 6, 7, 8] and batch.unreadable == 1
    assert "unreadable, left out: x\\x1b[2J.mp4" in capsys.readouterr().out


def test_what_is_decoded_ahead_is_a_whole_step_although_one_question_is_replaced(model):
    """A round of --resample takes few; the step behind it needs as many as ever."""
    loader = FakeLoader()
    questions = Questions(samples(20), 0, ALONE, model=model, loader=loader, style="answer")
    order = ids(questions.peek(20))
    questions.next(4)
    assert loader.submitted == order[:8]
    questions.next(1, ahead=4)
    assert loader.submitted[8:] == order[4:9] and questions.cursor == 5
