"""From samples to prompts: in which order, on which rank, their videos loaded, and where the noise of each comes from."""

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from tqdm import tqdm

from data import Clip, Prompt, prepare, prompt_wants_thought
from lib.distributed import World
from lib.readers import VideoError
from lib.samples import files_of
from lib.terminal import printable


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
                                   geometry=model.geometry, device=model.device))
        except forgive as error:
            problems[sample["id"]] = error
            prompts.append(None)
    return prompts, problems


def tried_files(sample: dict, problem: str) -> list[tuple[str, str]]:
    """(file, why it cannot be read, or "") of the sample's video or pictures. `problem`: the sample's, a file's name first."""
    files = files_of(sample)
    return [(file, problem if len(files) == 1 or problem.startswith(f"{file}: ") else "") for file in files]


def sampling_seed(seed: int, step: int, place: int | str) -> int:
    """Where the noise of one question in one step comes from: a function of these three and of nothing else."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {step} {place}".encode(), digest_size=7).digest(), "big")


def with_style(samples: list[dict], style: str, box_units: int = 1) -> list[dict]:
    """Samples that say themselves whether a thought is asked for, and in which units boxes are: the rewards read it there."""
    units = {} if box_units == 1 else {"box_units": box_units}
    return [{**sample, "think": prompt_wants_thought(sample, style), **units} for sample in samples]


# ---- the stream of a training run -----------------------------------------------------------------------------------


def order_of(samples: list[dict], seed: int) -> Iterator[dict]:
    """The samples for ever, each epoch in an order of its own, the same on every rank: epoch e is seeded by (seed, e)."""
    if not samples:
        raise ValueError("there is not one question to ask: what was selected is not in the data (any more)")
    epoch = 0
    while True:
        generator = torch.Generator().manual_seed(sampling_seed(seed, epoch, "order"))
        yield from (samples[i] for i in torch.randperm(len(samples), generator=generator).tolist())
        epoch += 1


def number_of_steps(asked: int, samples: list[dict], questions: int) -> int:
    """-E means E epochs. Epochs follow each other without a gap, so only the last step reaches into a further one."""
    return asked if asked >= 0 else math.ceil(-asked * len(samples) / questions)


@dataclass
class Batch:
    """This rank's share of a step's questions, as far as their videos can be read."""

    prompts: list[Prompt]
    places: list[int]  # in the endless stream, of each prompt
    unreadable: int  # how many of the share could not be read
    tried: list[tuple[str, str]]  # the videos and pictures of the share, and why each could not be read, or ""


class Questions:
    """A position in the endless order, the same on every rank; of the next samples each rank gets its share.

    Which rank gets a sample depends on its place alone. So a video that was decoded ahead is decoded by the rank that
    will need it, however many samples are taken at a time.
    """

    def __init__(self, samples: list[dict], seed: int, world: World, *, model=None, loader=None, style: str = "think",
                 max_prompt_tokens: int | None = None):
        self.source, self.ahead, self.cursor, self.world = order_of(samples, seed), [], 0, world
        self.model, self.loader, self.style, self.max_prompt_tokens = model, loader, style, max_prompt_tokens

    def skip(self, count: int) -> None:
        """Go on from here, `count` samples further: a resumed run."""
        self.take(count)

    def peek(self, count: int) -> list[tuple[int, dict]]:
        """This rank's share of the next `count` samples with their places, without moving on."""
        while len(self.ahead) < count:
            self.ahead.append(next(self.source))
        numbered = enumerate(self.ahead[:count], self.cursor)
        return [(place, sample) for place, sample in numbered if place % self.world.size == self.world.rank]

    def take(self, count: int) -> list[tuple[int, dict]]:
        mine = self.peek(count)
        self.ahead, self.cursor = self.ahead[count:], self.cursor + count
        return mine

    def next(self, count: int, ahead: int | None = None) -> Batch:
        """The prompts of this rank's share of the next `count` samples. A video that cannot be read costs its own question,
        and is named. Meanwhile those of the `ahead` samples behind them (by default as many) are decoded."""
        mine = self.take(count)
        for _, sample in mine + self.peek(count if ahead is None else ahead):
            self.loader.submit(sample)
        prompts, problems = load_prompts(self.model, self.loader, [sample for _, sample in mine], self.style,
                                         self.max_prompt_tokens)
        for problem in problems.values():
            tqdm.write(f"unreadable, left out: {printable(problem)}")
        readable = [(prompt, place) for prompt, (place, _) in zip(prompts, mine) if prompt is not None]
        tried = [pair for _, sample in mine for pair in tried_files(sample, str(problems.get(sample["id"], "")))]
        return Batch([prompt for prompt, _ in readable], [place for _, place in readable], len(mine) - len(readable), tried)
