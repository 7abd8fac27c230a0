"""How a model answers: one question, or every question once on any number of processes, or with the video taken away.

    samples --share--> ranks --load_prompts--> prompts --grpo.rollout--> predictions: id, task, completions[K], ...

Training, selection and evaluation ask through `answer_all`, so they ask alike. Answers are written down as they are
made (`partial`), and a run that is killed goes on where it was, with another number of processes too: what is sampled
depends on the question alone. `claim` sees to it that answers given under other settings never end up in one file.

Then the probes: does a model that answers well look at the video at all? Its clips are shuffled, frozen, blackened or
exchanged, and the same questions are asked again. At the end the simplest case, a question without a known answer.

Left out on purpose: retrying a question, and answers that are shared between samples.
"""

import hashlib
import json
import os
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import torch
from tqdm import tqdm

import rewards
from data import Clip, Prompt, PromptTooLong, VideoSettings, prepare, prompt_wants_thought
from grpo import completion_mask, encode_videos, rollout
from lib import distributed as scale
from lib.captions import Judge, words_judge
from lib.readers import VideoError

# ---- the answers of a model -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asking:
    """How questions are put and answered."""
    style: str  # of the prompt
    max_new_tokens: int
    max_prompt_tokens: int | None = None
    num_samples: int = 1  # completions of each question
    temperature: float = 0.0  # 0 is greedy
    mix: str = "sum"  # of the reward's parts
    seed: int = 0
    batch: int = 32  # questions answered together, on each rank
    judge: Judge = words_judge  # which events does a caption tell?


def answer_all(model, loader, samples: list[dict], world: scale.World, asking: Asking, title: str,
               partial: Path | None = None, change: Callable[[dict, Clip], Clip] | None = None) -> list[dict]:
    """Completions of every sample, on all ranks together; each sample is answered by exactly one rank.

    Returns, on every rank and in the order of `samples`, one dict a sample: id, task, completions, rewards, parts and
    reasons, each a list of `num_samples`. A sample whose video cannot be read, or whose prompt is too long, has empty
    completions of reward 0 and says so under `problem`.

    partial: a folder where every rank writes its answers down as they come. What lies there is not asked again; the
    caller removes it when the result is safe. change: what is done to a clip before the model sees it (probes).
    """
    done = read_partial(world, partial, samples) if partial else {}
    mine = world.share([sample for sample in samples if sample["id"] not in done])
    answered: list[dict] = []
    bar = tqdm(total=len(samples), initial=len(done), desc=title, unit="q", disable=not world.is_first, leave=False)
    for start in range(0, len(mine), asking.batch):
        for sample in mine[start:start + 2 * asking.batch]:  # this batch, and the next while this one is answered
            loader.submit(sample)
        batch = answer_batch(model, loader, mine[start:start + asking.batch], asking, change)
        if partial:
            append_lines(partial / f"rank{world.rank}.jsonl", batch)
        answered += batch
        bar.update(min(len(samples) - bar.n, asking.batch * world.size))
    bar.close()
    done |= {prediction["id"]: prediction for prediction in scale.gather(world, answered)}
    return [done[sample["id"]] for sample in samples]


def answer_batch(model, loader, samples: list[dict], asking: Asking,
                 change: Callable[[dict, Clip], Clip] | None = None) -> list[dict]:
    prompts, problems = load_prompts(model, loader, samples, asking.style, asking.max_prompt_tokens, change,
                                     forgive=(VideoError, PromptTooLong))
    askable = [prompt for prompt in prompts if prompt is not None]
    # -1: no step of training draws this noise
    seeds = [sampling_seed(asking.seed, -1, prompt.sample["id"]) for prompt in askable]
    groups = iter(rollout(model, askable, group_size=asking.num_samples, max_new_tokens=asking.max_new_tokens,
                          temperature=asking.temperature, seeds=seeds, mix=asking.mix, judge=asking.judge))
    predictions = []
    for sample, prompt in zip(samples, prompts):
        line = {"id": sample["id"], "task": sample["task"]}
        if prompt is None:
            problem, K = problems[sample["id"]], asking.num_samples
            reason = "prompt_too_long" if isinstance(problem, PromptTooLong) else "unreadable_video"
            line |= {"completions": [""] * K, "rewards": [0.0] * K, "reasons": [reason] * K, "problem": str(problem),
                     "parts": [rewards.score(sample, "", asking.mix, asking.judge).parts] * K}
        else:
            group = next(groups)
            line |= {"completions": group.texts, "rewards": [score.total for score in group.scores],
                     "parts": [score.parts for score in group.scores], "reasons": group.reasons}
        predictions.append(line)
    return predictions


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


# ---- answers that survive a kill ------------------------------------------------------------------------------------

SETTINGS = "settings.json"  # in a folder of answers: what decides them


def append_lines(file: Path, lines: list[dict]) -> None:
    """The line break comes first: what a kill has torn before stays a line of its own, which does not parse."""
    with open(file, "a", encoding="utf-8") as out:
        out.writelines("\n" + json.dumps(line) for line in lines)


def read_partial(world: scale.World, folder: Path, samples: list[dict]) -> dict[str, dict]:
    """The answers that all ranks of earlier runs have written down, by id; the same on every rank.

    Rank 0 reads for all: whoever looked a moment later would find a colleague's new answers, and share out differently.
    """
    found: dict[str, dict] = {}
    if world.is_first:
        wanted = {sample["id"] for sample in samples}
        for file in sorted(folder.glob("rank*.jsonl")):
            for line in file.read_bytes().split(b"\n"):
                try:
                    prediction = json.loads(line)
                except ValueError:  # blank, or torn: no beginning of an object is an object
                    continue
                if prediction["id"] in wanted:
                    found[prediction["id"]] = prediction
    found = {prediction["id"]: prediction for prediction in scale.gather(world, list(found.values()))}
    folder.mkdir(parents=True, exist_ok=True)
    return found


def write_lines(file: Path, lines: list[dict]) -> None:
    """All lines or no file: what exists under its final name is complete."""
    unfinished = file.with_name(file.name + ".unfinished")
    with open(unfinished, "w", encoding="utf-8") as out:
        out.writelines(json.dumps(line) + "\n" for line in lines)
    unfinished.rename(file)


def what_decides(model: str, judge: str, asking: Asking, settings: VideoSettings, samples: list[dict]) -> dict:
    """All that an answer depends on, by the names of the flags. Neither the batch nor the number of processes is
    among it. `model` and `judge` are names."""
    digest = hashlib.sha256(json.dumps(samples, sort_keys=True).encode()).hexdigest()
    model = str(Path(model)) if Path(model).exists() else model  # "final" and "final/" are one model
    return {"model": model, "weights": weights_of(model), "prompt": asking.style, "reward": asking.mix, "judge": judge,
            "num_samples": asking.num_samples, "temperature": asking.temperature, "seed": asking.seed,
            "max_new_tokens": asking.max_new_tokens, "max_prompt_tokens": asking.max_prompt_tokens,
            "fps": settings.target_fps, "max_frames": settings.max_frames, "total_pixels": settings.total_pixels,
            "min_pixels": settings.min_pixels, "samples": f"{len(samples)} with sha256 {digest}"}


def weights_of(model: str) -> str:
    """When a model folder's weights were written: another training may have come to the same name. "" on the hub."""
    times = [file.stat().st_mtime for file in Path(model).glob("*.safetensors")]
    return datetime.fromtimestamp(max(times)).isoformat(" ") if times else ""


def claim(world: scale.World, folder: Path, settings: dict) -> None:
    """Make `folder` one of answers given under `settings`. ValueError where it is one of others."""
    file = folder / SETTINGS
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
    scale.wait_for_all(world)  # nobody writes before everybody has looked
    for name, value in settings.items() if known is not None else ():
        if name not in known or known[name] != value:
            raise ValueError(f"{folder} holds answers with {name} {known.get(name)!r}, not {value!r}: go back to that, "
                             "name another folder, or delete what is in this one (eval.py does it with --overwrite)")
    if known is None and world.is_first:
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_name(SETTINGS + ".unfinished")
        unfinished.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        os.replace(unfinished, file)
    scale.wait_for_all(world)


# ---- probes: the same questions, and no longer the same video -------------------------------------------------------
#
# Only what is seen changes. The number of frames and their positions in time stay, so that the prompt is as long as
# before and nothing but the pixels can tell that something is wrong.


def shuffled(sample: dict, clip: Clip) -> Clip:
    """The frames in another order: what is left is what needs no order. Never the order they had."""
    T = len(clip.frames)
    order, generator = list(range(T)), random.Random(f"shuffled {sample['id']}")
    while T > 1 and order == list(range(T)):
        generator.shuffle(order)
    return replace(clip, frames=clip.frames[order])


def one_frame(sample: dict, clip: Clip) -> Clip:
    """The frame in the middle, all the time."""
    T = len(clip.frames)
    return replace(clip, frames=clip.frames[[T // 2] * T])


def black(sample: dict, clip: Clip) -> Clip:
    return replace(clip, frames=torch.zeros_like(clip.frames))


CHANGES: dict[str, Callable[[dict, Clip], Clip] | None] = {
    "shuffled": shuffled, "one_frame": one_frame, "black": black, "another_video": None}  # None: the clip as it is
SHOWN = ("video", "start", "end", "fps", "frames")  # the fields of a sample that say what is shown


def probe_samples(probe: str, samples: list[dict], predictions: list[dict]) -> list[dict]:
    """The samples that a probe is about: those whose video the model has seen in the run that is compared with.

    "another_video" shows them that of the next sample, cyclically, whose video is another; if there is none, there is
    no such sample. The length of the clip and its positions are then the other video's.
    """
    seen = [s for s, prediction in zip(samples, predictions) if "video" in s and "problem" not in prediction]
    if probe != "another_video":
        return seen
    exchanged = []
    for place, sample in enumerate(seen):
        others = (other for other in seen[place + 1:] + seen[:place] if other["video"] != sample["video"])
        if other := next(others, None):
            kept = {name: value for name, value in sample.items() if name not in SHOWN}
            exchanged.append(kept | {name: other[name] for name in SHOWN if name in other})
    return exchanged


# ---- one question about one video, without a truth to compare with --------------------------------------------------

WHY_UNREADABLE = {
    "no_answer_tag": "there is no closed <answer> ... </answer>",
    "no_glue_tag": "there is no closed <glue> ... </glue>",
    "empty_answer": "the answer is empty",
    "bad_interval": "the answer names no start and end",
    "reversed_interval": "an interval ends before it starts",
    "bad_glue": "the <glue> block is no list of (start, end)",
    "bad_boxes": "the answer is no list of 8 lists of 4 numbers",
    "bad_choice": "the answer names none of the letters offered",
    "two_letters": "the answer names two letters",
}


def complete(model, prompt: Prompt, asking: Asking) -> list[tuple[str, bool]]:
    """K completions of one prompt, each with whether it came to its end: `grpo.rollout` without the scores."""
    with torch.no_grad():
        (video,) = encode_videos(model, [prompt])
        [(tokens, _)] = model.generate(
            [model.embed(prompt.ids, video)], [prompt.positions], group_size=asking.num_samples,
            max_new_tokens=asking.max_new_tokens, temperature=asking.temperature,
            seeds=[sampling_seed(asking.seed, -1, prompt.sample["id"])])  # tokens (K, C)
    mask = completion_mask(tokens, model.eos_ids)
    ended = torch.isin(tokens, torch.tensor(model.eos_ids, device=tokens.device)).any(dim=1).tolist()
    return [(model.tokenizer.decode(row[keep], skip_special_tokens=True), end)
            for row, keep, end in zip(tokens, mask, ended)]


def what_is_read(sample: dict, completion: str, seconds: list[float] = ()) -> str:
    """What the parser of the rewards reads in a completion, in words; or why it can read nothing.

    `seconds`: of the frames that a tracking sample shows.

    >>> what_is_read({"task": "grounding"}, "<think>It is lifted.</think> <answer>3 to 6</answer>")
    '3.00 s to 6.00 s'
    >>> what_is_read({"task": "qa", "options": ["a dog", "a cat"]}, "<answer>The cat</answer>")
    'nothing: the answer names none of the letters offered'
    """
    task, options = sample["task"], sample.get("options", [])
    parse = {"grounding": rewards.parse_interval, "tracking": rewards.parse_boxes,
             "qa": lambda text: rewards.parse_letter(text, options),
             "gqa": lambda text: rewards.parse_letter(text, options)}.get(task, rewards.parse_label)
    answer, reason = rewards.read(completion, "answer", parse)
    if answer is None:
        said = f"nothing: {WHY_UNREADABLE[reason]}"
    elif task == "grounding":
        said = windows_in_words([answer])
    elif task == "tracking":
        said = "\n".join(f"{t:6.2f} s  {box}" for t, box in zip(seconds, answer))
    elif task in ("qa", "gqa"):
        said = f"({answer}) {options[ord(answer) - ord('A')]}"
    elif task == "classification" and answer not in [option.strip().lower() for option in options]:
        said = f"{answer!r}, which is none of the options"
    else:
        said = rewards.last_block(completion, "answer")[0].strip()
    if task == "gqa":
        windows, reason = rewards.read(completion, "glue", rewards.parse_windows)
        said += ", seen in " + (f"nothing: {WHY_UNREADABLE[reason]}" if windows is None else windows_in_words(windows))
    return said


def windows_in_words(windows: list[tuple[float, float]]) -> str:
    return " and ".join(f"{start:.2f} s to {end:.2f} s" for start, end in windows) or "no part of the video"
