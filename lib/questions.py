"""From samples to prompts: their videos loaded, and where the noise of each question comes from."""

import hashlib
from collections.abc import Callable

from data import Clip, Prompt, prepare, prompt_wants_thought
from lib.readers import VideoError


def load_prompts(model, loader, samples: list[dict], style: str, max_prompt_tokens: int | None = None,
                 change: Callable[[dict, Clip], Clip] | None = None,
                 forgive: tuple = (VideoError,)) -> tuple[list[Prompt | None], dict[str, Exception]]:
    """The prompt of each sample, None where its video cannot be read; and those samples' ids with the error.

    Other errors than those in `forgive` are raised: in training a prompt that is too long means wrong settings.
    """
    prompts, problems = [], {}
    for sample in samples:
        try:
            clip = loader.load(sample)
            if change and clip is not None:
                clip = change(sample, clip)
            prompts.append(prepare(sample, clip, model.tokenizer, style, max_prompt_tokens=max_prompt_tokens,
                                   tokens_per_second=model.tokens_per_second, device=model.device))
        except forgive as error:
            problems[sample["id"]] = error
            prompts.append(None)
    return prompts, problems


def sampling_seed(seed: int, step: int, sample_id: str) -> int:
    """Where the noise of one question in one step comes from: a function of these three and of nothing else."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {step} {sample_id}".encode(), digest_size=7).digest(), "big")


def with_style(samples: list[dict], style: str) -> list[dict]:
    """Samples that say themselves whether a thought is asked for: the format reward reads it there."""
    return [{**sample, "think": prompt_wants_thought(sample, style)} for sample in samples]
