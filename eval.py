"""Did it work? Completions go in, the numbers of the papers' tables come out, next to what a blind guesser would get.

Every completion is scored by `rewards.score`, the function that training maximises: no second parser, no second IoU.
A sample that fails in any way (unreadable video, unreadable answer) stays in the denominator with 0. Dropping it, as
published evaluation scripts do, makes a model look better the more often it breaks.

    python eval.py --model M --video clip.mp4 --task grounding --question "a person opens the door"     one question
    torchrun eval.py --model M --data x.jsonl --out DIR                                                  a data set

Read in this order: how a model is asked (`answer_all`, for training, selection and evaluation alike), what one completion
is worth (`sample_metrics`), the means (`compute_metrics`), four answers that never look at the video (`blind_baselines`).
The four are no formality: on VideoChat-R1's 180 tracking sequences, copying the start box eight times gets an AO of 42.35,
where the paper's models get 41.8 to 43.8. The command line, with intervals, categories and probes, is tools/evaluate.py.

Left out on purpose: official scripts' own parsers (numbers here are those of one parser for all), blind captions,
retrying a question, and answers that are shared between samples.
"""

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tqdm import tqdm

import rewards
from data import Clip, PromptTooLong, reference_caption
from grpo import rollout
from lib.answers import SamplingSettings, append_lines, read_partial
from lib.captions import Judge, split_sentences, told, words_judge
from lib.distributed import World
from lib.questions import load_prompts, sampling_seed
from lib.readers import VideoError
from lib.tables import METRICS

# ---- the answers of a model ------------------------------------------------------------------------------------------


def answer_all(model, loader, samples: list[dict], world: World, sampling: SamplingSettings, score: Callable, title: str,
               partial: Path | None = None, change: Callable[[dict, Clip], Clip] | None = None) -> list[dict]:
    """Completions of every sample, on all ranks together; each sample is answered by exactly one rank.

    Returns, on every rank and in the order of `samples`, one dict a sample: id, task, completions, rewards, parts and
    reasons, each a list of `num_samples`. A sample whose video cannot be read, or whose prompt is too long, has empty
    completions of reward 0 and says so under `problem`. score: (sample, completion) -> rewards.Score.

    partial: a folder where every rank writes its answers down as they come. What lies there is not asked again; the
    caller removes it when the result is safe. change: what is done to a clip before the model sees it (probes).
    """
    done = read_partial(world, partial, samples) if partial else {}
    mine = world.share([sample for sample in samples if sample["id"] not in done])
    answered: list[dict] = []
    bar = tqdm(total=len(samples), initial=len(done), desc=title, unit="q", disable=not world.is_first, leave=False)
    for start in range(0, len(mine), sampling.batch):
        world.phase(f"{title}: from question {start}")
        for sample in mine[start:start + 2 * sampling.batch]:  # this batch, and the next while this one is answered
            loader.submit(sample)
        batch = answer_batch(model, loader, mine[start:start + sampling.batch], sampling, score, change)
        if partial:
            append_lines(partial / f"rank{world.rank}.jsonl", batch)
        answered += batch
        bar.update(min(len(samples) - bar.n, sampling.batch * world.size))
    bar.close()
    world.phase(f"{title}: waiting for the answers of the others")  # also where nothing was left to ask
    done |= {prediction["id"]: prediction for prediction in world.all_gather(answered)}
    return [done[sample["id"]] for sample in samples]


def answer_batch(model, loader, samples: list[dict], sampling: SamplingSettings, score: Callable,
                 change: Callable[[dict, Clip], Clip] | None = None) -> list[dict]:
    prompts, problems = load_prompts(model, loader, samples, sampling.style, sampling.max_prompt_tokens, change,
                                     forgive=(VideoError, PromptTooLong))
    askable = [prompt for prompt in prompts if prompt is not None]
    # -1: no step of training draws this noise
    seeds = [sampling_seed(sampling.seed, -1, prompt.sample["id"]) for prompt in askable]
    groups = iter(rollout(model, askable, score, group_size=sampling.num_samples, temperature=sampling.temperature,
                          max_new_tokens=sampling.max_new_tokens, seeds=seeds))
    predictions = []
    for sample, prompt in zip(samples, prompts):
        line = {"id": sample["id"], "task": sample["task"]}
        if prompt is None:
            problem, K = problems[sample["id"]], sampling.num_samples
            reason = "prompt_too_long" if isinstance(problem, PromptTooLong) else "unreadable_video"
            line |= {"completions": [""] * K, "rewards": [0.0] * K, "reasons": [reason] * K, "problem": str(problem),
                     "parts": [score(sample, "").parts] * K}
        else:
            group = next(groups)
            line |= {"completions": group.texts, "rewards": [score.total for score in group.scores],
                     "parts": [score.parts for score in group.scores], "reasons": group.reasons}
        predictions.append(line)
    return predictions


# ---- what one completion is worth -----------------------------------------------------------------------------------


def sample_metrics(sample: dict, completion: str | None,
                   judge: Judge = words_judge) -> dict[str, float]:
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
    _, parts, reason = rewards.score(sample, completion, judge=judge)
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
    elif task == "captioning":
        metrics["recall"] = parts["event_recall"]
        metrics["precision"] = caption_precision(sample, completion, judge)
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


def caption_precision(sample: dict, completion: str, judge: Judge = words_judge) -> float:
    """The share of the caption's sentences that the annotated events tell, by the judge with its two sides exchanged.

    Dream-1k has a model cut the caption into events first; here a sentence is one, so that a sentence of three true
    events may fail where three short ones pass. It measures against the annotation: what is true and not annotated is
    not told.

    >>> sample = {"id": "a", "task": "captioning", "events": ["A man opens the door", "He takes a cup"]}
    >>> caption_precision(sample, "<answer>The man opens a door. A dog barks.</answer>")
    0.5
    """
    caption, _ = rewards.read(completion, "answer", rewards.parse_caption)
    sentences = split_sentences(caption or "")
    reference = reference_caption(sample)
    return sum(told(judge, [(sentence, reference) for sentence in sentences])) / max(len(sentences), 1)


# ---- the means ------------------------------------------------------------------------------------------------------


def compute_metrics(samples: list[dict], completions: list[str | None],
                    judge: Judge = words_judge) -> dict[str, float]:
    """Means over samples of the names in METRICS, and `n`, their number. One completion a sample, None if it failed.

    The tasks may be mixed: a task's metrics are means over its own samples, `parse_failure` and `n` over all.
    captioning/F1 is the F1 of the two means, as VideoChat-R1's rows for Dream-1k are (30.6 from 33.8 and 27.9).
    ValueError if the two lists differ in length.
    """
    if len(samples) != len(completions):
        raise ValueError(f"{len(samples)} samples but {len(completions)} completions: one each, None where it failed")
    return means_of([sample_metrics(sample, completion, judge) for sample, completion in zip(samples, completions)])


def means_of(values: list[dict[str, float]]) -> dict[str, float]:
    """Means of what `sample_metrics` gives, in the order of METRICS, and `n`."""
    columns: dict[str, list[float]] = {}
    for of_sample in values:
        for name, value in of_sample.items():
            columns.setdefault(name, []).append(value)
    means = {name: sum(column) / len(column) for name, column in columns.items()}
    if "captioning/recall" in means:
        means["captioning/F1"] = float(f1(means["captioning/precision"], means["captioning/recall"]))
    return {name: means[name] for name in METRICS if name in means} | {"n": len(values)}


def f1(precision, recall):
    """Harmonic mean of two numbers or two arrays; 0 where both are."""
    return 2 * precision * recall / np.maximum(precision + recall, 1e-12)


def values_of(samples: list[dict], predictions: list[dict],
              judge: Judge = words_judge) -> list[dict[str, float]]:
    """The metrics of each sample; of its K completions the mean."""
    values = []
    for sample, prediction in zip(samples, predictions, strict=True):
        rounds = [sample_metrics(sample, completion, judge) for completion in prediction["completions"]]
        values.append({name: sum(r[name] for r in rounds) / len(rounds) for name in rounds[0]})
    return values


def evaluate(model, loader, samples: list[dict], world: World, sampling: SamplingSettings, score: Callable,
             title: str) -> tuple[dict[str, float], list[dict]]:
    """Ask, then measure the first completion of each sample: (metrics, answers as `answer_all` gives them).

    `score` is `rewards.score` with its `mix` and `judge` filled in; captions are measured by the same judge."""
    predictions = answer_all(model, loader, samples, world, sampling, score, title)
    completions = [prediction["completions"][0] for prediction in predictions]
    return compute_metrics(samples, completions, getattr(score, "keywords", {}).get("judge", words_judge)), predictions


def first_metrics(metrics: dict) -> list[str]:
    """The name of the first metric of each task that was measured."""
    names = [name for name in METRICS if "/" in name and metrics.get(name) is not None]
    return list({name.split("/")[0]: name for name in reversed(names)}.values())[::-1]


def score_of(metrics: dict) -> float:
    """One number to tell the best model by: the mean of each task's first metric."""
    names = first_metrics(metrics)
    return sum(metrics[name] for name in names) / max(len(names), 1)


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
    captioning has no guesser: what a text model says without a look depends on the model.
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


if __name__ == "__main__":
    from tools.evaluate import main

    main()
