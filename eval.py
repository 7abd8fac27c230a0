"""Did it work? Completions go in, the numbers of the papers' tables come out, next to what a blind guesser would get.

Every completion is scored by `rewards.score`, the function that training maximises: no second parser, no second IoU.
A sample that fails in any way (unreadable video, unreadable answer) stays in the denominator with 0. Dropping it, as
published evaluation scripts do, makes a model look better the more often it breaks.

    python eval.py --model M --video clip.mp4 --task grounding --question "a person opens the door"     one question
    torchrun eval.py --model M --data x.jsonl --out DIR                                                  a data set

Read in this order: how a model is asked (`answer_all`, for training, selection and evaluation alike), what is counted of
a completion, answers that never look at the video, what is reported of each task (`REPORTS`), the means
(`compute_metrics`, and `blind_baselines` for the blind answers). Those are no formality: on VideoChat-R1's 180 tracking
sequences, copying the start box eight times gets an AO of 42.35, where the paper's models get 41.8 to 43.8. The command
line, with intervals, categories and probes, is tools/evaluate.py.

Left out on purpose: official scripts' own parsers (numbers here are those of one parser for all),
retrying a question, and answers that are shared between samples.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

import rewards
from data import Clip, PromptTooLong
from grpo import rollout
from lib.answers import SamplingSettings, append_lines, read_partial
from lib.captions import Judge, as_caption, words_judge
from lib.distributed import World
from lib.progress import Progress
from lib.questions import load_prompts, sampling_seed
from lib.readers import VideoError
from lib.samples import entry_of

# ---- the answers of a model ------------------------------------------------------------------------------------------


def answer_all(model, loader, samples: list[dict], world: World, sampling: SamplingSettings, score: Callable, title: str,
               partial: Path | None = None, change: Callable[[dict, Clip], Clip] | None = None,
               progress: Progress | None = None) -> list[dict]:
    """Completions of every sample, on all ranks together; each sample is answered by exactly one rank.

    Returns, on every rank and in the order of `samples`, one dict a sample: id, task, completions, rewards, parts and
    reasons, each a list of `num_samples`. A sample whose video cannot be read, or whose prompt is too long, has empty
    completions of reward 0 and says so under `problem`. score: (sample, completion) -> rewards.Score.

    partial: a folder where every rank writes its answers down as they come. What lies there is not asked again; the
    caller removes it when the result is safe. change: what is done to a clip before the model sees it (probes).
    progress: the bar of a run of which this is the stage `title`; else there is one for this alone.
    """
    done = read_partial(world, partial, samples) if partial else {}
    mine = world.share([sample for sample in samples if sample["id"] not in done])
    answered: list[dict] = []
    bar = (progress.begin(title, len(samples), len(done)) if progress else
           tqdm(total=len(samples), initial=len(done), desc=title, unit="q", disable=not world.is_first, leave=False))
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


# ---- a second look -----------------------------------------------------------------------------------------------------


def answer_twice(model, loader, samples: list[dict], world: World, sampling: SamplingSettings, score: Callable, title: str,
                 partial: Path | None = None, change: Callable[[dict, Clip], Clip] | None = None,
                 density: float = 1.5) -> list[dict]:
    """As `answer_all`, after a first look that only decides where the second one looks more closely.

    VideoChat-R1.5's clue perception: the windows of the first answer are shown with `density` times as many of their frames
    as the rest, in the same number of frames. A qa sample is asked for windows first, in the words of gqa. Each line gets
    `first`: {completions, windows}, the first look's; windows are null where it named none that lies in the video: then the
    second look sees the frames of the first. Both looks go on after a kill, each in its own part of `partial`.
    """
    truths = {sample["id"]: sample for sample in samples}  # the first answer to a qa sample is scored as one, too
    looks = answer_all(model, loader, [*map(first_question, samples)], world, sampling,
                       lambda asked, completion: score(truths[asked["id"]], completion), f"{title}, first look",
                       partial and partial / "first", change)
    firsts = [{"completions": look["completions"], "windows": windows_of(sample, look["completions"][0])}
              for sample, look in zip(samples, looks)]
    closer = [{**sample, "dense_windows": first["windows"], "density": density} if first["windows"] else sample
              for sample, first in zip(samples, firsts)]
    answers = answer_all(model, loader, closer, world, sampling, score, f"{title}, second look",
                         partial and partial / "second", change)
    return [answer | {"first": first} for answer, first in zip(answers, firsts)]


def first_question(sample: dict) -> dict:
    return {**sample, "task": "gqa"} if sample["task"] == "qa" and "video" in sample else sample


def windows_of(sample: dict, completion: str) -> list[list[float]] | None:
    """The windows [start, end] that a first answer points to, without those that are empty or outside the video."""
    tag = "answer" if sample["task"] == "grounding" else "glue"
    found, _ = rewards.read(first_question(sample), completion, tag)
    windows = [found] if found and tag == "answer" else found or []
    length = clip_length(sample, math.inf)
    return [[start, end] for start, end in windows if max(start, 0) < min(end, length)] or None


# ---- what is counted of one completion --------------------------------------------------------------------------------


class Answer(NamedTuple):
    """A completion that has been scored, as the metrics see it."""

    sample: dict
    completion: str
    parts: dict[str, float] = {}  # of its reward
    judge: Judge = words_judge


def part(name: str) -> Callable[[Answer], float]:
    """The metric that is this part of the reward."""
    return lambda answer: answer.parts[name]


def part_reaches(name: str, threshold: float) -> Callable[[Answer], float]:
    """The metric that is 1 where this part of the reward reaches the threshold."""
    return lambda answer: reaches(answer.parts[name], threshold)


def reaches(value: float, threshold: float) -> float:
    """1.0 if value >= threshold, else 0.0.

    VideoChat-R1's script uses >= as well (Time-R1's uses >). The tolerance is for decimals: 1.2 to 1.9 against
    1.2 to 2.2 is 0.7 on paper and 0.6999999999999998 in binary.
    """
    return float(value >= threshold - 1e-9)


def longest_window_iop(answer: Answer) -> float:
    """Intersection over *prediction*: the share of the longest predicted window that lies in one annotated window.

    NExT-GQA's official IoP takes a single prediction. Of several we take the longest as written (the first on a tie)
    and the annotated window that suits it best. Unlike there, a window of length 0 has IoP 0: a point can be guessed.

    >>> sample = {"id": "a", "task": "gqa", "spans": [[5, 10], [20, 25]]}
    >>> longest_window_iop(Answer(sample, "<glue>[(20, 25), (2, 10)]</glue>"))
    0.625
    """
    windows, _ = rewards.read(answer.sample, answer.completion, "glue")
    if not windows:
        return 0.0
    # Rounded, because 5.3 - 5.1 is longer than 0.3 - 0.1 in binary. max keeps the first of equals.
    start, end = max(windows, key=lambda window: round(window[1] - window[0], 9))
    truths = map(sorted, rewards.true_spans(answer.sample))
    shared = max(min(end, true_end) - max(start, true_start) for true_start, true_end in truths)
    return rewards.ratio(shared, end - start)


def windows_found(answer: Answer) -> tuple[float, float]:
    """(precision, recall) of the windows of a moments answer: which share of those named is right, and of the true ones named?

    A window is right if its IoU with a true one reaches 0.5, and each makes a pair with one other at most: of a window that
    is named twice one is wrong. Windows are counted as written, true ones that overlap or touch as one, as in the reward.
    (1, 1) for `[]` where the truth is `[]`, else (0, 0) where either is.

    >>> sample = {"id": "a", "task": "moments", "spans": [[5, 10], [20, 25], [30, 35]]}
    >>> windows_found(Answer(sample, "<answer>[(5, 9), (5, 10), (19, 25), (26, 29)]</answer>"))
    (0.5, 0.6666666666666666)
    """
    windows, _ = rewards.read(answer.sample, answer.completion, "answer")
    truths = rewards.merge(sorted(span) for span in rewards.true_spans(answer.sample))
    if not windows or not truths:
        return (float(windows == truths),) * 2
    # True windows are apart, so none of those named has half in common with two of them (but for the tolerance of `reaches`):
    # to count the true ones that are met is to find the most pairs.
    met = sum(any(reaches(rewards.temporal_iou(window, truth), 0.5) for window in windows) for truth in truths)
    return min(met / len(windows), 1.0), met / len(truths)


def denies(answer: Answer) -> float | None:
    """Does the answer say that it is not in this video? None for what is: this is reported of the others alone."""
    if rewards.true_spans(answer.sample):
        return None
    return float(rewards.read(answer.sample, answer.completion, "answer")[0] == [])


def unseen_boxes_overlap(answer: Answer) -> float:
    """Mean IoU of boxes 2 to 7, the part of AO that takes eyes.

    Box 0 is given in the prompt and box 1 is one frame later, where the object has hardly moved.
    """
    boxes, _ = rewards.read(answer.sample, answer.completion, "answer")
    if boxes is None:
        return 0.0
    overlaps = list(map(rewards.box_iou, boxes, rewards.true_boxes(answer.sample)))
    return sum(overlaps[2:]) / 6


def caption_precision(answer: Answer) -> float:
    caption, _ = rewards.read(answer.sample, answer.completion, "answer")
    return rewards.caption_precision(answer.sample["events"], caption or "", answer.judge)


def f1(precision, recall):
    """Harmonic mean of two numbers or two arrays; 0 where both are."""
    return 2 * precision * recall / np.maximum(precision + recall, 1e-12)


# ---- answers that never look at the video ---------------------------------------------------------------------------

# Answers a task without any video: (all samples of the task, seconds for those of unknown length) -> their completions.
# Whatever it chooses it chooses on the very samples that it is scored on, which makes it an upper bound: a blind model that
# has learnt the best constant from other data gets a little less.
Guesser = Callable[[list[dict], float], list[str]]


WINDOW = "[({}, {})]"  # a list of one window, as moments and gqa write it


def say_letter(samples: list[dict], fallback: float) -> list[str]:
    letter = commonest(map(rewards.true_letter, samples))
    return [write(sample, letter) for sample in samples]


def say_label(samples: list[dict], fallback: float) -> list[str]:
    label = commonest(map(rewards.true_label, samples))
    return [write(sample, label) for sample in samples]


def commonest(answers: Iterable[str]) -> str:
    """The alphabet decides between equals."""
    count = Counter(answers)
    return min(count, key=lambda answer: (-count[answer], answer))


def from_start_to_end(samples: list[dict], fallback: float) -> tuple[float, float]:
    return 0.0, 1.0


def say_span(samples: list[dict], fallback: float, choose=from_start_to_end, form: str = "{} to {}") -> list[str]:
    """The same fractions of every video."""
    fractions = choose(samples, fallback)
    return [write(sample, form.format(*times(sample, fractions, fallback))) for sample in samples]


say_window = partial(say_span, form=WINDOW)


def say_no_window(samples: list[dict], fallback: float) -> list[str]:
    """Whatever is asked, it is not in this video."""
    return [write(sample, "[]") for sample in samples]


def say_letter_and_span(samples: list[dict], fallback: float, choose=from_start_to_end) -> list[str]:
    """The commonest letter, and the same fractions of every video as the only window."""
    letter, fractions = commonest(map(rewards.true_letter, samples)), choose(samples, fallback)
    return [write(sample, letter, WINDOW.format(*times(sample, fractions, fallback))) for sample in samples]


def copy_start_box(samples: list[dict], fallback: float) -> list[str]:
    """The box of the prompt, eight times."""
    return [write(sample, json.dumps([start_box(sample)] * 8)) for sample in samples]


def start_box(sample: dict) -> list[float]:
    """In the units of the model, which is what rewards.py reads."""
    return [value * sample.get("box_units", 1) for value in rewards.true_boxes(sample)[0]]


MOST_CAPTIONS = 100  # that are tried as the constant one


def say_best_caption(samples: list[dict], fallback: float) -> list[str]:
    """Of the commonest annotated captions the one with the highest mean reward, said of every video."""
    counts = Counter(as_caption(sample["events"]) for sample in samples)
    candidates = sorted(counts, key=lambda caption: (-counts[caption], caption))[:MOST_CAPTIONS]
    asked = samples[:: math.ceil(len(samples) / 1000)]  # the rules are quick, a hundred captions of all videos are not

    def mean_reward(caption: str) -> float:
        return sum(rewards.score(sample, write(sample, caption)).total for sample in asked) / len(asked)

    best = max(candidates, key=mean_reward)
    return [write(sample, best) for sample in samples]


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


def times(sample: dict, fractions: tuple[float, float], fallback: float) -> list[str]:
    """Start and end of a constant span in seconds."""
    # Microseconds: rounding must not show in a metric, and no exponent may appear.
    return [f"{fraction * clip_length(sample, fallback):.6f}" for fraction in fractions]


def write(sample: dict, answer: str, glue: str | None = None) -> str:
    """The blocks that the sample's prompt asks for, with nothing thought."""
    thought = "" if sample.get("think") is False else "<think></think>"
    return f"{thought}<answer>{answer}</answer>" + ("" if glue is None else f"<glue>{glue}</glue>")


# ---- what is reported of each task ------------------------------------------------------------------------------------


class Report(NamedTuple):
    """The metrics of one task, in the order of the tables, and the blind answers that they are compared with."""

    # name -> in [0, 1], of one completion; the mean is reported. None: it is not about this sample, which leaves its mean alone
    metrics: dict[str, Callable[[Answer], float | None]]
    of_means: dict[str, Callable[[dict], float]] = {}  # name -> of those means; stands before them in the tables
    blind: dict[str, Guesser] = {}  # column of the tables -> how this task is answered in it


REPORTS = {
    "grounding": Report(
        metrics={"mIoU": part("temporal_iou"), "R@0.3": part_reaches("temporal_iou", 0.3),
                 "R@0.5": part_reaches("temporal_iou", 0.5), "R@0.7": part_reaches("temporal_iou", 0.7)},
        blind={"whole_video": say_span, "best_constant_span": partial(say_span, choose=best_constant_span)}),
    "moments": Report(
        metrics={"mIoU": part("temporal_iou"), "F1@0.5": lambda answer: float(f1(*windows_found(answer))),
                 "precision@0.5": lambda answer: windows_found(answer)[0],
                 "recall@0.5": lambda answer: windows_found(answer)[1], "Acc@absent": denies},
        blind={"whole_video": say_window, "best_constant_span": partial(say_window, choose=best_constant_span),
               "not_in_video": say_no_window}),
    "qa": Report(metrics={"accuracy": part("accuracy")}, blind={"most_frequent_letter": say_letter}),
    "gqa": Report(
        metrics={"accuracy": part("accuracy"), "mIoU": part("temporal_iou"), "mIoP": longest_window_iop,
                 "Acc@GQA": lambda answer: answer.parts["accuracy"] * reaches(longest_window_iop(answer), 0.5)},
        blind={"whole_video": say_letter_and_span, "most_frequent_letter": say_letter_and_span,
               "best_constant_span": partial(say_letter_and_span, choose=best_constant_span)}),
    "tracking": Report(
        metrics={"AO": part("box_iou"), "AO@2-7": unseen_boxes_overlap, "R@0.5": part_reaches("box_iou", 0.5),
                 "R@0.7": part_reaches("box_iou", 0.7)},
        blind={"start_box_copied": copy_start_box}),
    "classification": Report(metrics={"accuracy": part("accuracy")}, blind={"most_frequent_letter": say_label}),
    "captioning": Report(
        metrics={"recall": part("event_recall"), "precision": caption_precision},
        of_means={"F1": lambda means: f1(means["precision"], means["recall"])},
        blind={"best_constant_caption": say_best_caption}),
}

# The order of all tables. A task that is not in the data has none of its names in the result.
METRICS = (*(f"{task}/{name}" for task, report in REPORTS.items() for name in (*report.of_means, *report.metrics)),
           "parse_failure")
# The first four are in every result; another one is where a task of the data has it.
ALWAYS = ("whole_video", "best_constant_span", "start_box_copied", "most_frequent_letter")
GUESSERS = tuple(dict.fromkeys([*ALWAYS, *(name for report in REPORTS.values() for name in report.blind)]))


def report_of(task: str) -> Report:
    return entry_of(REPORTS, task, "REPORTS of eval.py (its metrics and its blind answers)")


# ---- the means ------------------------------------------------------------------------------------------------------


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
    completion, task = completion or "", sample["task"]
    _, parts, reason = rewards.score(sample, completion, judge=judge)
    answer = Answer(sample, completion, parts, judge)
    measured = {f"{task}/{name}": metric(answer) for name, metric in report_of(task).metrics.items()}
    metrics = {name: value for name, value in measured.items() if value is not None}
    return metrics | {"parse_failure": float(reason in rewards.UNREADABLE)}


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
    means |= {name: float(value) for name, value in metrics_of_means(means).items()}
    return {name: means[name] for name in METRICS if name in means} | {"n": len(values)}


def metrics_of_means(means: dict) -> dict:
    """The metrics that are computed from other means, of numbers or of arrays alike."""
    found = {}
    for task, report in REPORTS.items():
        own = {name: means[f"{task}/{name}"] for name in report.metrics if f"{task}/{name}" in means}
        found |= {f"{task}/{name}": metric(own) for name, metric in report.of_means.items() if own}
    return found


def values_of(samples: list[dict], predictions: list[dict],
              judge: Judge = words_judge) -> list[dict[str, float]]:
    """The metrics of each sample; of its K completions the mean."""
    values = []
    for sample, prediction in zip(samples, predictions, strict=True):
        rounds = [sample_metrics(sample, completion, judge) for completion in prediction["completions"]]
        values.append({name: sum(r[name] for r in rounds) / len(rounds) for name in rounds[0]})
    return values


def evaluate(model, loader, samples: list[dict], world: World, sampling: SamplingSettings, score: Callable,
             title: str, progress: Progress | None = None) -> tuple[dict[str, float], list[dict]]:
    """Ask, then measure the first completion of each sample: (metrics, answers as `answer_all` gives them).

    `score` is `rewards.score` with its `mix` and `judge` filled in; captions are measured by the same judge."""
    predictions = answer_all(model, loader, samples, world, sampling, score, title, progress=progress)
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


def blind_baselines(samples: list[dict], judge: Judge = words_judge) -> dict[str, dict[str, float]]:
    """What answers without any video score on these samples: blind guessers, each with the names of `compute_metrics`. The judge
    of captions has to be the one that judges the model's.

    A guesser writes a completion as the model does and is scored as the model is. It answers only the tasks that it has
    an answer for: the names of the others are absent, and its `n` counts the samples it answered.

        whole_video           grounding, moments, gqa     from 0 to the end
        best_constant_span    grounding, moments, gqa     the best pair of fractions of the duration, one for each task
        start_box_copied      tracking                    the box of the prompt, eight times
        most_frequent_letter  qa, gqa, classification     the commonest answer of each task
        not_in_video          moments                     `[]`, to all questions; absent where there are none of this task
        best_constant_caption captioning                  the annotated caption that earns most, of every video; absent likewise

    gqa asks for a letter and for windows: all three guessers name the commonest letter, and `most_frequent_letter`
    gives the whole video as its evidence.
    """
    fallback = fallback_length(samples)
    by_task: dict[str, list[dict]] = {}
    for sample in samples:
        by_task.setdefault(sample["task"], []).append(sample)
    metrics = {}
    for guesser in GUESSERS:
        asked = {task: of_task for task, of_task in by_task.items() if guesser in report_of(task).blind}
        answers = [report_of(task).blind[guesser](of_task, fallback) for task, of_task in asked.items()]
        if asked or guesser in ALWAYS:
            metrics[guesser] = compute_metrics([*chain(*asked.values())], [*chain(*answers)], judge)
    return metrics


if __name__ == "__main__":
    from tools.evaluate import main

    main()
