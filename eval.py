"""Did it work? Completions go in, the numbers of the papers' tables come out, next to what a blind guesser would get.

Every completion is scored by `rewards.score`, the function that training maximises: no second parser, no second IoU.
A sample that fails in any way (unreadable video, unreadable answer) stays in the denominator with 0. Dropping it, as
published evaluation scripts do, makes a model look better the more often it breaks.

    python eval.py --model M --video clip.mp4 --task grounding --question "a person opens the door"     one question
    torchrun eval.py --model M --data x.jsonl --out DIR                                                  a data set

Read in this order: what one completion is worth (`sample_metrics`), the means (`compute_metrics`), how sure they are
and what they are for each kind of question, four answers that never look at the video (`blind_baselines`), the command
line. How a model is asked is in answers.py. The four are no formality: on VideoChat-R1's 180 tracking sequences,
copying the start box eight times gets an AO of 42.35, where the paper's models get 41.8 to 43.8.

Left out on purpose: official scripts' own parsers (numbers here are those of one parser for all), blind captions, and
intervals that know that questions about one video are alike.
"""

import argparse
import hashlib
import json
import math
import platform
import shutil
import sys
from collections import Counter
from importlib import metadata
from pathlib import Path

import numpy as np

import rewards
from answers import (CHANGES, SETTINGS, Asking, answer_all, claim, complete, probe_samples, what_decides, what_is_read,
                     with_style, write_lines)
from data import STYLES, VideoSettings, prepare, reference_caption
from lib import distributed as scale
from lib import published
from lib.captions import Judge, split_sentences, told, words_judge
from lib.judge import load_judge
from lib.loader import VideoLoader
from lib.readers import VideoError
from lib.samples import FIELDS, TASKS, load_samples, parse_entry
from lib.tables import METRICS, print_categories, print_probes, print_published, print_reasons, print_table
from model import VideoLM

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


# ---- how sure, and for which kind of question -----------------------------------------------------------------------

RESAMPLES = 1000


def resampled_means(values: list[dict[str, float]]) -> dict[str, np.ndarray]:
    """The means of RESAMPLES data sets drawn with replacement from this one: {name: (RESAMPLES,)}.

    Which samples are drawn depends on their number alone. So two runs over the same samples meet the same draws, and
    the differences of their means are those of one data set asked twice.
    """
    means = {}
    for name in METRICS:
        column = np.array([of_sample[name] for of_sample in values if name in of_sample])  # (S,)
        if len(column):
            rng = np.random.default_rng(0)
            draws = (rng.integers(0, len(column), len(column)) for _ in range(RESAMPLES))
            means[name] = np.array([column[draw].mean() for draw in draws])
    if "captioning/recall" in means:
        means["captioning/F1"] = f1(means["captioning/precision"], means["captioning/recall"])
    return means


def intervals_of(means: dict[str, np.ndarray]) -> dict[str, list[float]]:
    """95 % percentile bootstrap: {name: [low, high]}. It covers the choice of samples, not that of a training seed."""
    return {name: np.quantile(column, (0.025, 0.975)).tolist() for name, column in means.items()}


NEXT_QA = {"CW", "CH", "TN", "TC", "TP", "DC", "DL", "DO"}  # causal, temporal, descriptive: why, how, next, ...


def by_category(samples: list[dict], values: list[dict[str, float]]) -> dict[str, dict[str, dict[str, float]]]:
    """{task: {category: metrics}} for the tasks whose samples have a `category`, in the order of the file.

    `macro mean` is over the categories, each with the same weight. Where they are NExT-QA's types, TP counts as TN, as
    in the official script, and `Acc@C`, `Acc@T` and `Acc@D` sum up by the first letter. `blind` is the best blind
    answer, chosen on the category itself, by the first metric of the row.
    """
    tables = {}
    for task in TASKS:
        pairs = [(sample, value) for sample, value in zip(samples, values)
                 if sample["task"] == task and sample.get("category")]
        is_next_qa = {str(sample["category"]) for sample, _ in pairs} <= NEXT_QA
        groups: dict[str, list] = {}
        for sample, value in pairs:
            category = str(sample["category"])
            groups.setdefault("TN" if is_next_qa and category == "TP" else category, []).append((sample, value))
        if not groups:
            continue
        rows = {category: category_row(group) for category, group in groups.items()}
        names = next(iter(rows.values()))
        macro = {name: sum(row[name] for row in rows.values()) / len(rows) for name in names} | {"n": len(pairs)}
        if is_next_qa:
            for letter in "CTD":
                if group := [pair for pair in pairs if str(pair[0]["category"])[0] == letter]:
                    rows[f"Acc@{letter}"] = category_row(group)
        tables[task] = rows | {"macro mean": macro}
    return tables


def category_row(pairs: list[tuple[dict, dict]]) -> dict[str, float]:
    """The metrics of some samples of one task, and `blind` where there is a blind answer to them."""
    row = means_of([value for _, value in pairs])
    guesses = blind_baselines([sample for sample, _ in pairs]).values()
    name = next(name for name in METRICS if name in row)
    known = [guess[name] for guess in guesses if name in guess]
    return row | ({"blind": max(known)} if known else {})


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


# ---- the command line -----------------------------------------------------------------------------------------------


ASKED = "asked.json"  # in a model's folder
PUBLISHED = {"prompt": "think", "fps": 2.0, "max_frames": 768, "total_pixels": 3584 * 784, "min_pixels": 16 * 784,
             "max_new_tokens": 1024, "max_prompt_tokens": 16384}  # VideoChat-R1's, where a folder does not say


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Answer one question about one video (--video), or the questions of a "
                                                 "data set (--data) and score the answers.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="Hugging Face folder or hub id of a Qwen2.5-VL")
    add("--video", help="one video file, or folder of frames, to answer one question about")
    add("--task", choices=TASKS, help="with --video: the kind of question")
    add("--question", help="with --video: the event to find, the question, or the object to track")
    add("--options", nargs="+", help="with --video: the answers to choose from, without letters (qa, gqa, "
        "classification)")
    add("--box", nargs=4, type=float, metavar=("X0", "Y0", "X1", "Y1"),
        help="with --video: where the object is at first, as fractions of width and height (tracking)")
    add("--data", nargs="+", help="samples: FILE[@VIDEO_ROOT][:N] or FILE[@VIDEO_ROOT][:P%%]")
    add("--out", type=Path, help="folder for predictions.jsonl and metrics.json; answers that are there already, after "
        "a kill or from a complete run, are not asked for again")
    add("--overwrite", action="store_true", help="delete the answers in --out and ask again")
    add("--benchmark", choices=published.BENCHMARKS, help="print the published numbers of this benchmark beside ours")
    add("--probe", action="store_true", help="ask again with shuffled, frozen, black and exchanged videos, and print "
        "how much of the score each costs")
    add("--video_root", help="where the videos lie, unless the entry says so; else the folder of its file")
    add("--tasks", nargs="+", choices=TASKS, help="only these tasks")
    add("--prompt", choices=STYLES, help=f"with thought, without, or Temporal-R1's JSON ({as_trained('prompt')})")
    add("--reward", default="sum", choices=rewards.MIXES, help="how the parts make up a reward")
    add("--judge", default="", help="causal LM that says which events a caption tells; without it word rules do")
    add("--num_samples", type=int, default=1, help="completions of each question (K)")
    add("--temperature", type=float, help="0 is greedy; by default 0 for one completion and 1 for several")
    add("--max_new_tokens", type=int, help=f"longest completion, in tokens ({as_trained('max_new_tokens')})")
    add("--max_prompt_tokens", type=int, help=f"a longer prompt scores 0 ({as_trained('max_prompt_tokens')})")
    add("--batch", type=int, default=8, help="questions that are answered together")
    add("--seed", type=int, default=0, help="of the sampling")
    add("--fps", type=float, help=f"frames looked at, for each second of video ({as_trained('fps')})")
    add("--max_frames", type=int, help=f"most frames of one video ({as_trained('max_frames')})")
    add("--total_pixels", type=int, help=f"pixel budget of a whole video ({as_trained('total_pixels')})")
    add("--min_pixels", type=int, help=f"least pixels of a frame ({as_trained('min_pixels')})")
    add("--num_workers", type=int, default=4, help="processes that decode videos; 0 decodes in this one")
    add("--decode_seconds", type=float, default=60, help="a video that takes longer is given up")
    add("--frame_cache", default="", help="folder that keeps decoded clips for later runs; several processes may share it")
    add("--frame_cache_gb", type=float, default=50, help="its size, in 10^9 bytes; clips not used for longest leave")
    add("--device", default="auto", help="auto takes CUDA, then MPS, then the CPU")
    args = parser.parse_args(arguments)
    if problem := find_problem(args):
        parser.error(problem)
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


def find_problem(args: argparse.Namespace) -> str | None:
    """What is wrong with the flags, in words that name the flag and the remedy."""
    for name in ("num_samples", "batch", "max_new_tokens"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            return f"--{name} is {getattr(args, name)}; it must be at least 1"
    for name in ("fps", "max_frames", "total_pixels", "min_pixels", "max_prompt_tokens", "decode_seconds"):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            return f"--{name} is {getattr(args, name)}; it must be above 0"
    if args.num_workers < 0:
        return f"--num_workers is {args.num_workers}; it must be 0 or more"
    if args.temperature is not None and args.temperature < 0:
        return f"--temperature is {args.temperature}; 0 is greedy, 1 the model's own distribution"
    if args.num_samples > 1 and args.temperature == 0:
        return f"--num_samples {args.num_samples} at --temperature 0 is one answer {args.num_samples} times"
    if args.video is None:
        given = next((name for name in ("task", "question", "options", "box") if getattr(args, name) is not None), None)
        if given or args.data is None or args.out is None:
            problem = f"--{given} needs --video" if given else "something to ask is missing"
            return (f"{problem}: give --data and --out for a data set, or --video, --task and --question for one "
                    "question")
        if args.probe and (args.num_samples > 1 or args.temperature):
            return "--probe compares greedy answers: leave out --num_samples and --temperature"
        return None
    given = next((name for name in ("data", "out", "benchmark", "probe", "tasks") if getattr(args, name)), None)
    if given:
        return f"--{given} is for a data set; leave it out, or leave out --video"
    if args.task is None or args.question is None:
        return "--video needs --task and --question"
    wanted = {"qa": "options", "gqa": "options", "classification": "options", "tracking": "box"}.get(args.task)
    for name in ("options", "box"):
        if (getattr(args, name) is not None) != (name == wanted):
            return f"--task {args.task} {'needs' if name == wanted else 'has no'} --{name}"
    if args.box and not (0 <= args.box[0] < args.box[2] <= 1 and 0 <= args.box[1] < args.box[3] <= 1):
        return f"--box {args.box} is no box: X0 < X1 and Y0 < Y1 are fractions of the frame, from 0 to 1"
    for field, value in question_of(args).items():
        if not FIELDS[field][0](value):
            return f"{field!r} is {value!r}; it must be {FIELDS[field][1]}"
    return None


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    world = scale.start(args.device)
    settings = VideoSettings(args.fps, args.max_frames, args.total_pixels, args.min_pixels)
    temperature = args.temperature if args.temperature is not None else float(args.num_samples > 1)
    asking = Asking(args.prompt, args.max_new_tokens, args.max_prompt_tokens, args.num_samples, temperature,
                    args.reward, args.seed, args.batch, load_judge(args.judge if args.video is None else "", world.device))
    if args.video is None:
        evaluate(args, world, settings, asking)
    elif world.is_first:
        answer_one(args, world, settings, asking)
    scale.stop()


# ---- one question ---------------------------------------------------------------------------------------------------


def question_of(args: argparse.Namespace) -> dict:
    """The flags as a sample. It has no truth, so it can be asked and read but not scored."""
    sample = {"id": Path(args.video).name, "task": args.task, "question": args.question,
              "video": str(Path(args.video).absolute())}
    if args.options is not None:
        sample["options"] = args.options
    if args.box is not None:
        sample["boxes"] = [args.box] * 8  # the prompt shows the first
    return sample


def answer_one(args: argparse.Namespace, world: scale.World, settings: VideoSettings, asking: Asking) -> None:
    """Print the completions of one question and what the parser reads in them."""
    (sample,) = with_style([question_of(args)], args.prompt)
    with VideoLoader(settings, num_workers=min(args.num_workers, 1), deadline=args.decode_seconds) as loader:
        clip = loader.load(sample)  # first: a video that cannot be read is known before a large model is loaded
    model = VideoLM.load(args.model, world.device)
    prompt = prepare(sample, clip, model.tokenizer, args.prompt, max_prompt_tokens=args.max_prompt_tokens,
                     tokens_per_second=model.tokens_per_second, device=model.device)
    for text, ended in complete(model, prompt, asking):
        print(text)
        if not ended:
            print(f"(cut at --max_new_tokens {args.max_new_tokens})")
        print(f"\nread as: {what_is_read(sample, text, clip.seconds.tolist())}\n")


# ---- a data set -----------------------------------------------------------------------------------------------------


def evaluate(args: argparse.Namespace, world: scale.World, settings: VideoSettings, asking: Asking) -> None:
    """Answer what is not answered yet, then compute everything from the files of answers."""
    samples = with_style(load_samples(args.data, args.video_root, args.tasks, args.seed), args.prompt)
    open_folder(args, world, what_decides(args.model, args.judge, asking, settings, samples))
    answers: dict[str, list[dict]] = {}  # by probe; "" is the video as it is
    model = None
    probes = ["", *CHANGES] if args.probe else [""]
    complete_already = all(answer_paths(args.out, probe)[0].exists() for probe in probes)
    num_workers = 0 if complete_already else args.num_workers
    with VideoLoader(settings, num_workers=num_workers, deadline=args.decode_seconds, frame_cache=args.frame_cache,
                     frame_cache_gb=args.frame_cache_gb) as loader:
        for probe in probes:
            asked = probe_samples(probe, samples, answers[""]) if probe else samples
            file, partial = answer_paths(args.out, probe)
            found = read_answers(world, file, asked)
            if found is None:
                model = model or VideoLM.load(args.model, world.device)
                title, change = probe or "answering", CHANGES.get(probe)
                found = answer_all(model, loader, asked, world, asking, title, partial, change)
                if world.is_first:
                    write_lines(file, found)
            elif world.is_first:
                print(f"{file} is complete and not asked for again (--overwrite does)")
            if world.is_first:
                shutil.rmtree(partial, ignore_errors=True)
            answers[probe] = found
    if world.is_first:
        write_results(args, samples, answers, asking.judge)


def answer_paths(out: Path, probe: str) -> tuple[Path, Path]:
    """Where the answers are when they are complete, and where while they are not."""
    end = f".{probe}" if probe else ""
    return out / f"predictions{end}.jsonl", out / f"partial{end}"


def open_folder(args: argparse.Namespace, world: scale.World, settings: dict) -> None:
    """Make sure that what --out holds, if anything, are answers to these questions asked in this way."""
    if args.overwrite and world.is_first:
        for probe in ["", *CHANGES]:
            file, partial = answer_paths(args.out, probe)
            file.unlink(missing_ok=True)
            shutil.rmtree(partial, ignore_errors=True)
        for name in (SETTINGS, "metrics.json"):
            (args.out / name).unlink(missing_ok=True)
    scale.wait_for_all(world)
    if answer_paths(args.out, "")[0].exists() and not (args.out / SETTINGS).exists():
        raise ValueError(f"{args.out} holds a predictions.jsonl and no {SETTINGS} that says how it was asked for: name "
                         "another --out, or replace it with --overwrite")
    claim(world, args.out, settings)


def read_answers(world: scale.World, file: Path, samples: list[dict]) -> list[dict] | None:
    """Complete answers of an earlier run, as rank 0 sees them; None where there are none."""
    found = None
    if world.is_first and file.exists():
        found = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    (found,) = scale.gather(world, [found] if world.is_first else [])
    if found is not None and [line["id"] for line in found] != [sample["id"] for sample in samples]:
        raise ValueError(f"{file}: its {len(found)} answers are not those of the {len(samples)} samples, in their "
                         "order; it was changed, --overwrite asks again")
    return found


def write_results(args: argparse.Namespace, samples: list[dict], answers: dict[str, list[dict]],
                  judge: Judge = words_judge) -> None:
    """metrics.json, and the tables: beside what a blind answer scores, by category, without the video, as published."""
    values = values_of(samples, answers[""], judge)
    metrics, intervals, baselines = means_of(values), intervals_of(resampled_means(values)), blind_baselines(samples)
    reasons = count_reasons(answers[""])
    report = {**metrics, "intervals": intervals, "baselines": baselines, "reasons": reasons,
              "categories": by_category(samples, values)}
    if args.probe:
        probed = {probe: probe_samples(probe, samples, answers[""]) for probe in CHANGES}
        report["probes"] = {probe: compare(samples, values, probed[probe], answers[probe], judge) for probe in CHANGES}
    report["config"] = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    report |= {"versions": versions(), "data": {str(file): hash_of(file) for file, _, _ in map(parse_entry, args.data)}}
    (args.out / "metrics.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for prediction in answers[""]:
        if "problem" in prediction:
            print(f"{prediction['reasons'][0]}: {prediction['id']}: {prediction['problem']}")
    print_reasons(reasons)
    print_categories(report["categories"])
    if args.benchmark:
        print_published(args.benchmark, metrics)
    if args.probe:
        print_probes(report["probes"], metrics, baselines)
    print_table({"model": metrics, **baselines}, f"{len(samples)} samples", intervals)


def count_reasons(predictions: list[dict]) -> dict[str, int]:
    """{reason: number of completions}, the commonest first."""
    return dict(Counter(reason for prediction in predictions for reason in prediction["reasons"]).most_common())


def compare(samples: list[dict], values: list[dict[str, float]], probed: list[dict], predictions: list[dict],
            judge: Judge) -> dict:
    """A probe beside the answers to the same samples with the video intact."""
    value_of = {sample["id"]: value for sample, value in zip(samples, values)}
    intact, spoilt = [value_of[sample["id"]] for sample in probed], values_of(probed, predictions, judge)
    score, before = means_of(spoilt), means_of(intact)
    resampled, resampled_before = resampled_means(spoilt), resampled_means(intact)  # the same draws
    counts = Counter(sample["task"] for sample in probed)
    return {"n": dict(counts), "score": score, "intact": before,
            "drop": {name: before[name] - score[name] for name in resampled},
            "drop_intervals": intervals_of({name: resampled_before[name] - resampled[name] for name in resampled}),
            "reasons": count_reasons(predictions)}


def versions() -> dict[str, str]:
    """What the numbers were made with; a package that is not installed is left out."""
    found = {"python": platform.python_version()}
    for package in ("torch", "transformers", "numpy", "decord", "av"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            pass
    return found


def hash_of(file: Path) -> str:
    with open(file, "rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, VideoError) as error:  # a wrong file or value, named in the message
        sys.exit(f"error: {error}")
