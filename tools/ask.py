"""One question about one video, without a truth to compare with: `python eval.py --video`.

What is printed is the completion, and what the parser of the rewards reads in it.
"""

from functools import partial
from pathlib import Path

import torch

import rewards
from data import Prompt, VideoSettings, prepare
from grpo import completion_mask
from lib.answers import SamplingSettings
from lib.distributed import World
from lib.loader import VideoLoader
from lib.memory import note_if_out_of_memory, sizes
from lib.questions import sampling_seed, with_style
from lib.samples import LETTERS, option_texts
from lib.terminal import printable
from model import VideoLM
from rewards import WHY_UNREADABLE


def question_of(args) -> dict:
    """The flags as a sample. It has no truth, so it can be asked and read but not scored."""
    sample = {"id": Path(args.video).name, "task": args.task, "question": args.question,
              "video": str(Path(args.video).absolute())}
    if args.options is not None:
        sample["options"] = args.options
    if args.box is not None:
        sample["boxes"] = [args.box] * 8  # the prompt shows the first
    return sample


def answer_one(args, world: World, settings: VideoSettings, sampling: SamplingSettings, box_units: int = 1) -> None:
    """Print the completions of one question and what the parser reads in them."""
    (sample,) = with_style([question_of(args)], args.prompt, box_units)
    # How long the file is, nobody has said: ten minutes to decode it.
    with VideoLoader(settings, num_workers=min(args.num_workers, 1), deadline=600) as loader:
        clip = loader.load(sample)  # first: a video that cannot be read is known before a large model is loaded
    model = VideoLM.load(args.model, world.device)
    model.compile_decoding = args.compile
    model.geometry = model.geometry.with_times(args.timestamps)
    prompt = prepare(sample, clip, model.tokenizer, args.prompt, max_prompt_tokens=args.max_prompt_tokens,
                     geometry=model.geometry, device=model.device)
    for text, ended in complete(model, prompt, sampling):
        print(printable(text, keep="\n"))
        if not ended:
            print(f"(cut at --max_new_tokens {args.max_new_tokens})")
        print(f"\nread as: {printable(what_is_read(sample, text, clip.seconds.tolist()), keep=chr(10))}\n")


def complete(model, prompt: Prompt, sampling: SamplingSettings) -> list[tuple[str, bool]]:
    """K completions of one prompt, each with whether it came to its end: `grpo.rollout` without the scores."""
    completions = f"{sampling.num_samples} completions of up to {sampling.max_new_tokens} tokens"
    with torch.no_grad(), note_if_out_of_memory("sampling", partial(sizes, [prompt], completions)):
        (video,) = model.encode_prompts([prompt])
        [(tokens, _)] = model.generate(
            [model.embed(prompt.ids, video)], [prompt.positions], group_size=sampling.num_samples,
            max_new_tokens=sampling.max_new_tokens, temperature=sampling.temperature,
            seeds=[sampling_seed(sampling.seed, -1, prompt.sample["id"])])  # tokens (K, C)
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
    said = ""
    for tag, block in rewards.reward_of(sample["task"]).blocks.items():
        value, reason = rewards.read(sample, completion, tag)
        text, _ = rewards.last_block(completion, tag)
        said += {"answer": "", "glue": ", seen in "}.get(tag, f", {tag}: ")
        said += f"nothing: {WHY_UNREADABLE[reason]}" if value is None else in_words(value, block, sample, text, seconds)
    return said


def in_words(value, block: rewards.Block, sample: dict, text: str, seconds: list[float]) -> str:
    """What was read, by the kind of block. `text`: what stands in it."""
    if block is rewards.INTERVAL:
        return windows_in_words([value])
    if block is rewards.WINDOWS:
        return windows_in_words(value)
    if block is rewards.CHOICE:
        return f"({value}) {option_texts(sample)[LETTERS.index(value)]}"
    if block is rewards.EIGHT_BOXES:
        return "\n".join(f"{t:6.2f} s  {box}" for t, box in zip(seconds, value))
    if block is rewards.LABEL and value in [option.strip().lower() for option in sample["options"]]:
        return text.strip()
    if block is rewards.LABEL:
        return f"{value!r}, which is none of the options"
    return str(value)


def windows_in_words(windows: list[tuple[float, float]]) -> str:
    return " and ".join(f"{start:.2f} s to {end:.2f} s" for start, end in windows) or "no part of the video"
