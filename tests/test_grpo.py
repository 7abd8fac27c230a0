"""What the GRPO mathematics must do, against plain Python in double precision that shares no code with it."""

import dataclasses
import doctest
import math
from functools import partial

import pytest
import torch

import grpo
import rewards
from grpo import accumulate_gradients, completion_mask, group_advantages, grpo_loss, kl_penalty, live_groups, rollout
from lib import memory
from model import VideoLM

PLAIN = dict(beta=0.0, clip_low=0.2, clip_high=0.2)


# ---- the reference: loops over floats -------------------------------------------------------------------------------


def loss_and_gradient_by_hand(logps, old, advantages, lengths, ref, beta, low, high, norm, denominator=None):
    """The published formulas, one token at a time; row i consists of its first `lengths[i]` tokens.

    With d = ref - logp, the derivative of a token's loss by its log-probability is -rho A (0 where the clip bites)
    + beta * (1 - exp(d)), times the weight that the normalisation gives to the token.
    """
    rows = len(logps)
    tokens = sum(lengths)
    loss, gradient = 0.0, [[0.0] * len(logps[0]) for _ in range(rows)]
    for i in range(rows):
        for t in range(lengths[i]):
            if norm == "sequence":
                weight = 1 / lengths[i] / (denominator or rows)
            else:
                weight = 1 / (denominator or tokens)
            rho, a, d = math.exp(logps[i][t] - old[i][t]), advantages[i], ref[i][t] - logps[i][t]
            clipped = (a > 0 and rho > 1 + high) or (a < 0 and rho < 1 - low)
            gain = min(max(rho, 1 - low), 1 + high) * a if clipped else rho * a
            loss += weight * (-gain + beta * (math.exp(d) - d - 1))
            gradient[i][t] = weight * ((0.0 if clipped else -rho * a) + beta * (1 - math.exp(d)))
    return loss, gradient


def batch(rows=6, width=9, seed=0):
    """Log-probabilities of three policies a few inner steps apart, so that about half of the tokens leave the clip."""
    generator = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(rows, width, generator=generator, dtype=torch.float64)
    logps = old + 0.4 * torch.randn(rows, width, generator=generator, dtype=torch.float64)
    ref = old + 0.3 * torch.randn(rows, width, generator=generator, dtype=torch.float64)
    advantages = torch.randn(rows, generator=generator, dtype=torch.float64)
    lengths = [width, 1, 4, width - 1, 2, 7][:rows]
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    return logps.requires_grad_(), old, ref, advantages, mask, lengths


def gradient_of(logps, *args, **kwargs):
    loss, stats = grpo_loss(logps, *args, **kwargs)
    return loss.item(), torch.autograd.grad(loss, logps)[0], stats


# ---- advantages -----------------------------------------------------------------------------------------------------


def test_the_examples_in_the_docstrings_are_true():
    """A worked example that has rotted teaches the wrong formula."""
    results = doctest.testmod(grpo)
    assert results.failed == 0 and results.attempted >= 10


def test_advantages_match_the_formula_with_the_unbiased_std():
    """The biased std (ddof 0) makes every advantage sqrt(8/7) too large at G = 8."""
    groups = [[1.7, 0.2, 1.0, 0.0, 1.31, 1.0, 0.6, 2.0], [0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.9]]
    got = group_advantages(torch.tensor(groups, dtype=torch.float64))
    for row, rewards in zip(got.tolist(), groups):
        mean = sum(rewards) / 8
        std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / 7)
        assert row == pytest.approx([(r - mean) / (std + 1e-4) for r in rewards], rel=1e-12)


def test_advantages_without_std_are_deviations_from_the_mean():
    got = group_advantages(torch.tensor([[1.0, 0.0, 0.5, 0.5], [4.0, 1.0, 1.0, 2.0]]), scale="none")
    assert got.tolist() == [[0.5, -0.5, 0.0, 0.0], [2.0, -1.0, -1.0, 0.0]]


@pytest.mark.parametrize("scale", ["group", "none"])
@pytest.mark.parametrize("reward", [0.1 * 3, 1.1, 2 / 3, 1e-9, 0.0, 1.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_group_without_any_difference_gives_exactly_zero(reward, scale, dtype):
    """The float32 mean of equal numbers is not that number; (r - mean) / (std + 1e-8) then gave advantages of 0.9."""
    for size in (2, 3, 7, 8, 16):
        assert group_advantages(torch.full((1, size), reward, dtype=dtype), scale).tolist() == [[0.0] * size]


def test_float32_rewards_are_treated_in_double_precision():
    """In float32 the mean of rewards near 2 is off by 1e-7, which is a tenth of the advantages of a tight group."""
    rewards = torch.tensor([[1.9, 1.9, 1.9, 1.9, 1.9, 1.9, 1.9, 1.9000008]])
    exact = group_advantages(rewards.double())
    got = group_advantages(rewards)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), exact, rtol=1e-6, atol=0)


def test_groups_do_not_see_each_other():
    """Statistics over the batch instead of the group would reward easy questions."""
    easy, hard = torch.tensor([[2.0, 1.9, 2.0, 1.8]]), torch.tensor([[0.0, 0.1, 0.0, 0.0]])
    both = group_advantages(torch.cat([easy, hard]))
    assert torch.equal(both, torch.cat([group_advantages(easy), group_advantages(hard)]))
    assert both.sum(dim=1).tolist() == pytest.approx([0.0, 0.0], abs=1e-6)


def test_a_group_of_one_teaches_nothing_and_warns_of_nothing(recwarn):
    """The unbiased std of one number is nan."""
    for scale in ("group", "none"):
        assert group_advantages(torch.tensor([[1.5], [0.0]]), scale).tolist() == [[0.0], [0.0]]
    assert live_groups(torch.tensor([[1.5], [0.0]])).tolist() == [False, False]
    assert not recwarn.list


def test_whole_number_rewards_do_not_truncate_the_advantages():
    got = group_advantages(torch.tensor([[1, 0, 0, 0]]))
    assert got[0].tolist() == pytest.approx([0.75 / 0.5001] + [-0.25 / 0.5001] * 3)


def test_unknown_names_are_refused():
    one = torch.zeros(1, 1)
    with pytest.raises(ValueError, match="batch"):
        group_advantages(one, scale="batch")
    with pytest.raises(ValueError, match="k4"):
        kl_penalty(one, one, "k4")
    with pytest.raises(ValueError, match="row"):
        grpo_loss(one, one, one[0], one == 0, norm="row", **PLAIN)


def test_live_groups_are_those_with_a_spread_above_1e_4():
    """Dropping groups by max != min would keep a group that differs by rounding alone."""
    spread = 1e-4 * math.sqrt(2)  # of two rewards whose std is exactly 1e-4
    rewards = torch.tensor(
        [[1.0, 1.0], [0.0, 0.0], [0.5, 0.5 + 1.01 * spread], [0.5, 0.5 + 0.99 * spread], [0.0, 2.0]],
        dtype=torch.float64,
    )
    assert live_groups(rewards).tolist() == [False, False, True, False, True]


# ---- masks ----------------------------------------------------------------------------------------------------------


def mask_by_hand(rows, eos_ids):
    masks = []
    for row in rows:
        ends = [position for position, token in enumerate(row) if token in eos_ids]
        masks.append([position <= (ends[0] if ends else len(row)) for position in range(len(row))])
    return masks


def test_masks_follow_the_position_of_the_first_end_token():
    """`tokens != pad` with pad = eos drops the end token, so the policy is never taught to stop."""
    end, other_end = 7, 8
    rows = [
        [1, 2, 3, 7, 7, 7],  # padded with the end token itself
        [1, 2, 3, 4, 5, 6],  # truncated: every token was chosen by the policy
        [7, 7, 7, 7, 7, 7],  # ended at once
        [1, 2, 8, 0, 0, 0],  # ended by the second of the end tokens
        [1, 8, 2, 7, 3, 3],  # whatever follows the first end does not count
        [1, 0, 0, 2, 3, 7],  # the padding id as an ordinary token
    ]
    mask = completion_mask(torch.tensor(rows), [end, other_end])
    assert mask.dtype == torch.bool
    assert mask.tolist() == mask_by_hand(rows, {end, other_end})


@pytest.mark.parametrize("eos_ids", [[3], (3,), {3}, 3, torch.tensor([3])])
def test_end_tokens_come_in_any_container(eos_ids):
    """Checkpoints give `eos_token_id` as a number or as a list."""
    assert completion_mask(torch.tensor([[1, 3, 3]]), eos_ids).tolist() == [[True, True, False]]


def test_no_end_token_means_no_end():
    assert completion_mask(torch.tensor([[1, 3, 3]]), []).all()


def test_masks_of_random_tokens_match_a_loop():
    tokens = torch.randint(0, 6, (200, 8), generator=torch.Generator().manual_seed(0))
    assert completion_mask(tokens, [0, 4]).tolist() == mask_by_hand(tokens.tolist(), {0, 4})


# ---- KL -------------------------------------------------------------------------------------------------------------


def test_kl_values_match_the_formulas():
    generator = torch.Generator().manual_seed(1)
    logps, ref = -5 * torch.rand(2, 40, generator=generator, dtype=torch.float64)
    for kind, formula in [
        ("k1", lambda p, r: p - r),
        ("k2", lambda p, r: (p - r) ** 2 / 2),
        ("k3", lambda p, r: math.exp(r - p) - (r - p) - 1),
    ]:
        expected = [formula(p, r) for p, r in zip(logps.tolist(), ref.tolist())]
        assert kl_penalty(logps, ref, kind).tolist() == pytest.approx(expected, rel=1e-9)


def test_k3_is_the_default_and_k3_and_k2_are_never_negative():
    """exp(d) - d - 1 in float32 is -6e-8 for some small d, and a KL below 0 rewards leaving the reference."""
    d = torch.cat([torch.logspace(-7, 1, 2000), -torch.logspace(-7, 1, 2000)])
    k3 = kl_penalty(torch.zeros_like(d), d)
    exact = kl_penalty(torch.zeros_like(d).double(), d.double(), "k3")
    assert k3.min() >= 0 and kl_penalty(torch.zeros_like(d), d, "k2").min() >= 0
    # d^2 / 2 is what is left near the reference. At |d| = 1e-3 the naive formula is 10 % off, here it is 1e-4.
    near = d.abs() > 1e-3
    torch.testing.assert_close(k3[near].double(), exact[near], rtol=1e-3, atol=0)


def test_k3_stays_finite_where_the_reference_has_left_the_float_range():
    """exp(100) is inf in float32, and one inf makes the whole step nan."""
    logps = torch.tensor([-100.0, 0.0], requires_grad=True)
    k3 = kl_penalty(logps, torch.tensor([0.0, -100.0]), "k3")
    assert k3.tolist() == pytest.approx([math.exp(20) - 101, math.exp(-20) + 99], rel=1e-6)
    (gradient,) = torch.autograd.grad(k3.sum(), logps)
    assert gradient.isfinite().all()


def test_k1_and_k3_estimate_the_true_kl_of_two_categoricals():
    """The direction matters: with tokens drawn from the policy, swapping the arguments estimates something else."""
    policy = torch.tensor([0.5, 0.25, 0.15, 0.1], dtype=torch.float64)
    reference = torch.tensor([0.2, 0.3, 0.1, 0.4], dtype=torch.float64)
    exact = sum(p * math.log(p / q) for p, q in zip(policy.tolist(), reference.tolist()))
    tokens = torch.multinomial(policy, 200_000, replacement=True, generator=torch.Generator().manual_seed(0))
    logps, ref = policy.log()[tokens], reference.log()[tokens]
    for kind in ("k1", "k3"):
        samples = kl_penalty(logps, ref, kind)
        standard_error = samples.std().item() / math.sqrt(len(samples))
        assert abs(samples.mean().item() - exact) < 4 * standard_error < 0.01
    # k2 is biased; its expectation has a closed form as well.
    expected_k2 = sum(p * math.log(p / q) ** 2 / 2 for p, q in zip(policy.tolist(), reference.tolist()))
    assert kl_penalty(logps, ref, "k2").mean().item() == pytest.approx(expected_k2, rel=0.02)
    assert abs(expected_k2 - exact) > 0.01


# ---- the entropy bonus ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["sequence", "token"])
@pytest.mark.parametrize("denominator", [None, 17.0])
def test_the_entropy_bonus_is_a_mean_with_the_denominator_of_the_loss(norm, denominator):
    """Peers average the bonus over padding or over micro-batches: its weight then depends on how a batch is cut."""
    logps, old, ref, advantages, mask, lengths = batch()
    entropies = torch.rand(logps.shape, dtype=torch.float64).masked_fill(~mask, math.nan).requires_grad_()
    settings = dict(ref_logps=ref, beta=0.04, clip_low=0.2, clip_high=0.2, norm=norm, denominator=denominator)
    plain, gradient, stats = gradient_of(logps, old, advantages, mask, **settings)
    loss, same_stats = grpo_loss(logps, old, advantages, mask, entropies=entropies, entropy_bonus=0.3, **settings)
    by_logps, by_entropies = torch.autograd.grad(loss, [logps, entropies])
    bonus = 0.0
    for i, length in enumerate(lengths):
        count = length * (denominator or len(lengths)) if norm == "sequence" else denominator or sum(lengths)
        weight = 1 / count
        bonus += 0.3 * weight * sum(entropies[i, :length].tolist())
        assert by_entropies[i].tolist() == pytest.approx([-0.3 * weight] * length + [0.0] * (9 - length), rel=1e-12)
    assert loss.item() == pytest.approx(plain - bonus, rel=1e-12)
    assert torch.equal(by_logps, gradient) and all(torch.equal(stats[name], same_stats[name]) for name in stats)


def test_without_a_bonus_entropies_change_no_bit():
    logps, old, ref, advantages, mask, _ = batch()
    settings = dict(ref_logps=ref, beta=0.04, clip_low=0.2, clip_high=0.2)
    plain = gradient_of(logps, old, advantages, mask, **settings)
    given = gradient_of(logps, old, advantages, mask, entropies=torch.rand(6, 9), entropy_bonus=0.0, **settings)
    assert plain[0] == given[0] and torch.equal(plain[1], given[1])


def test_a_bonus_without_entropies_is_refused():
    """A bonus that is silently nothing would be reported as an ablation without effect."""
    logps, old, _, advantages, mask, _ = batch()
    for entropies in (None, torch.rand(6, 1)):
        with pytest.raises(ValueError, match="entropy_bonus"):
            grpo_loss(logps, old, advantages, mask, entropies=entropies, entropy_bonus=0.1, **PLAIN)


# ---- the loss: value and gradient -----------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["sequence", "token"])
@pytest.mark.parametrize("beta", [0.0, 0.04, 1.0])
@pytest.mark.parametrize("low, high", [(0.2, 0.2), (0.1, 0.4)])
def test_value_and_gradient_match_loops_over_floats(norm, beta, low, high):
    """Real old log-probabilities: this is the second and every later inner step, where ratio and clip matter."""
    logps, old, ref, advantages, mask, lengths = batch()
    settings = dict(ref_logps=ref, beta=beta, clip_low=low, clip_high=high, norm=norm)
    loss, gradient, _ = gradient_of(logps, old, advantages, mask, **settings)
    expected = loss_and_gradient_by_hand(
        logps.tolist(), old.tolist(), advantages.tolist(), lengths, ref.tolist(), beta, low, high, norm
    )
    assert loss == pytest.approx(expected[0], rel=1e-12)
    torch.testing.assert_close(gradient, torch.tensor(expected[1], dtype=torch.float64), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("norm", ["sequence", "token"])
def test_the_gradient_matches_finite_differences(norm):
    """The formula written by hand above could share a mistake with the code; a difference quotient cannot."""
    logps, old, ref, advantages, mask, _ = batch(rows=3, width=5, seed=3)
    settings = dict(ref_logps=ref, beta=0.5, clip_low=0.2, clip_high=0.3, norm=norm)
    _, gradient, _ = gradient_of(logps, old, advantages, mask, **settings)
    for i in range(3):
        for t in range(5):
            step = torch.zeros_like(logps)
            step[i, t] = 1e-6
            up = grpo_loss(logps.detach() + step, old, advantages, mask, **settings)[0]
            down = grpo_loss(logps.detach() - step, old, advantages, mask, **settings)[0]
            assert gradient[i, t].item() == pytest.approx((up - down).item() / 2e-6, abs=1e-8)


def test_float32_agrees_with_float64():
    logps, old, ref, advantages, mask, _ = batch()
    settings = dict(beta=0.04, clip_low=0.2, clip_high=0.2)
    loss, gradient, _ = gradient_of(logps, old, advantages, mask, ref_logps=ref, **settings)
    single = logps.detach().float().requires_grad_()
    old32, ref32, advantages32 = old.float(), ref.float(), advantages.float()
    loss32, gradient32, _ = gradient_of(single, old32, advantages32, mask, ref_logps=ref32, **settings)
    assert loss32 == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(gradient32.double(), gradient, rtol=1e-4, atol=1e-6)


def mean_stats(parts):
    """Means over the tokens of all micro-batches, from their sums."""
    total = {name: sum(float(part[name]) for part in parts) for name in parts[0]}
    names = {"kl": "kl_sum", "clip_fraction": "clipped_tokens", "ratio_mean": "ratio_sum"}
    return {name: total[key] / max(total["tokens"], 1) for name, key in names.items()}


def test_at_the_first_update_the_loss_is_zero_but_its_gradient_is_not():
    """rho = 1 makes the loss -mean(A) = 0; a run whose loss is 0 learns all the same, by -A / (length * rows).

    Passing `logps` itself as `old_logps` must not cancel the gradient either.
    """
    logps, _, _, _, mask, lengths = batch(rows=4)
    advantages = group_advantages(torch.tensor([[1.0, 0.0, 0.5, 0.2]], dtype=torch.float64)).flatten()
    for old in (logps, logps.detach().clone()):
        loss, gradient, stats = gradient_of(logps, old, advantages, mask, **PLAIN)
        assert loss == pytest.approx(0.0, abs=1e-12)
        for i, length in enumerate(lengths):
            expected = [-advantages[i].item() / length / 4] * length + [0.0] * (9 - length)
            assert gradient[i].tolist() == pytest.approx(expected, rel=1e-12)
        logged = mean_stats([stats])
        assert logged == {"kl": 0.0, "clip_fraction": 0.0, "ratio_mean": 1.0}


def test_only_the_policy_gets_a_gradient():
    """A gradient into the reference would teach it to follow the policy."""
    logps, old, ref, advantages, mask, _ = batch()
    old, ref = old.requires_grad_(), ref.requires_grad_()
    loss, stats = grpo_loss(logps, old, advantages, mask, ref_logps=ref, beta=0.1, clip_low=0.2, clip_high=0.2)
    loss.backward()
    assert logps.grad.abs().sum() > 0 and old.grad is None and ref.grad is None
    assert not any(value.requires_grad for value in stats.values())


def test_with_beta_zero_a_reference_changes_the_log_but_not_the_loss():
    logps, old, ref, advantages, mask, _ = batch()
    without = gradient_of(logps, old, advantages, mask, **PLAIN)
    with_reference = gradient_of(logps, old, advantages, mask, ref_logps=ref, **PLAIN)
    assert without[0] == with_reference[0] and torch.equal(without[1], with_reference[1])
    assert without[2]["kl_sum"] == 0 and with_reference[2]["kl_sum"] > 0


# ---- clipping -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rho, advantage, loss, gradient",
    [  # low = 0.2, high = 0.5
        (1.4, 1.0, -1.4, -1.4),  # inside: a plain clip at 0.2 would have stopped here
        (1.6, 1.0, -1.5, 0.0),  # good and already likelier by more than high: enough
        (0.5, 1.0, -0.5, -0.5),  # good but less likely than before: pull it back, however far
        (0.9, -1.0, 0.9, 0.9),  # inside
        (0.7, -1.0, 0.8, 0.0),  # bad and already less likely by more than low: enough
        (0.55, -2.0, 1.6, 0.0),  # below 1 - low, though not below 1 - high
        (2.0, -1.0, 2.0, 2.0),  # bad but likelier than before: no limit
        (3.0, 0.0, 0.0, 0.0),  # no opinion
    ],
)
def test_the_clip_is_one_sided_and_has_two_widths(rho, advantage, loss, gradient):
    """Clip-higher swapped with clip-low, or a clip without the minimum, both train and both look healthy."""
    logps = torch.tensor([[math.log(rho) - 2.0]], dtype=torch.float64, requires_grad=True)
    old = torch.full((1, 1), -2.0, dtype=torch.float64)
    advantages = torch.tensor([advantage], dtype=torch.float64)
    mask = torch.ones(1, 1, dtype=torch.bool)
    got = gradient_of(logps, old, advantages, mask, beta=0.0, clip_low=0.2, clip_high=0.5)
    assert got[0] == pytest.approx(loss, abs=1e-12) and got[1].item() == pytest.approx(gradient, abs=1e-12)
    assert mean_stats([got[2]])["clip_fraction"] == (1.0 if gradient == 0 and advantage != 0 else 0.0)
    assert mean_stats([got[2]])["ratio_mean"] == pytest.approx(rho)


@pytest.mark.parametrize("gap", [50.0, 200.0, -200.0, 1e30])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_one_runaway_token_does_not_make_the_gradient_nan(gap, advantage):
    """exp(200) is inf, and inf times the 0 of the clipped branch is nan for all parameters."""
    logps = torch.tensor([[gap, -1.0]], requires_grad=True)
    mask = torch.ones(1, 2, dtype=torch.bool)
    loss, gradient, _ = gradient_of(logps, torch.tensor([[0.0, -1.0]]), torch.tensor([advantage]), mask, **PLAIN)
    assert math.isfinite(loss) and gradient.isfinite().all()
    assert gradient[0, 1].item() == pytest.approx(-advantage / 2)


# ---- padding, micro-batches, ranks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["sequence", "token"])
@pytest.mark.parametrize("junk", [0.0, -7.0, 1e4, math.inf, -math.inf, math.nan])
def test_padding_changes_nothing_whatever_it_holds(norm, junk):
    """A mask applied by multiplication after exp turns one inf of padding into a nan gradient for everything."""
    logps, old, ref, advantages, mask, _ = batch()
    settings = dict(beta=0.04, clip_low=0.2, clip_high=0.2, norm=norm)
    loss, gradient, stats = gradient_of(logps, old, advantages, mask, ref_logps=ref, **settings)

    def pad(tensor):
        filled = torch.where(mask, tensor.detach(), junk)
        return torch.cat([filled, torch.full((len(tensor), 5), junk, dtype=tensor.dtype)], dim=1)

    wide_mask = torch.cat([mask, torch.zeros(len(mask), 5, dtype=torch.bool)], dim=1)
    for which in ({"logps"}, {"old"}, {"ref"}, {"logps", "old", "ref"}):
        wide = {name: pad(t) if name in which else torch.nn.functional.pad(t.detach(), (0, 5))
                for name, t in [("logps", logps), ("old", old), ("ref", ref)]}
        padded = wide["logps"].requires_grad_()
        got = gradient_of(padded, wide["old"], advantages, wide_mask, ref_logps=wide["ref"], **settings)
        assert got[0] == pytest.approx(loss, rel=1e-12)
        torch.testing.assert_close(got[1][:, :9], gradient, rtol=1e-12, atol=0)
        assert torch.equal(got[1][~wide_mask], torch.zeros_like(got[1][~wide_mask]))
        for name, value in stats.items():
            torch.testing.assert_close(got[2][name], value, rtol=1e-12, atol=0)


@pytest.mark.parametrize("norm", ["sequence", "token"])
def test_micro_batches_add_up_to_the_whole(norm):
    """A mean of means over rows of unequal length was off by 130 % in the gradient on two ranks."""
    logps, old, ref, advantages, mask, lengths = batch()
    settings = dict(beta=0.04, clip_low=0.2, clip_high=0.2, norm=norm)
    loss, gradient, stats = gradient_of(logps, old, advantages, mask, ref_logps=ref, **settings)
    total = len(lengths) if norm == "sequence" else sum(lengths)
    parts, part_stats = [], []
    for rows in ([0], [1, 2], [3, 4, 5]):
        width = max(lengths[row] for row in rows)  # each micro-batch is padded to its own longest row only
        piece = logps[rows, :width].detach().requires_grad_()
        # The count of the step arrives as a number or, summed over ranks, as a tensor.
        denominator = total if rows == [0] else torch.tensor(total)
        part = gradient_of(piece, old[rows, :width], advantages[rows], mask[rows, :width],
                           ref_logps=ref[rows, :width], denominator=denominator, **settings)
        parts.append(part[0])
        part_stats.append(part[2])
        torch.testing.assert_close(part[1], gradient[rows, :width], rtol=1e-12, atol=0)
    assert sum(parts) == pytest.approx(loss, rel=1e-12)
    assert mean_stats(part_stats) == pytest.approx(mean_stats([stats]), rel=1e-12)


def test_the_two_norms_weigh_a_long_completion_differently():
    """Lengths 1 and 3, A = 1 and -1: means of means cancel, a token mean does not."""
    zeros, mask = torch.zeros(2, 3), torch.tensor([[True, False, False], [True, True, True]])
    advantages = torch.tensor([1.0, -1.0])
    assert grpo_loss(zeros, zeros, advantages, mask, norm="sequence", **PLAIN)[0].item() == 0.0
    assert grpo_loss(zeros, zeros, advantages, mask, norm="token", **PLAIN)[0].item() == 0.5


def test_a_row_without_tokens_adds_nothing_and_still_counts():
    """0 / 0 for one dropped completion would make the step nan; leaving it out would up-weight its siblings."""
    logps, old, ref, advantages, mask, _ = batch()
    mask = mask.clone()
    mask[2] = False
    for norm, factor in [("sequence", 5 / 6), ("token", 1.0)]:
        settings = dict(beta=0.04, clip_low=0.2, clip_high=0.2, norm=norm)
        loss, gradient, _ = gradient_of(logps, old, advantages, mask, ref_logps=ref, **settings)
        keep = [0, 1, 3, 4, 5]
        alone, _ = grpo_loss(logps[keep], old[keep], advantages[keep], mask[keep], ref_logps=ref[keep], **settings)
        assert loss == pytest.approx(alone.item() * factor, rel=1e-12)
        assert not gradient[2].any() and gradient.isfinite().all()


@pytest.mark.parametrize("norm", ["sequence", "token"])
def test_a_batch_without_any_token_gives_zero(norm):
    """A rank whose groups were all dropped still has to take part in the step."""
    for shape in ((2, 3), (0, 3), (2, 0)):
        logps = torch.zeros(shape, requires_grad=True)
        mask = torch.zeros(shape, dtype=torch.bool)
        settings = dict(ref_logps=torch.zeros(shape), beta=0.04, clip_low=0.2, clip_high=0.2, norm=norm)
        loss, gradient, stats = gradient_of(logps, torch.zeros(shape), torch.ones(shape[0]), mask, **settings)
        assert loss == 0.0 and not gradient.any()
        assert mean_stats([stats]) == {"kl": 0.0, "clip_fraction": 0.0, "ratio_mean": 0.0}


def test_the_stats_are_the_means_over_tokens():
    """A KL averaged over rows first would differ between micro-batchings of the same step."""
    logps, old, ref, advantages, mask, lengths = batch()
    _, stats = grpo_loss(logps, old, advantages, mask, ref_logps=ref, beta=0.04, clip_low=0.1, clip_high=0.3)
    ratios, kls, clipped = [], [], 0
    for i, length in enumerate(lengths):
        for t in range(length):
            d = (ref[i, t] - logps[i, t]).item()
            ratios.append(math.exp((logps[i, t] - old[i, t]).item()))
            kls.append(math.exp(d) - d - 1)
            clipped += ratios[-1] > 1.3 if advantages[i] > 0 else ratios[-1] < 0.9
    assert 0 < clipped < len(ratios)
    expected = {
        "kl": sum(kls) / len(kls),
        "clip_fraction": clipped / len(ratios),
        "ratio_mean": sum(ratios) / len(ratios),
    }
    assert mean_stats([stats]) == pytest.approx(expected, rel=1e-10)


def test_inputs_are_not_modified():
    """`advantages *= mask` inside the loss changes the numbers that are logged after it."""
    logps, old, ref, advantages, mask, _ = batch()
    rewards, tokens = torch.tensor([[0.3, 0.9]]), torch.tensor([[1, 2, 2]])
    inputs = [logps, old, ref, advantages, mask, rewards, tokens]
    before = [tensor.detach().clone() for tensor in inputs]
    grpo_loss(logps, old, advantages, mask, ref_logps=ref, beta=0.1, clip_low=0.2, clip_high=0.2)[0].backward()
    group_advantages(rewards), live_groups(rewards), completion_mask(tokens, [2]), kl_penalty(old, ref)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(inputs, before))


def test_shapes_that_broadcasting_would_accept_are_refused():
    """Two groups of two with advantages (2, 2) instead of (4,) once gave a plausible loss for the wrong rows."""
    logps, mask = torch.zeros(4, 2), torch.ones(4, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="advantages"):
        grpo_loss(logps, logps, torch.zeros(2, 2), mask, **PLAIN)
    with pytest.raises(ValueError, match="advantages"):
        grpo_loss(logps, logps, torch.zeros(1), mask, **PLAIN)
    with pytest.raises(ValueError, match="old_logps"):
        grpo_loss(logps, logps[:1], torch.zeros(4), mask, **PLAIN)
    with pytest.raises(ValueError, match="mask"):
        grpo_loss(logps, logps, torch.zeros(4), mask[:, :1], **PLAIN)
    with pytest.raises(ValueError, match="ref_logps"):
        grpo_loss(logps, logps, torch.zeros(4), mask, ref_logps=logps[:, :1], beta=0.1, clip_low=0.2, clip_high=0.2)


def test_a_kl_weight_without_a_reference_is_refused():
    """Silently training without the KL is the kind of mistake that shows after a day."""
    logps = torch.zeros(1, 1)
    with pytest.raises(ValueError, match="ref_logps"):
        grpo_loss(logps, logps, torch.zeros(1), logps == 0, beta=0.04, clip_low=0.2, clip_high=0.2)


def edited(sample, text, value=None):
    """A reward that somebody has edited."""
    return rewards.Score(value, {"temporal_iou": value, "format": 0.0}, "ok") if value is not None else sample["span"]


@pytest.mark.parametrize("value, said", [
    (None, r"raised KeyError \('span'\) in edited, test_grpo.py line \d+"), (math.nan, "temporal_iou is nan, the total is nan, of task qa"),
    (math.inf, "temporal_iou is inf"), ("1", "raised TypeError .*, grpo.py line")])
def test_a_reward_that_fails_is_named_with_its_sample_and_completion(model, prompts, value, said):
    """One nan among siblings made every advantage of the group nan, and the run ended five steps later without a reason."""
    with pytest.raises(ValueError, match=f"the reward .*{said}.*, for sample a and the completion '"):
        rollout(model, prompts, partial(edited, value=value), group_size=2, max_new_tokens=2, temperature=1.0, seeds=[0, 1, 2])


def test_gradient_descent_on_the_loss_finds_the_rewarded_token():
    """The sign of everything at once: a policy over five tokens, paid for token 3, with a KL to where it started."""
    torch.manual_seed(0)
    logits = torch.zeros(5, requires_grad=True)
    optimiser = torch.optim.SGD([logits], lr=1.0)
    for _ in range(60):
        tokens = torch.multinomial(logits.softmax(0), 16, replacement=True)
        advantages = group_advantages((tokens == 3).float()[None]).flatten()
        old = logits.log_softmax(0)[tokens][:, None].detach()
        for _ in range(2):  # the second inner step has rho != 1
            logps = logits.log_softmax(0)[tokens][:, None]
            loss, _ = grpo_loss(logps, old, advantages, torch.ones_like(logps, dtype=torch.bool),
                                ref_logps=torch.full_like(logps, -math.log(5)), beta=0.04, clip_low=0.2, clip_high=0.2)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    assert logits.softmax(0)[3] > 0.9


# ---- through a model -------------------------------------------------------------------------------------------------


def make_groups(model, prompts, **settings):
    model.eos_ids = [-1]
    settings = {"group_size": 3, "max_new_tokens": 6, "temperature": 1.0} | settings
    groups = rollout(model, prompts, rewards.score, seeds=list(range(len(prompts))), **settings)
    for group in groups:
        group.advantages = torch.linspace(-1, 1, len(group.texts))
    return groups


LOSS = partial(grpo_loss, beta=0.04, clip_low=0.2, clip_high=0.2)
WITHOUT_KL = partial(LOSS, beta=0.0)


def test_a_bfloat16_reference_is_the_policy_before_the_first_step(model, model_folder, prompts):
    """A float32 policy adds up float32 from layer to layer, a bfloat16 reference bfloat16 unless it is told: a KL of
    4.6e-3 to itself, paid for from the first step on. Under CPU autocast, the arithmetic of a GPU."""
    with torch.no_grad():
        for p in model.hf.parameters():
            p.copy_(p.bfloat16())  # a published checkpoint holds such weights
    model.hf.save_pretrained(model_folder / "rounded")
    model.tokenizer.save_pretrained(model_folder / "rounded")
    reference = VideoLM.load(str(model_folder / "rounded"), dtype=torch.bfloat16)
    reference.hf.requires_grad_(False)
    model.autocast = reference.autocast = torch.bfloat16
    groups = make_groups(model, prompts)
    ours, theirs = (grpo.score_groups(scorer, groups, 1.0) for scorer in (model, reference))
    assert all(torch.equal(a.logps, b.logps) for a, b in zip(ours, theirs))
    sums = accumulate_gradients(model, reference, groups, LOSS, 9)
    assert sums["kl_sum"] == 0.0 and sums["tokens"] == 54


def test_a_pack_looks_its_tokens_up_once(model, prompts):
    """Each look-up leaves a dense gradient of the size of the embedding matrix: two a group were 1.2 GB each at 3B."""
    groups = make_groups(model, prompts)
    calls = []
    hook = model.text.embed_tokens.register_forward_hook(lambda module, inputs, output: calls.append(inputs[0].numel()))
    accumulate_gradients(model, None, groups, WITHOUT_KL, 9)
    hook.remove()
    assert calls == [sum(len(group.prompt.ids) + 3 * 5 for group in groups)]


def test_out_of_memory_names_the_samples_and_their_lengths(model, prompts, monkeypatch):
    """"Tried to allocate 2.3 GiB" does not say which of eight questions was too long, nor what to do about it."""
    groups = make_groups(model, prompts)

    def too_much(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.30 GiB")

    monkeypatch.setattr(model, "logprobs_packed", too_much)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        accumulate_gradients(model, None, groups, WITHOUT_KL, 9)
    text = memory.message(caught.value, torch.device("cpu"), " in grpo step 7")
    longest = max(prompts, key=lambda prompt: len(prompt.ids))
    assert text.startswith("out of memory in grpo step 7, in scoring " + longest.sample["id"])
    assert f"prompt of {len(longest.ids)} tokens" in text and "3 completions each of up to 6 tokens" in text
    assert "--pack_tokens 1" in text and "--gradient_checkpointing" in text and "2.30 GiB" in text
    monkeypatch.setattr(model, "generate", too_much)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        make_groups(model, prompts)
    text = memory.message(caught.value, torch.device("cpu"))
    assert "in sampling " + longest.sample["id"] in text and "--group_size" in text


# ---- on a GPU -------------------------------------------------------------------------------------------------------


def step_gradient(model, reference, groups) -> tuple[dict[str, float], torch.Tensor, torch.Tensor]:
    """What is logged of a step on these groups, its gradient, and |sampled - scored| of each token, on the CPU."""
    tensors = ("tokens", "mask", "sampled_logps", "advantages")
    groups = [dataclasses.replace(group, **{name: getattr(group, name).to(model.device) for name in tensors})
              for group in groups]
    sums = accumulate_gradients(model, reference, groups, partial(LOSS, entropy_bonus=0.01), 12.0, with_entropy=True)
    gaps = [(group.old_logps - group.sampled_logps).abs()[group.mask].cpu() for group in groups]
    return sums, torch.cat([p.grad.flatten().cpu() for p in model.hf.parameters() if p.grad is not None]), torch.cat(gaps)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, most", [(torch.float32, 1e-3), (torch.bfloat16, 0.1)])
def test_a_step_on_a_gpu_is_the_step_on_the_cpu(model, model_folder, prompts, gpu, dtype, most):
    """The same completions through policy, reference and loss: sums that are logged, and the gradient of all weights."""
    groups = rollout(model, prompts, rewards.score, group_size=4, max_new_tokens=12, temperature=1.0, seeds=[1, 2, 3])
    for group in groups:
        group.advantages = torch.tensor([1.0, -0.5, 0.25, -1.5])
    other, references = VideoLM.load(str(model_folder), gpu), [VideoLM.load(str(model_folder), d) for d in ("cpu", gpu)]
    for lm in (other, references[1]):
        lm.autocast = None if dtype == torch.float32 else dtype
    with torch.no_grad():
        for reference in references:  # another model than the policy, so that there is a KL
            reference.text.norm.weight *= 1.1
    expected, gradient, _ = step_gradient(model, references[0], groups)
    found, found_gradient, gaps = step_gradient(other, references[1], groups)
    assert found["tokens"] == expected["tokens"] > 50 and expected["kl_sum"] > 0
    assert gaps.mean() < min(0.05, most)  # sampled on the CPU, scored on the GPU
    for name in ("loss", "kl_sum", "entropy_sum"):
        assert found[name] == pytest.approx(expected[name], rel=most, abs=most)
    assert (found_gradient - gradient).norm() < most * gradient.norm()
