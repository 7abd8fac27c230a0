"""The KL lab: what it says of k1, k2 and k3 is true of distributions small enough to sum over in plain Python."""

import dataclasses
import json
import math
import shutil

import pytest
import torch
from torch.testing import assert_close

from conftest import ROOT

import rewards
import train
from grpo import kl_penalty, rollout, score_groups
from lib.run import write_json
from model import VideoLM
from tools import kl_lab
from tools.kl_lab import BACK, TOWARDS, distributions, exact_kl, gradient_rows, in_expectation, loss_terms, measure, value_rows

P, Q = [0.5, 0.3, 0.15, 0.05], [0.2, 0.4, 0.1, 0.3]
KL_PQ = sum(p * math.log(p / q) for p, q in zip(P, Q))
KL_QP = sum(q * math.log(q / p) for p, q in zip(P, Q))
# By the logits z of p = softmax(z): d KL(p || q) / dz = p (log p / q - KL), d KL(q || p) / dz = p - q.
GRAD_PQ = [p * (math.log(p / q) - KL_PQ) for p, q in zip(P, Q)]
GRAD_QP = [p - q for p, q in zip(P, Q)]


def tables() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logits of p, log p, log q) in float64; log p has a gradient to the logits."""
    logits = torch.tensor(P, dtype=torch.float64).log().requires_grad_()
    return logits, logits.log_softmax(0), torch.tensor(Q, dtype=torch.float64).log()


def expected_gradients() -> dict[str, torch.Tensor]:
    logits, logps, ref = tables()
    losses = {**in_expectation(loss_terms(logps, ref), logps), TOWARDS: exact_kl(logps, ref), BACK: exact_kl(ref, logps)}
    return {name: torch.autograd.grad(loss, logits, retain_graph=True)[0] for name, loss in losses.items()}


def test_the_exact_kl_and_its_gradient_are_those_of_the_formula():
    """Everything is compared with it."""
    _, logps, ref = tables()
    assert exact_kl(logps, ref).item() == pytest.approx(KL_PQ) and exact_kl(ref, logps).item() == pytest.approx(KL_QP)
    gradients = expected_gradients()
    assert gradients[TOWARDS].tolist() == pytest.approx(GRAD_PQ) and gradients[BACK].tolist() == pytest.approx(GRAD_QP)


def test_k1_and_k3_have_the_kl_as_their_mean_and_k2_has_not():
    _, logps, ref = tables()
    means = in_expectation({kind: kl_penalty(logps, ref, kind) for kind in kl_lab.KINDS}, logps)
    assert means["k1"].item() == pytest.approx(KL_PQ) and means["k3"].item() == pytest.approx(KL_PQ)
    assert means["k2"].item() == pytest.approx(sum(p * math.log(p / q) ** 2 / 2 for p, q in zip(P, Q)))
    assert abs(means["k2"].item() / KL_PQ - 1) > 0.05


@pytest.mark.parametrize("name, wanted", [
    ("k1 as a loss", [0.0] * 4),
    ("k2 as a loss", GRAD_PQ),
    ("k3 as a loss", GRAD_QP),  # what the loss of both papers has: the other direction
    ("k1 in the reward", GRAD_PQ),
    ("k3 in the reward", [a - b for a, b in zip(GRAD_PQ, GRAD_QP)]),
    ("rho k3 as a loss", GRAD_PQ),
])
def test_the_gradient_of_each_estimator_is_what_the_page_says(name, wanted):
    """An estimator without bias is taken for a loss without bias: k1 has none, and as a loss it does nothing."""
    assert expected_gradients()[name].tolist() == pytest.approx(wanted, abs=1e-12)


def test_three_of_the_losses_are_one_and_the_same_token_for_token():
    logits, logps, ref = tables()
    terms = loss_terms(logps, ref)
    for word in range(4):
        k2, k1_reward, rho_k3 = (torch.autograd.grad(terms[name][word], logits, retain_graph=True)[0]
                                 for name in ("k2 as a loss", "k1 in the reward", "rho k3 as a loss"))
        assert_close(k1_reward, k2)
        assert_close(rho_k3, k2)


def test_sampled_means_are_off_by_their_standard_errors_and_k2_by_more():
    """The standard errors that are printed are the ones that are seen: 200 samples of 2,000 tokens."""
    _, logps, ref = (x.detach() for x in tables())
    generator = torch.Generator().manual_seed(0)
    means = in_expectation({kind: kl_penalty(logps, ref, kind) for kind in kl_lab.KINDS}, logps)
    off: dict[str, list[float]] = {"k1": [], "k2": [], "k3": []}
    for _ in range(200):
        words = torch.multinomial(logps.exp(), 2000, replacement=True, generator=generator)
        k = {kind: kl_penalty(logps[words], ref[words], kind) for kind in kl_lab.KINDS}
        rows = value_rows(k, {kind: mean.expand(2000) for kind, mean in means.items()}, exact_kl(logps, ref).expand(2000))
        for kind in off:
            off[kind].append(rows[kind]["off"] / rows[kind]["standard_error"])
    spread = {kind: torch.tensor(each) for kind, each in off.items()}
    for kind in ("k1", "k3"):
        assert abs(spread[kind].mean()) < 3 / 200**0.5 and 0.85 < spread[kind].std() < 1.15
    assert spread["k2"].mean() < -3
    assert rows["exact"]["std"] == pytest.approx(0, abs=1e-9) and rows["k1"]["negative"] == pytest.approx(0.35, abs=0.05)


@pytest.mark.parametrize("distance, steadier", [(0.05, "k3"), (3.0, "k1")])
def test_k3_is_the_steadier_one_near_the_reference_only(distance, steadier):
    """Its e^d grows without limit where the reference says what the policy no longer does: there k1 is the steadier one."""
    logps = torch.tensor([0.9, 0.09, 0.01], dtype=torch.float64).log()
    ref = (logps + distance * torch.tensor([0.0, -1.0, 1.0])).log_softmax(0)
    variance = {}
    for kind in ("k1", "k3"):
        k = kl_penalty(logps, ref, kind)
        variance[kind] = in_expectation({"": k.square()}, logps)[""] - in_expectation({"": k}, logps)[""] ** 2
    assert min(variance, key=variance.get) == steadier


def test_lengths_and_directions_are_relative_to_the_exact_gradient():
    wanted, back = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0])
    rows = gradient_rows({TOWARDS: wanted, BACK: back, "none": torch.zeros(2)}, {"none": torch.tensor([-3.0, -4.0])})
    assert rows[TOWARDS] == {"norm": 1.0, "cosine": 1.0, "cosine_back": pytest.approx(0.8)}
    assert rows[BACK]["norm"] == pytest.approx(0.4) and rows[BACK]["cosine"] == pytest.approx(0.8)
    assert rows["none"]["cosine"] is None
    assert {name: rows["none"][name] for name in rows["none"] if name.startswith("sampled")} == {
        "sampled_norm": 1.0, "sampled_cosine": -1.0, "sampled_error": 2.0}


def moved(model):
    """The model with weights as if some steps had passed."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.text.parameters():
            p += 0.05 * p.std() * torch.randn(p.shape, generator=generator) if p.dim() > 1 else 0.0
    return model


def some_groups(model, prompts):
    return rollout(model, prompts, lambda sample, text: rewards.Score(0.0, {}, "ok"), group_size=3, max_new_tokens=6,
                   temperature=0.8, seeds=[1, 2, 3])


def test_the_distributions_are_those_that_training_scores_with(model, prompts):
    """Another prefix, temperature or place of a video, and the exact KL would be that of another model."""
    groups = some_groups(model, prompts)
    with torch.no_grad():
        for group, scored in zip(groups, score_groups(model, groups, 0.8)):
            every = distributions(model, group, 0.8)
            assert_close(every.gather(2, group.tokens[:, :, None])[:, :, 0].float(), scored.logps, rtol=1e-4, atol=1e-4)
            assert_close(every.exp().sum(-1), torch.ones(group.tokens.shape, dtype=torch.float64))


def test_the_claims_hold_for_a_model_and_its_parameters(model, model_folder, prompts):
    reference = VideoLM.load(str(model_folder))
    groups = some_groups(moved(model), prompts)
    found = measure(model, reference, groups, 0.8)
    assert found["tokens"] == sum(group.num_tokens for group in groups)
    values, gradients = found["values"], found["gradients"]
    assert values["exact"]["mean"] > 1e-3
    assert values["k1"]["bias"] == pytest.approx(0, abs=1e-9) and values["k3"]["bias"] == pytest.approx(0, abs=1e-6)
    assert gradients["k1 as a loss"]["norm"] < 1e-4 < gradients["k1 as a loss"]["sampled_norm"]
    for name in ("k2 as a loss", "k1 in the reward", "rho k3 as a loss"):
        assert gradients[name]["norm"] == pytest.approx(1, abs=1e-3) == gradients[name]["cosine"]
        assert gradients[name]["sampled_error"] == pytest.approx(gradients["k2 as a loss"]["sampled_error"], rel=1e-3)
    assert gradients["k3 as a loss"]["cosine_back"] == pytest.approx(1, abs=1e-3)
    assert gradients["k3 as a loss"]["norm"] == pytest.approx(gradients[BACK]["norm"], rel=1e-3)


@pytest.fixture
def run_folder(model, model_folder, clips, tmp_path):
    """What a run leaves that the lab reads; its policy has moved a little from its reference."""
    data = {name: [str(clips / f"{name[:-5]}.jsonl")] for name in ("train_data", "eval_data")}
    config = train.Config(**data, max_new_tokens=8)
    write_json(tmp_path / "run" / "config.json", dataclasses.asdict(config))
    shutil.copytree(model_folder, tmp_path / "run" / "warm_start")
    moved(model).save(tmp_path / "run" / "final")
    return tmp_path / "run"


def test_a_run_is_measured_and_its_tables_are_printed_and_kept(run_folder, capsys):
    """The command of docs/kl.md, on a run in miniature; twice the same numbers."""
    flags = ["--run", str(run_folder), "--questions", "3", "--group_size", "2"]
    kl_lab.main([*flags, "--out", str(run_folder / "new" / "kl.json")])
    printed = capsys.readouterr().out
    text = (run_folder / "new" / "kl.json").read_text()
    assert "NaN" not in text  # which is no JSON
    found = json.loads(text)
    assert found["completions"] == 6 and f"{found['tokens']:,} tokens of 6 completions" in printed
    assert found["values"]["exact"]["mean"] > 1e-3  # the reference is the model before GRPO, not the policy itself
    for name in (*found["values"], *found["gradients"]):
        assert name in printed
    assert f"{found['values']['exact']['mean']:10.4f}" in printed and "None" not in printed
    kl_lab.main(flags)
    assert capsys.readouterr().out == printed


def rows_of_the_page() -> tuple[str, list[list[str]]]:
    """docs/kl.md with plain minus signs, and the cells of its tables that are not empty, both tables' headings left out."""
    page = (ROOT / "docs" / "kl.md").read_text(encoding="utf-8").replace("\N{MINUS SIGN}", "-")
    lines = [line for line in page.splitlines() if line.startswith("| ") and "cosine" not in line and "| mean" not in line]
    return page, [[cell.strip() for cell in line.split("|") if cell.strip()] for line in lines]


def test_the_figures_of_the_page_are_those_of_the_committed_result():
    """`python -m tools.kl_lab --out tests/results/kl.json` makes them; a number typed by hand rots."""
    page, rows = rows_of_the_page()
    found = json.loads((ROOT / "tests" / "results" / "kl.json").read_text())
    assert f"{found['tokens']:,} tokens" in page and f"{found['parameters']:,} parameters" in page
    expected = []
    for kind, row in found["values"].items():
        cells = [f"{row['mean']:.4f}", f"{row['std']:.4f}"]
        if kind != "exact":
            bias = f"{row['bias']:+.4f}" if abs(row["bias"]) > 1e-6 else "0"
            cells += [f"{row['negative']:.1%}", f"{row['off']:+.4f}", f"{row['standard_error']:.4f}", bias]
        expected.append([kind, *cells])
    keys = ("norm", "cosine", "cosine_back", "sampled_norm", "sampled_cosine", "sampled_error")
    for name in ("k1", "k2", "k3, as in `grpo_loss`", "k1 in the reward", "k3 in the reward", "ρ k3"):
        title = name.partition(",")[0].replace("ρ", "rho")
        row = found["gradients"][title if "reward" in title else f"{title} as a loss"]
        expected.append([name, *(f"{row[key]:.3f}" for key in keys if row[key] is not None)])
    assert rows == expected


def test_without_a_run_the_error_says_how_to_make_one(tmp_path):
    with pytest.raises(ValueError, match=r"no finished run .*torchrun train\.py"):
        kl_lab.main(["--run", str(tmp_path / "none")])
    with pytest.raises(SystemExit):
        kl_lab.main(["--questions", "0"])
