"""The walk through one step of GRPO: every number that is printed, against plain Python that shares no code with it."""

import math
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from tools import walk

SAID = [[1, 0], [2, 0], [1, 3, 0], [2, 2, 2]]  # without the padding
OLD, NOW, REF = ([[round(p, 2) for p in row] for row in table.tolist()] for table in (walk.OLD, walk.NOW, walk.REF))
PLACES = [(i, t, word) for i, row in enumerate(SAID) for t, word in enumerate(row)]


@pytest.fixture(scope="module")
def printed(tmp_path_factory) -> str:
    """As a reader gets it: by the command of the docs, from a folder that is not the repository's."""
    done = subprocess.run([sys.executable, str(ROOT / "grpo.py")], cwd=tmp_path_factory.mktemp("elsewhere"),
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def table(printed: str, title: str) -> list[list[float]]:
    """The numbers under the heading that begins with `title`; rows of a table without their numbers, dashes left out."""
    (block,) = [part for part in printed.split("\n\n") if part.strip().startswith(title)]
    rows = [line for line in block.splitlines()[1:] if re.match(r"   \d  |       ", line) and "." in line]
    return [[float(x) for x in re.findall(r"-?\d+\.\d{4}", row)] for row in rows]


def rows_of(values: dict[tuple[int, int], float]) -> list[list[float]]:
    return [[values[i, t] for t in range(len(row))] for i, row in enumerate(SAID)]


def close(found: list[list[float]], expected: list[list[float]]) -> bool:
    """To the last digit that is printed."""
    return [len(row) for row in found] == [len(row) for row in expected] and all(
        abs(a - b) < 6e-5 for x, y in zip(found, expected) for a, b in zip(x, y))


def by_hand() -> dict:
    """The whole step in double precision, token by token."""
    rewards = [1.0, 0.0, 0.0, 0.0]
    mean = sum(rewards) / 4
    std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / 3)
    A = [(r - mean) / (std + 1e-4) for r in rewards]
    ratio = {(i, t): NOW[t][w] / OLD[t][w] for i, t, w in PLACES}
    free = {key: rho * A[key[0]] for key, rho in ratio.items()}
    gain = {key: min(free[key], min(max(rho, 0.8), 1.2) * A[key[0]]) for key, rho in ratio.items()}
    kl = {(i, t): REF[t][w] / NOW[t][w] - math.log(REF[t][w] / NOW[t][w]) - 1 for i, t, w in PLACES}
    loss = {key: -gain[key] + 0.1 * kl[key] for key in gain}
    means = [sum(row) / len(row) for row in rows_of(loss)]
    return {"A": A, "ratio": ratio, "gain": gain, "clipped": {key for key in gain if gain[key] < free[key]}, "kl": kl,
            "token loss": loss, "means": means, "loss": sum(means) / 4}


def loss_of(logits: list[list[float]]) -> float:
    """The loss as a function of the policy's logits, for differences."""
    A, total = by_hand()["A"], 0.0
    for i, row in enumerate(SAID):
        for t, w in enumerate(row):
            p = math.exp(logits[t][w]) / sum(map(math.exp, logits[t]))
            rho, k3 = p / OLD[t][w], REF[t][w] / p - math.log(REF[t][w] / p) - 1
            total += (-min(rho * A[i], min(max(rho, 0.8), 1.2) * A[i]) + 0.1 * k3) / len(row) / 4
    return total


def test_the_advantages_the_ratio_the_clip_and_the_kl_are_right(printed):
    """A walk with a wrong number teaches the wrong method, and whoever checks it with a calculator doubts the rest."""
    expected = by_hand()
    assert re.findall(r"mean (\S+), std (\S+) ", printed) == [("0.2500", "0.5000")]
    assert close([[float(x) for x in re.findall(r"^   A +(.*)$", printed, re.MULTILINE)[0].split()]], [expected["A"]])
    for title, name in (("6. ratio", "ratio"), ("7. gain", "gain"), ("8. KL", "kl"), ("loss of a token", "token loss")):
        assert close(table(printed, title), rows_of(expected[name])), title


def test_the_stars_stand_where_the_clip_decides(printed):
    """The rule that is hardest to remember: of the two sides only that which the advantage asked for is clipped."""
    (block,) = [part for part in printed.split("\n\n") if part.startswith("7. gain")]
    found = {(i, t) for i, line in enumerate(block.splitlines()[1:])
             for t, cell in enumerate(line.split()[1:]) if cell.endswith("*")}
    assert found == by_hand()["clipped"] == {(0, 0), (1, 0), (3, 0)}


def test_the_padding_is_not_counted_and_the_end_token_is(printed):
    assert re.findall(r"mask \[(.*?)\]", printed) == ["1, 1, 0", "1, 1, 0", "1, 1, 1", "1, 1, 1"]


def test_the_loss_is_the_mean_over_tokens_and_then_over_completions(printed):
    expected = by_hand()
    assert close(table(printed, "9. mean over the tokens"), [expected["means"]])
    hand, function, clipped, tokens, kl = re.findall(
        r"by hand (\S+), grpo_loss (\S+); clipped (\d+) of (\d+) tokens, mean k3 (\S+)", printed)[0]
    assert hand == function == f"{expected['loss']:.4f}"
    assert (int(clipped), int(tokens)) == (len(expected["clipped"]), len(PLACES))
    assert float(kl) == pytest.approx(sum(expected["kl"].values()) / len(PLACES), abs=6e-5)


def test_the_gradients_and_the_step_are_right(printed):
    """By the derivative written out, and by differences of a loss of its own."""
    expected = by_hand()
    gradient = {}
    for i, t, w in PLACES:
        slope = 0.0 if (i, t) in expected["clipped"] else -expected["ratio"][i, t] * expected["A"][i]
        gradient[i, t] = (slope + 0.1 * (1 - REF[t][w] / NOW[t][w])) / len(SAID[i]) / 4
    assert close(table(printed, "10. gradient by log p"), rows_of(gradient))
    logits, h = [[math.log(p) for p in row] for row in NOW], 1e-6
    slopes = [[0.0] * 4 for _ in NOW]
    for t in range(3):
        for w in range(4):
            moved = [[[x + sign * h * (a == t and b == w) for b, x in enumerate(row)] for a, row in enumerate(logits)]
                     for sign in (1, -1)]
            slopes[t][w] = (loss_of(moved[0]) - loss_of(moved[1])) / (2 * h)
    assert close(table(printed, "gradient by the logits"), slopes)
    raised = [[math.exp(z - g) for z, g in zip(*rows)] for rows in zip(logits, slopes)]
    assert close(table(printed, "the policy after the step"), [[x / sum(row) for x in row] for row in raised])
    assert raised[0][1] / sum(raised[0]) < NOW[0][1]  # what the last sentence says


def test_the_walk_calls_what_trains(monkeypatch, capsys):
    """A walk with formulas of its own would go on telling of the old method when grpo.py has another."""
    monkeypatch.setattr(walk, "grpo_loss", lambda *inputs, **settings: (inputs[0].sum(), {
        name: torch.tensor(1.0) for name in ("clipped_tokens", "tokens", "kl_sum")}))
    with pytest.raises(AssertionError, match="grpo.py has changed"):
        walk.main([])


def test_what_is_printed_fits_the_screen(printed):
    assert max(map(len, printed.splitlines())) <= 125
