"""What tests of several files do with a model and prompts: embed them, make completions up, sample."""

import torch


def embeds_of(model, prompts):
    return [model.embed(p.ids, video) for p, video in zip(prompts, model.encode_prompts(prompts))]


def positions_of(prompts):
    return [p.positions for p in prompts]


def logps_packed(model, *arguments) -> list[torch.Tensor]:
    """(G, C) of each question: `logprobs_packed` without what else it may know."""
    return [scores.logps for scores in model.logprobs_packed(*arguments)]


def completions(G=3, C=5, seed=0, vocab=200):
    return torch.randint(20, vocab, (G, C), generator=torch.Generator().manual_seed(seed))


def sample(model, prompts, **changes):
    settings = {"group_size": 4, "max_new_tokens": 12, "temperature": 1.0, "seeds": [11, 22, 33][: len(prompts)]} | changes
    with torch.no_grad():
        return model.generate(embeds_of(model, prompts), positions_of(prompts), **settings)
