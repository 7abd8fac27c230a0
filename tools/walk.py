"""One step of GRPO with made-up numbers, to be followed with a calculator: `python grpo.py`.

One question, four completions of up to three words, a vocabulary of four, and a policy that looks at nothing but the place: a
word's probability is one number of a 3 x 4 table. The functions are those that train a real model (grpo.py); what they do not
hand out (the ratio, each token's gradient) is worked out here by the formula that is printed, and compared with theirs.
"""

import argparse

import torch
from torch import Tensor

from grpo import completion_mask, group_advantages, grpo_loss, kl_penalty

WORDS = ["<end>", "red", "blue", "then"]
END = 0
SAID = torch.tensor([[1, 0, 0],    # red <end>, padded with <end>
                     [2, 0, 0],    # blue <end>
                     [1, 3, 0],    # red then <end>
                     [2, 2, 2]])   # blue blue blue: cut at the limit of three words
REWARDS = torch.tensor([[1.0, 0.0, 0.0, 0.0]])  # the one right answer is "red"

# Probabilities of the four words (columns) at the three places (rows): of the policy that sampled, of the policy now, which an
# optimiser step on the same completions has moved (--inner_steps 2; in a first step both are the same), and of the reference.
OLD = torch.tensor([[0.10, 0.40, 0.40, 0.10],
                    [0.50, 0.10, 0.20, 0.20],
                    [0.60, 0.10, 0.20, 0.10]])
NOW = torch.tensor([[0.10, 0.50, 0.30, 0.10],
                    [0.55, 0.10, 0.18, 0.17],
                    [0.60, 0.10, 0.22, 0.08]])
REF = torch.tensor([[0.10, 0.30, 0.45, 0.15],
                    [0.40, 0.10, 0.25, 0.25],
                    [0.50, 0.10, 0.20, 0.20]])
BETA, CLIP = 0.1, 0.2
LEARNING_RATE = 1.0  # large, to see it


def logps_of(logits: Tensor) -> Tensor:
    """Logits (3, 4) of a table -> log-probabilities (4, 3) of the words that were said."""
    return logits.log_softmax(dim=1).expand(len(SAID), -1, -1).gather(2, SAID[:, :, None]).squeeze(2)


def main(arguments: list[str] | None = None) -> None:
    argparse.ArgumentParser(prog="grpo.py", description="One step of GRPO with made-up numbers, to be followed with a calculator. "
                                                        "It takes no settings; to train, see train.py.").parse_args(arguments)
    print("One step of GRPO on one question: G = 4 completions of up to C = 3 words, V = 4 words.")
    mask, advantages = show_rewards()
    logits = NOW.log().requires_grad_()  # (3, 4); softmax(log p) = p, so the table is the policy
    logps, old_logps, ref_logps = logps_of(logits), logps_of(OLD.log()), logps_of(REF.log())  # (4, 3) each
    loss, stats = grpo_loss(logps, old_logps, advantages, mask, ref_logps=ref_logps, beta=BETA, clip_low=CLIP, clip_high=CLIP)
    by_hand = show_loss(logps.detach(), old_logps, ref_logps, advantages, mask)
    heading("   loss of the step: the mean of these four, and what grpo_loss returns, a scalar")
    print(f"      by hand {by_hand.item():.4f}, grpo_loss {loss.item():.4f}; clipped {int(stats['clipped_tokens'])} of "
          f"{int(stats['tokens'])} tokens, mean k3 {(stats['kl_sum'] / stats['tokens']).item():.4f}")
    difference("grpo_loss and the formulas", loss.detach(), by_hand)
    show_gradient(loss, logps, old_logps, ref_logps, advantages, mask, logits)


def show_rewards() -> tuple[Tensor, Tensor]:
    """Steps 1 to 5 of README's ten lines: the mask (4, 3) and the advantages (4,)."""
    mask = completion_mask(SAID, END)  # (4, 3)
    heading("1. completions, ids (4, 3); 2. rewards (1, 4); 5. completion_mask (4, 3): what counts, up to the first <end>")
    for i, row in enumerate(SAID.tolist()):
        words = " ".join(f"{WORDS[word] if keep else '-':6}" for word, keep in zip(row, mask[i]))
        print(f"   {i + 1}  {words}  ids {row}  mask {mask[i].int().tolist()}  r = {REWARDS[0, i].item():.1f}")
    heading("3. advantages, group_advantages: A = (r - mean) / (std + 0.0001), (1, 4)")
    print(f"   mean {REWARDS.mean().item():.4f}, std {REWARDS.std().item():.4f} (divided by G - 1 = 3)")
    advantages = group_advantages(REWARDS)[0]
    print("   A  " + numbers(advantages))
    return mask, advantages


def show_loss(logps: Tensor, old_logps: Tensor, ref_logps: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """Steps 6 to 8, by hand; the loss that they add up to."""
    ratio = (logps - old_logps).exp()  # (4, 3)
    A = advantages[:, None]  # (4, 1)
    show("6. ratio rho = p now / p old of the word that was said, (4, 3)", ratio, mask)
    show("7. gain = min(rho A, clip(rho, 0.8, 1.2) A), (4, 3); * where the clip decides, and no gradient is left",
         gain := torch.minimum(ratio * A, ratio.clamp(1 - CLIP, 1 + CLIP) * A), mask, starred=gain < ratio * A)
    kl = kl_penalty(logps, ref_logps)
    show("8. KL to the reference, kl_penalty: k3 = e^d - d - 1, d = log(p ref / p now), (4, 3)", kl, mask)
    token_loss = -gain + BETA * kl
    show(f"   loss of a token = -gain + {BETA} k3, (4, 3)", token_loss, mask)
    means = (token_loss * mask).sum(dim=1) / mask.sum(dim=1)  # (4,)
    heading("9. mean over the tokens of each completion, (4,)")
    print("      " + numbers(means))
    return means.mean()


def show_gradient(loss: Tensor, logps: Tensor, old_logps: Tensor, ref_logps: Tensor, advantages: Tensor, mask: Tensor,
                  logits: Tensor) -> None:
    """Step 10: two gradients by autograd, each beside the formula, and the step."""
    to_logps, to_logits = torch.autograd.grad(loss, (logps, logits))  # (4, 3), (3, 4)
    ratio, d = (logps - old_logps).exp().detach(), (ref_logps - logps).detach()
    A = advantages[:, None]
    clipped = ((A > 0) & (ratio > 1 + CLIP)) | ((A < 0) & (ratio < 1 - CLIP))
    each = torch.where(clipped, 0.0, -ratio * A) + BETA * (1 - d.exp())
    by_hand = torch.where(mask, each / mask.sum(dim=1, keepdim=True) / len(mask), 0.0)
    show(f"10. gradient by log p: (-rho A, or 0 where clipped, + {BETA} (1 - e^d)) / tokens of the completion / 4, (4, 3)",
         to_logps, mask)
    difference("autograd and the formula", to_logps, by_hand)
    one_hot = torch.nn.functional.one_hot(SAID, len(WORDS))  # (4, 3, 4)
    by_hand = (by_hand[:, :, None] * (one_hot - NOW)).sum(dim=0)
    show("    gradient by the logits of each place: sum over completions of g (1 for the word said, else 0, - p), (3, 4)",
         to_logits, names=WORDS)
    difference("autograd and the formula", to_logits, by_hand)
    after = (logits.detach() - LEARNING_RATE * to_logits).softmax(dim=1)
    show(f"    the policy after the step: softmax(log p - {LEARNING_RATE} gradient), (3, 4)", after, names=WORDS)
    print("\n`red` at the first place becomes rarer, though it is the right answer: the step before has raised it beyond the clip,\n"
          "so the good completion 1 no longer pushes, and the bad completion 3, which begins with it too, still does.")


# ---- printing -------------------------------------------------------------------------------------------------------


def heading(text: str) -> None:
    print(f"\n{text}")


def numbers(row: Tensor) -> str:
    return " ".join(f"{value:9.4f}" for value in row.tolist())


def show(title: str, table: Tensor, mask: Tensor | None = None, starred: Tensor | None = None, names: list[str] = ()) -> None:
    """A table under its title, row by row; a dash where `mask` is false, a star where `starred` is true."""
    heading(title)
    if names:
        print("      " + " ".join(f"{name:>9} " for name in names).rstrip())
    for i, row in enumerate(table.tolist()):
        cells = [f"{value:9.4f}{'*' if starred is not None and starred[i, j] else ' '}"
                 if mask is None or mask[i, j] else f"{'-':>9} " for j, value in enumerate(row)]
        print(f"   {i + 1}  " + " ".join(cells).rstrip())


def difference(what: str, a: Tensor, b: Tensor) -> None:
    gap = (a - b).abs().max().item()
    assert gap < 1e-6, f"{what} differ by {gap:.1e}: grpo.py has changed, and the formula printed here has not"
    print(f"      {what} agree within 1e-6")
