"""What is said when the memory is not enough: enough to change the right flag."""

from types import SimpleNamespace

import pytest
import torch

import train
from lib.memory import REMEDIES, message, note_if_out_of_memory, sizes
from tools import evaluate


def prompt(name: str, length: int):
    return SimpleNamespace(ids=torch.zeros(length), sample={"id": name})


def out_of_memory(doing: str, with_what=str) -> torch.OutOfMemoryError:
    with pytest.raises(torch.OutOfMemoryError) as caught:
        with note_if_out_of_memory(doing, with_what):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.30 GiB.\nmany lines of advice")
    return caught.value


def test_the_longest_samples_are_named():
    """Of thirty in a batch it is seldom the first."""
    text = sizes([prompt("a", 10), prompt("b", 300), prompt("c", 20), prompt("d", 40), prompt("e", 5)], "8 completions")
    assert text == "b (prompt of 300 tokens), d (prompt of 40 tokens), c (prompt of 20 tokens) and 2 shorter ones, 8 completions"
    assert "shorter" not in sizes([prompt("a", 10)], "8 completions")


@pytest.mark.parametrize("doing", REMEDIES)
def test_the_flags_are_those_of_what_was_done(doing):
    """--pack_tokens does nothing for sampling; all flags at once help nobody."""
    text = message(out_of_memory(doing, lambda: "a (prompt of 10 tokens)"), torch.device("cpu"), " in grpo step 7")
    assert text.startswith(f"out of memory in grpo step 7, in {doing} a (prompt of 10 tokens).\n")
    assert f"what lowers it: {REMEDIES[doing]}.\n" in text and "2.30 GiB" in text and "advice" not in text


def test_without_a_note_all_flags_are_named():
    """It may happen where nobody takes notes: while a model is loaded."""
    text = message(torch.OutOfMemoryError("x"), torch.device("cpu"))
    assert text.startswith("out of memory.\n") and all(remedy in text for remedy in REMEDIES.values())


def test_nothing_is_described_that_nobody_asks_for():
    """The description of a batch looks at every sample of it, in every pass."""
    with note_if_out_of_memory("scoring", lambda: pytest.fail("asked")):
        pass
    with pytest.raises(ValueError), note_if_out_of_memory("scoring", lambda: pytest.fail("asked")):
        raise ValueError


def test_the_flags_that_are_named_exist():
    fields = set(train.Config.__dataclass_fields__) | set(evaluate.Flags.__dataclass_fields__)
    named = {word.strip("-,;():") for remedy in REMEDIES.values() for word in remedy.split() if "--" in word}
    assert len(named) > 8 and named <= fields
