"""One question about one video, without a truth to compare with.

    python -m tools.ask --model M --video clip.mp4 "a person opens the door"                          when it happens
    python -m tools.ask --model M --video clip.mp4 "what is opened?" --options "the door" "a box"     which answer is right
    python -m tools.ask --model M --video clip.mp4 "a person opens the door" --html page.html         a page to look at

What is printed: which frames the model saw, its thought, its answer, and what the parser of the rewards reads in that. The
flags are those of `python eval.py --video`, which is the same command (tools/evaluate.py).
"""

import math
import shutil
import textwrap
from functools import partial
from pathlib import Path

import torch

import rewards
from data import Clip, Prompt, VideoSettings, prepare
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
from tools.report import marks_of, write_question


def question_of(args) -> dict:
    """The flags as a sample. It has no truth, so it can be asked and read but not scored."""
    sample = {"id": Path(args.video).name, "task": args.task, "question": args.question,
              "video": str(Path(args.video).absolute())}
    if args.options is not None:
        sample["options"] = args.options
    if args.box is not None:
        sample["boxes"] = [args.box] * 8  # the prompt shows the first
    return sample


def usual_task(args) -> str:
    """The kind of question where --task says none."""
    return "tracking" if args.box else "qa" if args.options else "grounding"


def answer_one(args, world: World, settings: VideoSettings, sampling: SamplingSettings, box_units: int = 1) -> None:
    """Print what the model saw, what it says, and what is read in that; write the page of --html."""
    (sample,) = with_style([question_of(args)], args.prompt, box_units)
    # How long the file is, nobody has said: ten minutes to decode it.
    with VideoLoader(settings, num_workers=min(args.num_workers, 1), deadline=600) as loader:
        clip = loader.load(sample)  # first: a video that cannot be read is known before a large model is loaded
    sample["duration"] = max(len(clip.frames) / clip.sample_fps, float(clip.seconds[-1]))  # frames are spread over all of it
    model = VideoLM.load(args.model, world.device)
    model.compile_decoding = args.compile
    model.geometry = model.geometry.with_times(args.timestamps)
    prompt = prepare(sample, clip, model.tokenizer, args.prompt, max_prompt_tokens=args.max_prompt_tokens,
                     geometry=model.geometry, device=model.device)
    width = max(shutil.get_terminal_size().columns, 40)
    seen = what_was_seen(prompt, clip)
    print(printable(f"{sample['id']}: {seen}"))
    print(textwrap.fill(f"at {moments(clip.seconds.tolist())} s", width, subsequent_indent="   "))
    print(printable(f"asked as {sample['task']}: {sample['question']}"), flush=True)
    answers = []
    for number, (text, ended) in enumerate(complete(model, prompt, sampling), 1):
        read = what_is_read(sample, text, clip.seconds.tolist())
        cut = "" if ended else f" (cut at --max_new_tokens {args.max_new_tokens})"
        print(f"\n--- answer {number} of {sampling.num_samples}" if sampling.num_samples > 1 else "")
        print_answer(sample, text, cut, read, width)
        answers.append({"title": f"answer {number}", "text": text,
                        "note": ("8 boxes are read" if "\n" in read else f"read as: {read}") + cut})
    if args.html:
        page = write_question(args.html, f"{args.model} saw {seen}.", sample, clip, answers)
        print(printable(f"\n{page}: a browser opens it", keep="\n"))


# ---- what was seen and said, for the terminal -------------------------------------------------------------------------

MOST_MOMENTS = 64  # seconds that are listed


def what_was_seen(prompt: Prompt, clip: Clip) -> str:
    T, _, height, width = clip.frames.shape
    tokens = math.prod(prompt.grid) // 4  # 2 x 2 patches are one
    return f"{T} frames of {width} x {height} pixels, which cost {tokens} of the prompt's {len(prompt.ids)} tokens"


def moments(seconds: list[float]) -> str:
    """The begins of all frames, or of so many that they can be read.

    >>> moments([0.0, 0.5, 1.0])
    '0.00 0.50 1.00'
    """
    words = [f"{second:.2f}" for second in seconds]
    return " ".join(words if len(words) <= MOST_MOMENTS else [*words[:MOST_MOMENTS // 2], "...", *words[-MOST_MOMENTS // 2:]])


def print_answer(sample: dict, text: str, cut: str, read: str, width: int) -> None:
    """Thought and answer of a completion, and what is read in it, spans as bars of `width` characters."""
    thought, closed, answer = text.rpartition("</think>")
    if closed:
        print(printable(f"thought: {thought.strip().removeprefix('<think>').strip()}", keep="\n"))
    print(printable(f"answer: {answer.strip()}{cut}", keep="\n"))
    print(printable("read as: " + "\n" * ("\n" in read) + read, keep="\n"))
    for start, end in marks_of(sample, text).get("spans") or ():
        print(bar(start, end, sample["duration"], width))


def bar(start: float, end: float, duration: float, width: int) -> str:
    """Two lines: a span within the clip, `width` characters wide, and its seconds under both of its ends.

    >>> print(bar(3, 6.5, 10, 40))
    0 |--------###########---------| 10.00 s
          3.00 s         6.50 s
    """
    before, behind = "0 |", f"| {in_seconds(duration)}"
    cells = width - len(before) - len(behind)
    first, last = (min(max(second / duration, 0), 1) * cells for second in (start, end))
    first = min(math.floor(first), cells - 1)
    last = max(math.ceil(last), first + 1)
    line = "-" * first + "#" * (last - first) + "-" * (cells - last)
    if start > duration or end < 0:  # an answer is never repaired
        line = " outside of the clip ".center(cells, "-")
    left, right = in_seconds(start), in_seconds(end)
    at = max(min(len(before) + first + 1 - len(left), width - len(left) - len(right) - 1), 0)
    labels = (" " * at + left + " ").ljust(min(len(before) + last - 1, width - len(right)))
    return f"{before}{line}{behind}\n{labels}{right}"


def in_seconds(second: float) -> str:
    return f"{second:.2f} s" if abs(second) < 1e6 else f"{second:.2g} s"


# ---- asking and reading -----------------------------------------------------------------------------------------------


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
    if block is rewards.MOMENTS and not value:
        return "not in this video"
    if block in (rewards.WINDOWS, rewards.MOMENTS):
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
    return " and ".join(f"{in_seconds(start)} to {in_seconds(end)}" for start, end in windows) or "no part of the video"


if __name__ == "__main__":
    from tools.evaluate import main  # its flags are those of eval.py

    main()
