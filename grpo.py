"""GRPO: from the rewards of a group to the loss of a step as pure functions of tensors, then the group itself.

Group Relative Policy Optimisation (Shao et al. 2024, arXiv 2402.03300, section 4.1) in ten lines, in the form that
VideoChat-R1 (arXiv 2504.06958) and Temporal-RLT (arXiv 2506.01908) share:

 1. Ask one question about one video and sample G completions from the policy at temperature T.
 2. Score each of them with rules: r_1 ... r_G. Nothing about the score is learned.
 3. Compare siblings only: A_i = (r_i - mean r) / (std r + 1e-4)                     -> `group_advantages`
 4. A group whose rewards are all equal has A = 0 everywhere and teaches nothing     -> `live_groups`
 5. Every token of completion i up to and including its end token gets A_i           -> `completion_mask`
 6. rho = pi(token) / pi_old(token) says how far the policy has moved since sampling.
 7. Raise what was better, lower what was worse, and stop pushing once rho has left [1 - low, 1 + high].
 8. Pay beta * KL(policy || reference), so that the model does not forget its language -> `kl_penalty`
 9. Average over tokens and completions, with one denominator for the whole step       -> `grpo_loss`
10. Take one optimiser step, throw the completions away, go to 1.

Read it in that order, which is the order of the file; at its end `rollout` (1 and 2) and `accumulate_gradients` (6 to 9
for a whole step) put the pieces together. Shapes: Q questions, G completions of one question,
B = rows scored together (any number of completions, of one question or of several), C tokens of the longest one.

Left out on purpose: the value network and GAE of PPO (the mean of the siblings is the baseline, and one advantage
serves all tokens of a completion), a learned reward model, KL inside the reward, sequence-level ratios (GSPO), and
filtering of overlong completions.
"""

import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property, partial
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data import Prompt
from lib.memory import note_if_out_of_memory, sizes
from model import TokenScores, VideoLM

Loss = Callable[..., tuple[Tensor, dict[str, Tensor]]]  # `grpo_loss` with its settings filled in, or another like it

# A spread of rewards below this is rounding, not a preference. The same number damps the division: without it, seven
# equal rewards and one that is 1e-9 higher would shout as loudly as seven zeros and a one.
STD_FLOOR = 1e-4

# exp(20) is 5e8: far beyond any healthy ratio, and still finite in float32 when squared. Without the limit one stale
# token overflows to inf, and inf * 0 in the backward pass turns the gradient of the whole step into nan.
MAX_LOG_RATIO = 20.0


# ---- from rewards to advantages -------------------------------------------------------------------------------------


def group_advantages(rewards: Tensor, scale: str = "group") -> Tensor:
    """How much better each completion is than its siblings: (Q, G) rewards -> (Q, G) advantages.

    `scale="group"` is A = (r - mean) / (std + 1e-4) with the unbiased std of the group (VideoChat-R1; Temporal-R1's
    code has 1e-6); `scale="none"` keeps r - mean. A group whose rewards are all equal, and so every group of one,
    gives exactly 0. ValueError for another `scale`.

    >>> rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0],      # the one good answer is pushed up three times as hard
    ...                         [1.0, 1.0, 1.0, 0.0],      # the one bad answer is pushed down three times as hard
    ...                         [0.6, 0.2, 0.2, 0.6],      # a small spread counts as much as a large one ...
    ...                         [2.0, 2.0, 2.0, 2.0],      # ... but none counts for nothing: all right
    ...                         [0.0, 0.0, 0.0, 0.0]])     # all wrong
    >>> group_advantages(rewards)
    tensor([[ 1.4997, -0.4999, -0.4999, -0.4999],
            [ 0.4999,  0.4999,  0.4999, -1.4997],
            [ 0.8657, -0.8657, -0.8657,  0.8657],
            [ 0.0000,  0.0000,  0.0000,  0.0000],
            [ 0.0000,  0.0000,  0.0000,  0.0000]])
    >>> group_advantages(rewards, scale="none")[0]
    tensor([ 0.7500, -0.2500, -0.2500, -0.2500])
    """
    if scale not in ("group", "none"):
        raise ValueError(f"scale is 'group' or 'none', not {scale!r}")
    advantages, std = _centre(rewards)
    if scale == "group":
        # /std up-weights questions that are almost always right or almost always wrong; Dr. GRPO
        # (arXiv 2503.20783) drops it, which is scale="none".
        advantages = advantages / (std + STD_FLOOR)
    # The mean of G equal numbers need not be that number: float32 leaves advantages of up to 0.005 in a group without
    # any difference, float64 still 4e-12. Only an explicit 0 is 0.
    all_equal = rewards.amax(dim=1, keepdim=True) == rewards.amin(dim=1, keepdim=True)  # (Q, 1)
    return advantages.masked_fill(all_equal, 0.0).to(torch.promote_types(rewards.dtype, torch.float32))


def live_groups(rewards: Tensor) -> Tensor:
    """Which groups teach something: (Q, G) rewards -> (Q,) bool, true where std > 1e-4.

    The other groups have (almost) no policy gradient, so the forward passes for them can be saved.

    >>> live_groups(torch.tensor([[1.0, 0.0, 0.0, 0.0], [2.0, 2.0, 2.0, 2.0], [0.5, 0.5, 0.5, 0.50001]]))
    tensor([ True, False, False])
    """
    _, std = _centre(rewards)
    return std.squeeze(1) > STD_FLOOR


def _centre(rewards: Tensor) -> tuple[Tensor, Tensor]:
    """(Q, G) rewards -> (Q, G) deviations from the group's mean and (Q, 1) unbiased std, both in float64."""
    centred = rewards.double()
    centred = centred - centred.mean(dim=1, keepdim=True)
    # max(..., 1): one completion has no spread, where Tensor.std would warn and return nan.
    variance = centred.square().sum(dim=1, keepdim=True) / max(rewards.shape[1] - 1, 1)
    return centred, variance.sqrt()


# ---- which tokens count ---------------------------------------------------------------------------------------------


def completion_mask(tokens: Tensor, eos_ids: int | Iterable[int]) -> Tensor:
    """The tokens that the policy chose: (G, C) ids -> (G, C) bool, true up to and including the first end token.

    Any of `eos_ids` ends a completion. The first one stays in: "stop here" is an action, and a policy that is never
    rewarded for it stops stopping. A completion without an end token was cut at the length limit and counts whole.

    Positions decide, not values. With pad = eos, as in many tokenizers, a mask `tokens != pad` loses the end token.
    Where rows of different groups are brought to one width later, pad this mask with False, do not compute it anew:
    in a padded row without an end token the padding is indistinguishable from text.

    >>> completion_mask(torch.tensor([[5, 6, 2, 2, 2],      # end token 2, then padding with the same id
    ...                               [5, 6, 7, 8, 9],      # truncated
    ...                               [3, 2, 6, 0, 0]]),    # the other end token at once; what follows is never read
    ...                 eos_ids=[2, 3]).int()
    tensor([[1, 1, 1, 0, 0],
            [1, 1, 1, 1, 1],
            [1, 0, 0, 0, 0]], dtype=torch.int32)
    """
    ids = [eos_ids] if isinstance(eos_ids, int) else list(eos_ids)
    is_end = torch.isin(tokens, torch.tensor(ids, dtype=tokens.dtype, device=tokens.device)).long()
    ends_before = is_end.cumsum(dim=-1) - is_end  # (G, C): end tokens strictly to the left
    return ends_before == 0


# ---- staying close to the reference ---------------------------------------------------------------------------------


def kl_penalty(logps: Tensor, ref_logps: Tensor, kind: str = "k3") -> Tensor:
    """Estimate KL(policy || reference) for each sampled token, in nats, of the same shape as `logps`.

    With d = ref - logp (Schulman, "Approximating KL Divergence", 2020):

        k1 = -d                unbiased, but many of its values are negative
        k2 = d^2 / 2           never negative, biased
        k3 = exp(d) - d - 1    never negative and unbiased: what both methods use; noisy where d is large

    Tokens must come from the policy for any of this to estimate the KL. That is about the values: as a loss k1 has no
    gradient in expectation, k2 that of KL(policy || reference), k3 that of KL(reference || policy); `tools/kl_lab.py`
    measures it, docs/kl.md has figures. ValueError for another `kind`.

    >>> logps, ref_logps = torch.tensor([-1.0, -2.0, -1.0]), torch.tensor([-2.0, -1.0, -1.0])
    >>> kl_penalty(logps, ref_logps, "k1")
    tensor([ 1., -1.,  0.])
    >>> kl_penalty(logps, ref_logps, "k2")
    tensor([0.5000, 0.5000, 0.0000])
    >>> kl_penalty(logps, ref_logps, "k3")
    tensor([0.3679, 0.7183, 0.0000])
    """
    d = ref_logps - logps
    if kind == "k1":
        return logps - ref_logps
    if kind == "k2":
        return d.square() / 2
    if kind == "k3":
        # expm1, not exp(d) - 1: near the reference k3 is d^2 / 2, and float32 rounds all of it away for |d| < 3e-4.
        # The price of the limit: where d > 20 only the linear term has a gradient, and it points the wrong way.
        # Such a token would be sampled once in 5e8 times.
        return torch.expm1(d.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)) - d
    raise ValueError(f"kind is 'k1', 'k2' or 'k3', not {kind!r}")


# ---- the loss -------------------------------------------------------------------------------------------------------


def grpo_loss(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    ref_logps: Tensor | None = None,
    beta: float,
    clip_low: float,
    clip_high: float,
    norm: str = "sequence",
    denominator: float | Tensor | None = None,
    entropies: Tensor | None = None,
    entropy_bonus: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped policy-gradient loss with a KL penalty (arXiv 2402.03300, equation 3): a scalar to minimise, stats.

        loss per token = -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) + beta * k3,  rho = exp(logp - old_logp)

    `logps`, `old_logps`, `ref_logps`: (B, C) log-probabilities of the sampled tokens under the policy, the policy that
    sampled them and the reference; only `logps` gets a gradient. `advantages`: (B,), one a row. `mask`: (B, C) bool;
    what stands where it is false, nan and inf included, changes neither the value nor the gradient.

    `norm="sequence"`: mean over the tokens of a completion, then over completions (VideoChat-R1): each completion has
    the same weight, so a token of a short one has more. `norm="token"`: one mean over all tokens (Temporal-RLT).
    `denominator` replaces that last count, of completions or of tokens: pass the count of the whole step, over all
    micro-batches and ranks, and sum the losses and gradients. A row without tokens adds 0, and counts as a completion.

    `entropies` (B, C), with gradient: those of the distributions the tokens were sampled from. Each token's loss falls
    by `entropy_bonus` times its own (Temporal-R1's code: 1e-3), which pays the policy for staying undecided.

    Stats are sums over tokens, for the same reason: divide by their `tokens` at the end of the step. ValueError for
    shapes that do not fit, for an unknown `norm`, and for beta > 0 without a reference or a bonus without entropies.

    One token, sampled with probability 0.4 and now at 0.6, so rho = 1.5. In a good answer it has had its share: the
    clip at 1 + 0.2 leaves no gradient. In a bad answer nothing holds the policy back from undoing the move.

    >>> logps, old_logps = torch.tensor([[0.6]]).log().requires_grad_(), torch.tensor([[0.4]]).log()
    >>> settings = dict(mask=torch.tensor([[True]]), beta=0.0, clip_low=0.2, clip_high=0.2)
    >>> for advantage in (1.0, -1.0):
    ...     loss, _ = grpo_loss(logps, old_logps, torch.tensor([advantage]), **settings)
    ...     print(f"A = {advantage:+}: loss {loss:+.2f}, gradient {torch.autograd.grad(loss, logps)[0].item():+.2f}")
    A = +1.0: loss -1.20, gradient +0.00
    A = -1.0: loss +1.50, gradient +1.50
    """
    _check_loss_inputs(logps, old_logps, advantages, mask, ref_logps, beta, norm)
    if entropy_bonus and (entropies is None or entropies.shape != logps.shape):
        raise ValueError(f"entropy_bonus = {entropy_bonus} needs entropies like logps, {tuple(logps.shape)}; got "
                         f"{entropies if entropies is None else tuple(entropies.shape)}")
    mask = mask.bool()
    # Select before exp, not after: nan * 0 is nan, and so is the gradient of a branch that was never used.
    log_ratio = torch.where(mask, logps - old_logps.detach(), 0.0)  # (B, C)
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    gain = ratio * advantages[:, None]  # (B, C)
    clipped_gain = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages[:, None]
    # min, not the clipped gain alone: the limit holds only for moves that the advantage asked for.
    token_loss = -torch.minimum(gain, clipped_gain)

    kl = torch.zeros_like(token_loss)
    if ref_logps is not None:
        # Equal at masked positions, so d, k3 and its gradient are 0 there.
        kl = kl_penalty(torch.where(mask, logps, 0.0), torch.where(mask, ref_logps.detach(), 0.0), "k3")
        token_loss = token_loss + beta * kl
    if entropy_bonus:
        token_loss = token_loss - entropy_bonus * entropies
    token_loss = torch.where(mask, token_loss, 0.0)

    lengths = mask.sum(dim=1)  # (B,)
    if norm == "sequence":
        total, count = (token_loss.sum(dim=1) / lengths.clamp(min=1)).sum(), max(len(mask), 1)
    else:
        total, count = token_loss.sum(), lengths.sum().clamp(min=1)
    loss = total / (count if denominator is None else denominator)
    stats = {"tokens": mask, "kl_sum": kl, "ratio_sum": ratio, "clipped_tokens": clipped_gain < gain, "nll_sum": -logps}
    stats |= {"entropy_sum": entropies} if entropies is not None else {}
    # Selected again, for the masked positions of what went into the loss above; nothing here waits for the GPU.
    return loss, {name: torch.where(mask, x.detach(), 0).sum() for name, x in stats.items()}


def _check_loss_inputs(logps, old_logps, advantages, mask, ref_logps, beta, norm) -> None:
    """Refuse what broadcasting would swallow: (Q, G) advantages against (B, C) log-probabilities give a number too."""
    if norm not in ("sequence", "token"):
        raise ValueError(f"norm is 'sequence' or 'token', not {norm!r}")
    if beta > 0 and ref_logps is None:
        raise ValueError(f"beta = {beta} needs ref_logps; pass beta=0 to train without a reference")
    for name, tensor in [("old_logps", old_logps), ("mask", mask), ("ref_logps", ref_logps)]:
        if tensor is not None and tensor.shape != logps.shape:
            raise ValueError(f"{name} is {tuple(tensor.shape)}, logps is {tuple(logps.shape)}: both are (B, C)")
    if advantages.shape != logps.shape[:1]:
        raise ValueError(f"advantages is {tuple(advantages.shape)}, not ({len(logps)},): one a row, (Q, G) flattened")


# ---- the group: from questions to completions with advantages -------------------------------------------------------


@dataclass
class Group:
    """One question, its G completions and what is known about them."""

    prompt: Prompt
    tokens: Tensor  # (G, C), padded behind the end token
    mask: Tensor  # (G, C) bool: the tokens the policy chose
    advantages: Tensor  # (G,)
    sampled_logps: Tensor | None = None  # (G, C), as the sampler saw them; None where nothing was sampled (SFT)
    texts: list[str] = field(default_factory=list)
    scores: list = field(default_factory=list)  # rewards.Score: total, parts, reason
    reasons: list[str] = field(default_factory=list)
    video: Tensor | None = None  # (V, D) as sampled, where the vision tower is frozen and would only repeat it
    old_logps: Tensor | None = None  # (G, C): scored before the first of several updates

    @property
    def num_tokens(self) -> int:
        return int(self.mask.sum())

    @property
    def needs_tower(self) -> bool:
        return self.prompt.patches is not None and self.video is None

    @cached_property
    def is_live(self) -> bool:
        return bool(live_groups(torch.tensor([[score.total for score in self.scores]], dtype=torch.float64)))


@torch.no_grad()
def rollout(policy: VideoLM, prompts: list[Prompt], score: Callable[[dict, str], Any], *, group_size: int,
            max_new_tokens: int, temperature: float, seeds: list[int], scale: str = "group") -> list[Group]:
    """Sample `group_size` completions of each prompt and score them: (sample, text) -> rewards.Score. A group a prompt.

    Evaluation and data selection use this same function, with temperature 0 or other group sizes: what is measured is
    sampled, cut, decoded and scored exactly like what is trained on. `scale` as in `group_advantages`.
    """
    if not prompts:  # a rank whose share of a step is empty, or unreadable
        return []
    completions = f"{group_size} completions each of up to {max_new_tokens} tokens"
    with note_if_out_of_memory("sampling", partial(sizes, prompts, completions)):
        videos = policy.encode_prompts(prompts)
        embeds = [policy.embed(prompt.ids, video) for prompt, video in zip(prompts, videos)]
        sampled = policy.generate(embeds, [prompt.positions for prompt in prompts], group_size=group_size,
                                  max_new_tokens=max_new_tokens, temperature=temperature, seeds=seeds)
    groups = []
    for prompt, video, (tokens, logps) in zip(prompts, videos, sampled):
        mask = completion_mask(tokens, policy.eos_ids)
        texts = [policy.tokenizer.decode(row[keep], skip_special_tokens=True) for row, keep in zip(tokens, mask)]
        scores = [score_or_name(score, prompt.sample, text) for text in texts]
        ended = torch.isin(tokens, torch.tensor(policy.eos_ids, device=tokens.device)).any(dim=1)  # (G,)
        reasons = [scored.reason if end else "truncated" for scored, end in zip(scores, ended.tolist())]
        rewards = torch.tensor([[scored.total for scored in scores]], dtype=torch.float64)  # (1, G)
        advantages = group_advantages(rewards, scale)[0].float().to(tokens.device)
        kept = video if policy.vision_is_frozen else None
        groups.append(Group(prompt, tokens, mask, advantages, logps, texts, scores, reasons, kept))
    return groups


def score_or_name(score: Callable[[dict, str], Any], sample: dict, text: str) -> Any:
    """The score of one completion. ValueError that names reward, sample and completion where a reward, which anybody may have
    edited, raises or is no finite number: one nan among siblings makes the advantages of all of them nan."""
    told = f"for sample {sample.get('id')} and the completion {text!r}"
    try:
        scored = score(sample, text)
        wrong = {name: value for name, value in {**scored.parts, "the total": scored.total}.items() if not isfinite(value)}
    except torch.OutOfMemoryError:  # of a judge; what lowers it is said elsewhere
        raise
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise ValueError(f"the reward raised {type(error).__name__} ({error}) in {place.name}, {Path(place.filename).name} line "
                         f"{place.lineno}, {told}") from error
    if wrong:
        raise ValueError(f"the reward is no finite number: {', '.join(f'{name} is {value}' for name, value in wrong.items())}, "
                         f"of task {sample.get('task')}, {told}")
    return scored


# ---- the update: from groups to gradients ---------------------------------------------------------------------------


def accumulate_gradients(policy: VideoLM, reference: VideoLM | None, groups: list[Group], loss: Loss, denominator: float, *,
                         temperature: float = 1.0, with_entropy: bool = False) -> dict[str, float]:
    """Add the gradient of `loss` over `groups` to the policy's parameters; returns sums over tokens to be logged.

    `loss` is `grpo_loss` with its settings filled in, or anything that takes and returns the same. Groups go through
    the model in packs that fit its `pack_tokens`; the common `denominator` makes the packs, and the ranks, add up to
    the gradient of the whole step. `reference`: None leaves out the KL; with LoRA it is the policy itself, scored
    without its adapters. Where the policy is sharded, all ranks call this together.
    """
    sums: Counter = Counter()
    packs = [[groups[i] for i in pack] for pack in policy.pack([g.prompt.ids.numel() + g.tokens.numel() for g in groups])]
    if policy.sharding:  # a pass is a chain of calls that all ranks make together
        packs = policy.sharding.equalise_passes(packs, partial(idle_group, policy))
    for pack in packs:
        with note_if_out_of_memory("scoring", partial(describe_pack, pack)):
            # Scored again although sampling has told log-probabilities: those have no gradient, and were rounded otherwise.
            scored = score_groups(policy, pack, temperature, with_entropy)
            ref_logps: list = [None] * len(pack)
            if reference is not None:
                with torch.no_grad(), reference.as_reference():
                    ref_logps = [tokens.logps for tokens in score_groups(reference, pack, temperature)]
            pack_loss = 0.0
            for group, (logps, entropies), ref in zip(pack, scored, ref_logps):
                if group.old_logps is None:  # the first update: the policy that is scored is still the one that sampled
                    group.old_logps = logps.detach()
                group_loss, stats = loss(logps, group.old_logps, group.advantages, group.mask, ref_logps=ref,
                                         denominator=denominator, entropies=entropies)
                pack_loss = pack_loss + group_loss
                sums.update({name: float(value) for name, value in stats.items()})
            sums["loss"] += float(pack_loss.detach())
            pack_loss.backward()
    return sums


def describe_pack(groups: list[Group]) -> str:
    longest = max(group.tokens.shape[1] for group in groups)
    return sizes([group.prompt for group in groups], f"{len(groups[0].tokens)} completions each of up to {longest} tokens")


def score_groups(model: VideoLM, groups: list[Group], temperature: float, with_entropy: bool = False) -> list[TokenScores]:
    """Log-probabilities of each group's completions under `model`, differentiable through its vision tower too."""

    def work() -> list[TokenScores]:
        encoded = iter(model.encode_prompts([group.prompt for group in groups if group.needs_tower]))
        videos = [next(encoded) if group.needs_tower else group.video for group in groups]
        tokens = [group.tokens for group in groups]
        embeds, fed = model.embed_groups([group.prompt.ids for group in groups], videos, tokens)
        return model.logprobs_packed(embeds, [g.prompt.positions for g in groups], tokens, temperature,
                                     with_entropy=with_entropy, fed=fed)

    return model.sharding.inside(work) if model.sharding else work()


def idle_group(model, prompt) -> Group:
    """A group without a single token that counts: it goes through the model, and adds 0 to the loss and its gradient."""
    end = torch.full((1, 1), model.tokenizer.eos_token_id, device=model.device)  # (G, C) = (1, 1)
    nothing = torch.zeros(1, 1, device=model.device)
    return Group(prompt, end, end < 0, advantages=nothing[0])


if __name__ == "__main__":  # one step with made-up numbers, from rewards to gradient, to be followed with a calculator
    from tools.walk import main

    main()
