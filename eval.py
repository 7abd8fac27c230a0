"""Did it work? Completions go in, the numbers of the papers' tables come out, next to what a blind guesser would get.

Every completion is scored by `rewards.score`, the function that training maximises: no second parser, no second IoU.
A sample that fails in any way (unreadable video, unreadable answer) stays in the denominator with 0. Dropping it, as
published evaluation scripts do, makes a model look better the more often it breaks.

Read in this order: what one completion is worth (`sample_metrics`), the means (`compute_metrics`), four answers that
never look at the video (`blind_baselines`), the answers of a model (`answer_all`), the command line. The four are no
formality: on VideoChat-R1's 180 tracking sequences, copying the start box eight times gets an AO of 42.35, where the
paper's models get 41.8 to 43.8.

Left out on purpose: official scripts' own parsers (numbers here are those of one parser for all), metrics that need a
judge model, and confidence intervals.
"""

import argparse
import hashlib
import json
import math
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import rewards
import scale
from data import STYLES, TASKS, Prompt, VideoError, VideoSettings, load_samples, prepare, prompt_wants_thought
from grpo import rollout
from loader import VideoLoader
from model import VideoLM

# The order of the columns. A task that is not in the data has none of its names in the result.
METRICS = (
    "grounding/mIoU", "grounding/R@0.3", "grounding/R@0.5", "grounding/R@0.7",
    "qa/accuracy",
    "gqa/accuracy", "gqa/mIoU", "gqa/mIoP", "gqa/Acc@GQA",
    "tracking/AO", "tracking/AO@2-7", "tracking/R@0.5",
    "classification/accuracy",
    "parse_failure",
)


# ---- what one completion is worth -----------------------------------------------------------------------------------


def sample_metrics(sample: dict, completion: str | None) -> dict[str, float]:
    """All metrics of one sample, each in [0, 1]; their means over a data set are what is reported.

    None stands for a completion that does not exist, for example because the video cannot be read: it counts 0 in
    everything and as a parse failure. A sample with a malformed truth raises ValueError (from `rewards`).

    >>> sample = {"id": "a", "task": "grounding", "spans": [[10, 20]]}
    >>> sample_metrics(sample, "<answer>10 to 15</answer>")  # doctest: +NORMALIZE_WHITESPACE
    {'grounding/mIoU': 0.5, 'grounding/R@0.3': 1.0, 'grounding/R@0.5': 1.0, 'grounding/R@0.7': 0.0,
     'parse_failure': 0.0}
    """
    completion = completion or ""
    task = sample["task"]
    _, parts, reason = rewards.score(sample, completion)
    metrics = {}
    if task == "grounding":
        metrics["mIoU"] = parts["temporal_iou"]
        for threshold in (0.3, 0.5, 0.7):
            metrics[f"R@{threshold}"] = reaches(parts["temporal_iou"], threshold)
    elif task == "gqa":
        metrics["accuracy"] = parts["accuracy"]
        metrics["mIoU"] = parts["temporal_iou"]
        metrics["mIoP"] = longest_window_iop(sample, completion)
        metrics["Acc@GQA"] = parts["accuracy"] * reaches(metrics["mIoP"], 0.5)
    elif task == "tracking":
        metrics["AO"] = parts["box_iou"]
        metrics["AO@2-7"] = unseen_boxes_overlap(sample, completion)
        metrics["R@0.5"] = reaches(parts["box_iou"], 0.5)
    else:  # qa, classification
        metrics["accuracy"] = parts["accuracy"]
    named = {f"{task}/{name}": value for name, value in metrics.items()}
    return named | {"parse_failure": float(reason in rewards.UNREADABLE)}


def reaches(value: float, threshold: float) -> float:
    """1.0 if value >= threshold, else 0.0.

    VideoChat-R1's script uses >= as well (Time-R1's uses >). The tolerance is for decimals: 1.2 to 1.9 against
    1.2 to 2.2 is 0.7 on paper and 0.6999999999999998 in binary.
    """
    return float(value >= threshold - 1e-9)


def longest_window_iop(sample: dict, completion: str) -> float:
    """Intersection over *prediction*: the share of the longest predicted window that lies in one annotated window.

    NExT-GQA's official IoP takes a single prediction. Of several we take the longest as written (the first on a tie)
    and the annotated window that suits it best. Unlike there, a window of length 0 has IoP 0: a point can be guessed.

    >>> sample = {"id": "a", "task": "gqa", "spans": [[5, 10], [20, 25]]}
    >>> longest_window_iop(sample, "<glue>[(20, 25), (2, 10)]</glue>")
    0.625
    """
    windows, _ = rewards.read(completion, "glue", rewards.parse_windows)
    if not windows:
        return 0.0
    # Rounded, because 5.3 - 5.1 is longer than 0.3 - 0.1 in binary. max keeps the first of equals.
    start, end = max(windows, key=lambda window: round(window[1] - window[0], 9))
    truths = map(sorted, rewards.true_spans(sample))
    shared = max(min(end, true_end) - max(start, true_start) for true_start, true_end in truths)
    return rewards.ratio(shared, end - start)


def unseen_boxes_overlap(sample: dict, completion: str) -> float:
    """Mean IoU of boxes 2 to 7, the part of AO that takes eyes.

    Box 0 is given in the prompt and box 1 is one frame later, where the object has hardly moved.
    """
    boxes, _ = rewards.read(completion, "answer", rewards.parse_boxes)
    if boxes is None:
        return 0.0
    overlaps = list(map(rewards.box_iou, boxes, rewards.true_boxes(sample)))
    return sum(overlaps[2:]) / 6


# ---- the means ------------------------------------------------------------------------------------------------------


def compute_metrics(samples: list[dict], completions: list[str | None]) -> dict[str, float]:
    """Means over samples of the names in METRICS, and `n`, their number. One completion a sample, None if it failed.

    The tasks may be mixed: a task's metrics are means over its own samples, `parse_failure` and `n` over all.
    ValueError if the two lists differ in length.
    """
    if len(samples) != len(completions):
        raise ValueError(f"{len(samples)} samples but {len(completions)} completions: one each, None where it failed")
    values: dict[str, list[float]] = {}
    for sample, completion in zip(samples, completions):
        for name, value in sample_metrics(sample, completion).items():
            values.setdefault(name, []).append(value)
    return {name: sum(values[name]) / len(values[name]) for name in METRICS if name in values} | {"n": len(samples)}


# ---- answers that never look at the video ---------------------------------------------------------------------------


def blind_baselines(samples: list[dict]) -> dict[str, dict[str, float]]:
    """What answers without any video score on these samples: four guessers, each with the names of `compute_metrics`.

    A guesser writes a completion as the model does and is scored as the model is. It answers only the tasks that it has
    an answer for: the names of the others are absent, and its `n` counts the samples it answered.

        whole_video           grounding, gqa              from 0 to the end
        best_constant_span    grounding, gqa              the best pair of fractions of the duration, one for each task
        start_box_copied      tracking                    the box of the prompt, eight times
        most_frequent_letter  qa, gqa, classification     the commonest answer of each task

    gqa asks for a letter and for windows: all three guessers name the commonest letter, and `most_frequent_letter`
    gives the whole video as its evidence. Fractions and letters are chosen on the very samples they are scored on,
    which makes them upper bounds: a blind model that has learnt the best constant from other data gets a little less.
    """
    letters = most_frequent_answers(samples)
    fallback = fallback_length(samples)
    by_task = {task: [sample for sample in samples if sample["task"] == task] for task in ("grounding", "gqa")}
    best = {task: best_constant_span(of_task, fallback) for task, of_task in by_task.items()}

    def whole_video(sample: dict) -> str:
        return write_span(sample, (0.0, 1.0), fallback, letters)

    def constant_span(sample: dict) -> str:
        return write_span(sample, best[sample["task"]], fallback, letters)

    def start_box(sample: dict) -> str:
        return write(sample, json.dumps(rewards.true_boxes(sample)[:1] * 8))

    def letter(sample: dict) -> str:
        return whole_video(sample) if sample["task"] == "gqa" else write(sample, letters[sample["task"]])

    guessers = {
        "whole_video": (whole_video, ("grounding", "gqa")),
        "best_constant_span": (constant_span, ("grounding", "gqa")),
        "start_box_copied": (start_box, ("tracking",)),
        "most_frequent_letter": (letter, ("qa", "gqa", "classification")),
    }
    metrics = {}
    for name, (guess, tasks) in guessers.items():
        answered = [sample for sample in samples if sample["task"] in tasks]
        metrics[name] = compute_metrics(answered, [guess(sample) for sample in answered])
    return metrics


def most_frequent_answers(samples: list[dict]) -> dict[str, str]:
    """{task: its commonest answer} for the tasks that have answers; the alphabet decides between equals."""
    truth = {"qa": rewards.true_letter, "gqa": rewards.true_letter, "classification": rewards.true_label}
    counts: dict[str, Counter] = {}
    for sample in samples:
        task = sample["task"]
        if task in truth:
            counts.setdefault(task, Counter())[truth[task](sample)] += 1
    return {task: min(count, key=lambda answer: (-count[answer], answer)) for task, count in counts.items()}


def clip_length(sample: dict, fallback: float) -> float:
    """Seconds of video behind the question, on the clock of `spans`: `start` and `end` cut a part out of the file."""
    ends = [sample[key] for key in ("end", "duration") if sample.get(key) is not None]
    return min(ends) - (sample.get("start") or 0.0) if ends else fallback


def fallback_length(samples: list[dict]) -> float:
    """Seconds for samples of unknown length: the mean of the known ones, else the latest annotated end of all samples.

    Not the sample's own latest end, which would hand half of the truth to a guesser that is meant to be blind.
    """
    lengths = [clip_length(sample, math.nan) for sample in samples]
    known = [length for length in lengths if not math.isnan(length)]
    if known:
        return sum(known) / len(known)
    return max((time for sample in samples for span in sample.get("spans") or () for time in span), default=0.0)


def best_constant_span(samples: list[dict], fallback: float) -> tuple[float, float]:
    """The pair of fractions of the length with the highest mean IoU, among all pairs of 0.00, 0.01, ..., 1.00.

    Set IoU, which for one annotated window is the plain IoU. `rewards.spans_iou` would take 5,050 calls a sample, so
    the search has its own arrays; whatever it finds is scored by `rewards` like any other answer. (0, 1) is the answer
    where there is nothing to choose.
    """
    windows, owners = [], []  # W annotated windows as fractions of the length, and whose they are
    for number, sample in enumerate(samples):
        length = clip_length(sample, fallback)
        if length > 0:
            merged = rewards.merge(sorted(span) for span in rewards.true_spans(sample))
            windows += [(start / length, end / length) for start, end in merged]
            owners += [number] * len(merged)
    if not windows:
        return 0.0, 1.0
    starts, ends = np.array(windows).T[:, :, None]  # (W, 1) each
    _, first_windows = np.unique(owners, return_index=True)  # (S,), the S samples that have a length
    truths = np.add.reduceat(ends - starts, first_windows)  # (S, 1) annotated, as a fraction of the length

    grid = np.linspace(0, 1, 101)
    best, best_iou = (0.0, 1.0), -1.0
    for number, start in enumerate(grid[:-1]):
        stops = grid[number + 1:]  # (K,)
        overlaps = np.maximum(np.minimum(ends, stops) - np.maximum(starts, start), 0.0)  # (W, K)
        shared = np.add.reduceat(overlaps, first_windows)  # (S, K)
        ious = (shared / (stops - start + truths - shared)).mean(axis=0)  # (K,)
        if ious.max() > best_iou:
            best, best_iou = (float(start), float(stops[ious.argmax()])), ious.max()
    return best


def write_span(sample: dict, fractions: tuple[float, float], fallback: float, letters: dict[str, str]) -> str:
    """A constant span as a completion; for gqa as the only window, with the commonest letter as the answer."""
    length = clip_length(sample, fallback)
    # Microseconds: rounding must not show in a metric, and no exponent may appear.
    start, end = (f"{fraction * length:.6f}" for fraction in fractions)
    if sample["task"] == "grounding":
        return write(sample, f"{start} to {end}")
    return write(sample, letters["gqa"], f"[({start}, {end})]")


def write(sample: dict, answer: str, glue: str | None = None) -> str:
    """The blocks that the sample's prompt asks for, with nothing thought."""
    thought = "" if sample.get("think") is False else "<think></think>"
    return f"{thought}<answer>{answer}</answer>" + ("" if glue is None else f"<glue>{glue}</glue>")


# ---- answers of a model ---------------------------------------------------------------------------------------------


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


def answer_all(model, loader, samples: list[dict], world: scale.World, asking: Asking, title: str) -> list[dict]:
    """Completions of every sample, on all ranks together; each sample is answered by exactly one rank.

    Returns, on every rank and in the order of `samples`, one dict a sample: id, task, completions, rewards, parts and
    reasons, each a list of `num_samples`. A sample whose video cannot be read has empty completions of reward 0.
    """
    mine = world.share(samples)
    predictions: list[dict] = []
    bar = tqdm(total=len(samples), desc=title, unit="q", disable=not world.is_first, leave=False)
    for start in range(0, len(mine), asking.batch):
        for sample in mine[start:start + 2 * asking.batch]:  # this batch, and the next while this one is answered
            loader.submit(sample)
        predictions += answer_batch(model, loader, mine[start:start + asking.batch], asking)
        bar.update(min(len(samples) - bar.n, asking.batch * world.size))
    bar.close()
    return scale.gather(world, predictions)


def answer_batch(model, loader, samples: list[dict], asking: Asking) -> list[dict]:
    prompts, problems = load_prompts(model, loader, samples, asking.style, asking.max_prompt_tokens)
    readable = [prompt for prompt in prompts if prompt is not None]
    # -1: no step of training draws this noise
    seeds = [sampling_seed(asking.seed, -1, prompt.sample["id"]) for prompt in readable]
    groups = iter(rollout(model, readable, group_size=asking.num_samples, max_new_tokens=asking.max_new_tokens,
                          temperature=asking.temperature, seeds=seeds, mix=asking.mix))
    predictions = []
    for sample, prompt in zip(samples, prompts):
        line = {"id": sample["id"], "task": sample["task"]}
        if prompt is None:
            K, nothing = asking.num_samples, rewards.score(sample, "", asking.mix)
            line |= {"completions": [""] * K, "rewards": [0.0] * K, "parts": [nothing.parts] * K,
                     "reasons": ["unreadable_video"] * K, "problem": problems[sample["id"]]}
        else:
            group = next(groups)
            line |= {"completions": group.texts, "rewards": [score.total for score in group.scores],
                     "parts": [score.parts for score in group.scores], "reasons": group.reasons}
        predictions.append(line)
    return predictions


def load_prompts(model, loader, samples: list[dict], style: str,
                 max_prompt_tokens: int | None = None) -> tuple[list[Prompt | None], dict[str, str]]:
    """The prompt of each sample, None where its video cannot be read; and those samples' ids with the reason."""
    prompts, problems = [], {}
    for sample in samples:
        try:
            clip = loader.load(sample)
        except VideoError as error:
            problems[sample["id"]] = str(error)
            prompts.append(None)
            continue
        prompts.append(prepare(sample, clip, model.tokenizer, style, max_prompt_tokens=max_prompt_tokens,
                               tokens_per_second=model.tokens_per_second, device=model.device))
    return prompts, problems


def sampling_seed(seed: int, step: int, sample_id: str) -> int:
    """Where the noise of one question in one step comes from: a function of these three and of nothing else."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {step} {sample_id}".encode(), digest_size=7).digest(), "big")


def with_style(samples: list[dict], style: str) -> list[dict]:
    """Samples that say themselves whether a thought is asked for: the format reward reads it there."""
    return [{**sample, "think": prompt_wants_thought(sample, style)} for sample in samples]


def print_table(columns: dict[str, dict], title: str = "") -> None:
    """One row a metric, one column an evaluation; what an evaluation does not have is a dash, or no column at all."""
    names = [name for name in METRICS if any(name in column for column in columns.values())]
    columns = {key: column for key, column in columns.items() if any("/" in name for name in column)}
    width = 2 + max(map(len, columns), default=0)
    print(f"\n{title:24}" + "".join(f"{name:>{width}}" for name in columns))
    for name in names:
        cells = [f"{column[name]:.3f}" if column.get(name) is not None else "-" for column in columns.values()]
        print(f"{name:24}" + "".join(f"{cell:>{width}}" for cell in cells))


# ---- the command line -----------------------------------------------------------------------------------------------


ASKED = "asked.json"  # in a model's folder
PUBLISHED = {"prompt": "think", "fps": 2.0, "max_frames": 768, "total_pixels": 3584 * 784, "min_pixels": 16 * 784,
             "max_new_tokens": 1024, "max_prompt_tokens": 16384}  # VideoChat-R1's, where a folder does not say


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Answer the questions of a data set and score the answers.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="Hugging Face folder or hub id of a Qwen2.5-VL")
    add("--data", required=True, nargs="+", help="samples: FILE[@VIDEO_ROOT][:N] or FILE[@VIDEO_ROOT][:P%%]")
    add("--out", required=True, type=Path, help="folder for predictions.jsonl and metrics.json")
    add("--video_root", help="where the videos lie, unless the entry says so; else the folder of its file")
    add("--tasks", nargs="+", choices=TASKS, help="only these tasks")
    add("--prompt", choices=STYLES, help=f"with thought, without, or Temporal-R1's JSON ({as_trained('prompt')})")
    add("--reward", default="sum", choices=rewards.MIXES, help="how the parts make up a reward")
    add("--num_samples", type=int, default=1, help="completions of each question (K)")
    add("--temperature", type=float, help="0 is greedy; by default 0 for one completion and 1 for several")
    add("--max_new_tokens", type=int, help=f"longest completion, in tokens ({as_trained('max_new_tokens')})")
    add("--max_prompt_tokens", type=int, help=f"a longer prompt is an error ({as_trained('max_prompt_tokens')})")
    add("--batch", type=int, default=8, help="questions that are answered together")
    add("--seed", type=int, default=0, help="of the sampling")
    add("--fps", type=float, help=f"frames looked at, for each second of video ({as_trained('fps')})")
    add("--max_frames", type=int, help=f"most frames of one video ({as_trained('max_frames')})")
    add("--total_pixels", type=int, help=f"pixel budget of a whole video ({as_trained('total_pixels')})")
    add("--min_pixels", type=int, help=f"least pixels of a frame ({as_trained('min_pixels')})")
    add("--num_workers", type=int, default=4, help="processes that decode videos; 0 decodes in this one")
    add("--decode_seconds", type=float, default=60, help="a video that takes longer is given up")
    add("--device", default="auto", help="auto takes CUDA, then MPS, then the CPU")
    args = parser.parse_args(arguments)
    trained = read_asked(args.model)
    for name, value in trained.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def as_trained(name: str) -> str:
    return f"default: as in the training of --model, else {PUBLISHED[name]}"


def read_asked(model: str) -> dict:
    """How the model was asked in training: at another resolution, or with another prompt, it is another model."""
    file = Path(model) / ASKED
    return PUBLISHED | (json.loads(file.read_text()) if file.exists() else {})


def write_asked(folder: Path, settings: dict) -> None:
    """Beside the weights, what `read_asked` finds there later."""
    (folder / ASKED).write_text(json.dumps({name: settings[name] for name in PUBLISHED}, indent=1) + "\n")


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    world = scale.start(args.device)
    samples = with_style(load_samples(args.data, args.video_root, args.tasks, args.seed), args.prompt)
    model = VideoLM.load(args.model, world.device)
    settings = VideoSettings(args.fps, args.max_frames, args.total_pixels, args.min_pixels)
    temperature = args.temperature if args.temperature is not None else float(args.num_samples > 1)
    asking = Asking(args.prompt, args.max_new_tokens, args.max_prompt_tokens, args.num_samples, temperature, args.reward,
                    args.seed, args.batch)
    with VideoLoader(settings, num_workers=args.num_workers, deadline=args.decode_seconds) as loader:
        predictions = answer_all(model, loader, samples, world, asking, "answering")
    if world.is_first:
        write_results(args, samples, predictions)
    scale.stop()


def write_results(args: argparse.Namespace, samples: list[dict], predictions: list[dict]) -> None:
    """predictions.jsonl, metrics.json, and the table beside what a blind answer scores."""
    args.out.mkdir(parents=True, exist_ok=True)
    with open(args.out / "predictions.jsonl", "w", encoding="utf-8") as file:
        for prediction in predictions:
            file.write(json.dumps(prediction) + "\n")
    # Several completions of a sample: the mean over them, one compute_metrics for each.
    rounds = [compute_metrics(samples, [p["completions"][k] for p in predictions]) for k in range(args.num_samples)]
    metrics = {name: float(np.mean([r[name] for r in rounds])) for name in rounds[0]} | {"n": len(samples)}
    baselines = blind_baselines(samples)
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    report = {**metrics, "baselines": baselines, "config": settings}
    (args.out / "metrics.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print_table({"model": metrics, **baselines}, f"{len(samples)} samples")
    for prediction in predictions:
        if "problem" in prediction:
            print(f"unreadable: {prediction['id']}: {prediction['problem']}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:  # a wrong file or value, named in the message
        sys.exit(f"error: {error}")
