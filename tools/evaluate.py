"""The command line of eval.py: a data set answered and measured, or one question.

    torchrun eval.py --model M --data x.jsonl --out DIR
    python -m tools.ask --model M --video clip.mp4 "when does a person open the door?"     (tools/ask.py)

Answers are written down as they are made and not asked for twice; everything else is computed from them, without the
model: the metrics, how sure they are, what they are for each kind of question, what blind answers score, and, with
--probe, what is left when the video or the question is taken away. Does a model that answers well look at the video at all?
Its clips are shuffled, frozen, blackened or exchanged, and asked about again; and another question is put in place of its own.

Left out on purpose: intervals that know how much a training seed moves a metric.
"""

import hashlib
import json
import platform
import random
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path

import torch

import rewards
from data import STYLES, Clip, VideoSettings, shared_times
from eval import METRICS, answer_all, answer_twice, blind_baselines, means_of, values_of
from lib import hf_folder, memory, published
from lib.answers import PUBLISHED, SETTINGS, SamplingSettings, claim, fingerprint, read_asked, write_lines
from lib.captions import Judge, words_judge
from lib.distributed import World, start, stop
from lib.files import write_whole
from lib.flags import (COUNT, FRAME_RATE, FRAMES, PIXELS, SEED, SHARE, TOKENS, WORKERS, fill, flag, given_flags, make_parser,
                       range_problem)
from lib.judge import load_judge
from lib.loader import VideoLoader
from lib.questions import with_style
from lib.readers import VideoError
from lib.samples import TASKS, load_samples, parse_entry, rule_of, shown, text_problem, unread_keys
from lib.tables import print_categories, print_probes, print_published, print_reasons, print_table
from lib.terminal import errors_in_one_sentence, printable
from model import VideoLM
from tools.ask import answer_one, question_of, usual_task
from tools.intervals import intervals_of, resampled_means

# ---- the command line -----------------------------------------------------------------------------------------------


def as_trained(name: str) -> str:
    return f"default: as in the training of --model, else {PUBLISHED[name]}"


one_video, data_set, asking, machine = (partial(flag, group=title) for title in (
    "one question about one video", "a data set", "how the model is asked", "your machine"))


@dataclass
class Flags:
    model: str = flag("", "Hugging Face folder or hub id of a Qwen2.5-VL or Qwen3-VL", required=True)
    # one question
    video: str | None = one_video(None, "one video file, or folder of frames, to answer one question about", kind=str)
    question: str | None = one_video(None, "with --video: the event to find, the question, or the object to track; the same as "
                                           "QUESTION", kind=str)
    task: str | None = one_video(None, "with --video: the kind of question; by default tracking with --box, qa with --options, "
                                       "else grounding: when does it happen", kind=str, choices=tuple(TASKS))
    options: list[str] | None = one_video(None, "with --video: the answers to choose from, without letters (qa, gqa, "
                                                "classification)", kind=tuple)
    box: list[float] | None = one_video(None, "with --video: where the object is at first, as fractions of width and height "
                                              "(tracking)", kind=float, nargs=4, metavar=("X0", "Y0", "X1", "Y1"),
                                        within=SHARE)
    html: Path | None = one_video(None, "with --video: a page to write, with the frames that the model saw and what it said of "
                                        "them", kind=Path)
    # a data set
    data: list[str] | None = data_set(None, "samples: FILE[@VIDEO_ROOT][:N] or FILE[@VIDEO_ROOT][:P%]", kind=tuple)
    out: Path | None = data_set(None, "folder for predictions.jsonl and metrics.json; answers that are there already, after "
                                      "a kill or from a complete run, are not asked for again", kind=Path)
    overwrite: bool = data_set(False, "delete the answers in --out and ask again")
    benchmark: str | None = data_set(None, "print the published numbers of this benchmark beside ours", kind=str,
                                     choices=tuple(published.BENCHMARKS))
    probe: bool = data_set(False, "ask again with shuffled, frozen, black and exchanged videos, and with another question, "
                                  "and print how much of the score each costs")
    video_root: str | None = data_set(None, "where the videos lie, unless the entry says so; else the folder of its file",
                                      kind=str)
    looks: int = data_set(1, "2 looks once more, with the same number of frames, and denser where the first answer points to "
                             "(grounding, qa and gqa)", within=(1, 2))
    density: float = data_set(1.5, "with --looks 2: how much denser", within=(1, 1000))
    tasks: list[str] | None = data_set(None, "only these tasks", kind=tuple, choices=tuple(TASKS))
    reward: str = data_set("sum", "how the parts make up a reward", choices=rewards.MIXES)
    judge: str = data_set("", "causal LM that says which events a caption tells; without it word rules do")
    # how the model is asked
    prompt: str | None = asking(None, f"with thought, without, or Temporal-R1's JSON ({as_trained('prompt')})", kind=str,
                                choices=STYLES)
    timestamps: bool | None = asking(None, f"the time as text before each pair of frames ({as_trained('timestamps')}); Qwen3-VL "
                                           "always has it", kind=bool)
    num_samples: int = asking(1, "completions of each question (K)", within=(1, 10_000))
    temperature: float | None = asking(None, "0 is greedy; by default 0 for one completion and 1 for several", kind=float,
                                       within=(0, 100))
    max_new_tokens: int | None = asking(None, f"longest completion, in tokens ({as_trained('max_new_tokens')})", kind=int,
                                        within=TOKENS)
    max_prompt_tokens: int | None = asking(None, f"a longer prompt scores 0 ({as_trained('max_prompt_tokens')})", kind=int,
                                           within=TOKENS)
    seed: int = asking(0, "of the sampling", within=SEED)
    fps: float | None = asking(None, f"frames looked at, for each second of video ({as_trained('fps')})", kind=float,
                               within=FRAME_RATE)
    max_frames: int | None = asking(None, f"most frames of one video ({as_trained('max_frames')})", kind=int, within=FRAMES)
    total_pixels: int | None = asking(None, f"pixel budget of a whole video ({as_trained('total_pixels')})", kind=int,
                                      within=PIXELS)
    min_pixels: int | None = asking(None, f"least pixels of a frame ({as_trained('min_pixels')})", kind=int, within=PIXELS)
    image_pixels: int | None = asking(None, f"most pixels of a picture ({as_trained('image_pixels')}); 0: as many as the model's "
                                            "own files say", kind=int, within=(0, 10**9))
    # your machine
    batch: int = machine(8, "questions that are answered together", within=COUNT)
    compile: bool = machine(False, "sample with one decoder layer compiled by torch.compile: faster, after half a minute of "
                                   "compiling (a GPU and its compiler)")
    num_workers: int = machine(4, "processes that decode videos; 0 decodes in this one", within=WORKERS)
    frame_cache: str = machine("", "folder that keeps decoded clips for later runs; several processes may share it")
    frame_cache_gb: float = machine(50.0, "its size, in 10^9 bytes; clips not used for longest leave", within=(0.01, 10**6))
    device: str = machine("auto", "auto takes CUDA, then MPS, then the CPU")


def parse_arguments(arguments: list[str] | None = None) -> Flags:
    parser = make_parser(Flags, "Answer one question about one video (--video), or the questions of a data set (--data) and "
                                "score the answers.")
    parser.add_argument("words", nargs="?", metavar="QUESTION", help="one question about one video (--video)")
    given = given_flags(parser, arguments)
    if words := given.pop("words", None):
        if "question" in given:
            parser.error(f"two questions, {shown(words)} and --question {shown(given['question'])}: leave one of them out")
        given["question"] = words
    args = fill(Flags, given)
    if args.video is not None and args.task is None:
        args.task = usual_task(args)
    if problem := find_problem(args):
        parser.error(problem)
    for name, value in read_asked(args.model).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if problem := range_problem(args):  # asked.json is a file, and may hold anything
        parser.error(problem)
    return args


def find_problem(args: Flags) -> str | None:
    """What is wrong with the flags, in words that name the flag and the remedy."""
    if args.num_samples > 1 and args.temperature == 0:
        return f"--num_samples {args.num_samples} at --temperature 0 is one answer {args.num_samples} times"
    if args.looks > 1 and (args.video or args.num_samples > 1):
        return f"--looks {args.looks} is for a data set and one answer a question: leave out --video and --num_samples"
    if args.video is None:
        given = next((name for name in ("task", "question", "options", "box", "html") if getattr(args, name) is not None), None)
        if given or args.data is None or args.out is None:
            problem = f"--{given} needs --video" if given else "something to ask is missing"
            return (f"{problem}: give --data and --out for a data set, or --video and a question about it")
        if args.probe and (args.num_samples > 1 or args.temperature):
            return "--probe compares greedy answers: leave out --num_samples and --temperature"
        return None
    given = next((name for name in ("data", "out", "benchmark", "probe", "tasks") if getattr(args, name)), None)
    if given:
        return f"--{given} is for a data set; leave it out, or leave out --video"
    if args.question is None:
        return "--video needs a question: its words in quotation marks, in front of --options"
    if args.html and (args.html.suffix.lower() not in (".html", ".htm") or args.html.is_dir()):
        return f"--html {args.html} is no name of a page: it must end in .html"
    for name, field in (("options", "options"), ("box", "boxes")):
        is_needed = field in TASKS[args.task]
        if (getattr(args, name) is not None) != is_needed:
            return f"--task {args.task} {'needs' if is_needed else 'has no'} --{name}"
    if args.box and not (0 <= args.box[0] < args.box[2] <= 1 and 0 <= args.box[1] < args.box[3] <= 1):
        return f"--box {args.box} is no box: X0 < X1 and Y0 < Y1 are fractions of the frame, from 0 to 1"
    sample = question_of(args)
    for field, value in sample.items():
        if problem := text_problem(sample, field):  # a byte that is no UTF-8 on the command line
            return problem
        if not (rule := rule_of(sample, field)).is_right(value):
            return f"{field!r} is {shown(value)}; it must be {rule.wanted}"
    return None


def run(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    world = start(args.device)
    hf_folder.check_folder(Path(args.model))
    geometry = hf_folder.geometry_in(args.model).with_times(args.timestamps)
    settings = VideoSettings(args.fps, args.max_frames, args.total_pixels, args.min_pixels, geometry.factor,
                             geometry.picture_limits(args.image_pixels))
    if world.is_first and (note := shared_times(settings, geometry)):
        print(note)
    temperature = args.temperature if args.temperature is not None else float(args.num_samples > 1)
    sampling = SamplingSettings(args.prompt, args.max_new_tokens, args.max_prompt_tokens, args.num_samples, temperature,
                                args.reward, args.seed, args.batch, args.timestamps)
    try:
        if args.video is None:
            answer_data(args, world, settings, sampling, load_judge(args.judge, world.device), geometry.box_units)
        elif world.is_first:
            answer_one(args, world, settings, sampling, geometry.box_units)
    except torch.OutOfMemoryError as error:
        kept = "" if args.video else "\nWhat was answered is kept: the same command, with another --batch too, goes on"
        raise SystemExit(memory.message(error, world.device) + kept) from None
    stop(world)


def main() -> None:
    with errors_in_one_sentence(VideoError):
        run()


# ---- a data set -----------------------------------------------------------------------------------------------------

LOOKED_AT_TWICE = {"grounding", "gqa", "qa"}  # tasks whose first answer can name windows


def answer_data(args: Flags, world: World, settings: VideoSettings, sampling: SamplingSettings, judge: Judge,
                box_units: int = 1) -> None:
    """Answer what is not answered yet, then compute everything from the files of answers."""
    samples = with_style(load_samples(args.data, args.video_root, args.tasks, args.seed), args.prompt, box_units)
    if world.is_first:
        print("".join(f"{line}\n" for line in unread_keys(samples)), end="")
    looks = {"looks": args.looks, "density": args.density} if args.looks > 1 else {}
    if looks and (others := sorted({sample["task"] for sample in samples} - LOOKED_AT_TWICE)):
        raise ValueError(f"--looks {args.looks}: answers to {', '.join(others)} name no part of the video to look at again; "
                         f"choose others with --tasks {' '.join(sorted(LOOKED_AT_TWICE))}")
    open_folder(args, world, fingerprint(args.model, args.judge, sampling, settings, samples) | looks)
    answers: dict[str, list[dict]] = {}  # by probe; "" is the video as it is
    model = None
    probes = ["", *CHANGES] if args.probe else [""]
    complete_already = all(answer_paths(args.out, probe)[0].exists() for probe in probes)
    num_workers = 0 if complete_already else args.num_workers
    score = partial(rewards.score, mix=args.reward, judge=judge)
    answer = partial(answer_twice, density=args.density) if looks else answer_all
    with VideoLoader(settings, num_workers=num_workers, frame_cache=args.frame_cache,
                     frame_cache_gb=args.frame_cache_gb) as loader:
        for probe in probes:
            asked = probe_samples(probe, samples, answers[""]) if probe else samples
            file, unfinished = answer_paths(args.out, probe)
            found = read_answers(world, file, asked)
            if found is None:
                model = model or load_model(args, world)
                title, change = probe or "answering", CHANGES.get(probe)
                found = answer(model, loader, asked, world, sampling, score, title, unfinished, change)
                if world.is_first:
                    write_lines(file, found)
            elif world.is_first:
                print(f"{file} is complete and not asked for again (--overwrite does)")
            if world.is_first:
                shutil.rmtree(unfinished, ignore_errors=True)
            answers[probe] = found
    if world.is_first:
        write_results(args, samples, answers, judge)


def load_model(args: Flags, world: World) -> VideoLM:
    model = VideoLM.load(args.model, world.device)
    model.compile_decoding = args.compile
    model.geometry = model.geometry.with_times(args.timestamps)
    return model


def answer_paths(out: Path, probe: str) -> tuple[Path, Path]:
    """Where the answers are when they are complete, and where while they are not."""
    end = f".{probe}" if probe else ""
    return out / f"predictions{end}.jsonl", out / f"partial{end}"


def open_folder(args: Flags, world: World, settings: dict) -> None:
    """Make sure that what --out holds, if anything, are answers to these questions asked in this way."""
    if args.overwrite and world.is_first:
        for probe in ["", *CHANGES]:
            file, unfinished = answer_paths(args.out, probe)
            file.unlink(missing_ok=True)
            shutil.rmtree(unfinished, ignore_errors=True)
        for name in (SETTINGS, "metrics.json"):
            (args.out / name).unlink(missing_ok=True)
    world.sync()
    if answer_paths(args.out, "")[0].exists() and not (args.out / SETTINGS).exists():
        raise ValueError(f"{args.out} holds a predictions.jsonl and no {SETTINGS} that says how it was asked for: name "
                         "another --out, or replace it with --overwrite")
    claim(world, args.out, settings)


def read_answers(world: World, file: Path, samples: list[dict]) -> list[dict] | None:
    """Complete answers of an earlier run, as rank 0 sees them; None where there are none."""
    found = None
    if world.is_first and file.exists():
        found = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    (found,) = world.all_gather([found] if world.is_first else [])
    if found is not None and [line["id"] for line in found] != [sample["id"] for sample in samples]:
        raise ValueError(f"{file}: its {len(found)} answers are not those of the {len(samples)} samples, in their "
                         "order; it was changed, --overwrite asks again")
    return found


def write_results(args: Flags, samples: list[dict], answers: dict[str, list[dict]],
                  judge: Judge = words_judge) -> None:
    """metrics.json, and the tables: beside what a blind answer scores, by category, without the video, as published."""
    values = values_of(samples, answers[""], judge)
    metrics, intervals, baselines = means_of(values), intervals_of(resampled_means(values, samples)), blind_baselines(samples, judge)
    reasons = count_reasons(answers[""])
    looks = first_look(samples, answers[""], judge) if args.looks > 1 else {}
    report = {**metrics, **looks, "intervals": intervals, "baselines": baselines, "reasons": reasons,
              "categories": by_category(samples, values)}
    if args.probe:
        probed = {probe: probe_samples(probe, samples, answers[""]) for probe in CHANGES}
        report["probes"] = {probe: compare(samples, values, probed[probe], answers[probe], judge) for probe in CHANGES}
    report["config"] = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    report |= {"versions": versions(), "data": {str(file): hash_of(file) for file, _, _ in map(parse_entry, args.data)}}
    with write_whole(args.out / "metrics.json") as file:
        file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for prediction in answers[""]:
        if "problem" in prediction:
            print(printable(f"{prediction['reasons'][0]}: {prediction['id']}: {prediction['problem']}"))
    print_reasons(reasons)
    print_categories(METRICS, report["categories"])
    if args.benchmark:
        print_published(METRICS, args.benchmark, metrics)
    if args.probe:
        print_probes(METRICS, report["probes"], metrics, baselines)
    columns = {"model": metrics, "first look": looks.get("first_look", {}), **baselines}
    print_table(METRICS, columns, f"{len(samples)} samples", intervals)


def first_look(samples: list[dict], predictions: list[dict], judge: Judge) -> dict:
    """What the first look's own answers score, and how many of them pointed to no part of the video."""
    firsts = [prediction["first"] for prediction in predictions]
    fell_back = sum(first["windows"] is None for first in firsts)
    print(f"{fell_back} of {len(firsts)} first answers named no window in the video: these saw the same frames again")
    return {"looks/fell_back": fell_back, "first_look": means_of(values_of(samples, firsts, judge))}


def with_another_question(sample: dict, samples: list[dict]) -> dict | None:
    """The sample with the question of another one of its task, about the same video where there is one; options and truth
    stay. A model that reads its question now answers another; one that does not scores as before. None: all ask the same."""
    others = [other for other in samples if other["task"] == sample["task"] and other["question"] != sample["question"]]
    others = [other for other in others if other["video"] == sample["video"]] or others
    chosen = random.Random(f"another question {sample['id']}").choice(others) if others else None
    return sample | {"question": chosen["question"]} if chosen else None


def count_reasons(predictions: list[dict]) -> dict[str, int]:
    """{reason: number of completions}, the commonest first."""
    return dict(Counter(reason for prediction in predictions for reason in prediction["reasons"]).most_common())


def compare(samples: list[dict], values: list[dict[str, float]], probed: list[dict], predictions: list[dict],
            judge: Judge) -> dict:
    """A probe beside the answers to the same samples with the video intact."""
    known = {sample["id"]: (sample, value) for sample, value in zip(samples, values)}
    asked, intact = [known[sample["id"]][0] for sample in probed], [known[sample["id"]][1] for sample in probed]
    spoilt = values_of(probed, predictions, judge)
    score, before = means_of(spoilt), means_of(intact)
    # The same draws: by the clip that was asked about, also where another one was shown.
    resampled, resampled_before = resampled_means(spoilt, asked), resampled_means(intact, asked)
    counts = Counter(sample["task"] for sample in probed)
    unreadable = Counter(sample["task"] for sample, value in zip(probed, spoilt) if value["parse_failure"] == 1)
    return {"n": dict(counts), "score": score, "intact": before,
            "unreadable": {task: unreadable[task] / n for task, n in counts.items()},
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


# ---- for which kind of question --------------------------------------------------------------------------------------

NEXT_QA = {"CW", "CH", "TN", "TC", "TP", "DC", "DL", "DO"}  # causal, temporal, descriptive: why, how, next, ...


def by_category(samples: list[dict], values: list[dict[str, float]],
                judge: Judge = words_judge) -> dict[str, dict[str, dict[str, float]]]:
    """{task: {category: metrics}} for the tasks whose samples have a `category`, in the order of the file.

    `macro mean` is over the categories, each with the same weight; of a metric that not all have, over those that
    do. Where they are NExT-QA's types, TP counts as TN, as in the official script, and `Acc@C`, `Acc@T` and `Acc@D` sum
    up by the first letter. `blind` is the best blind answer, chosen on the category itself, by the first metric of the row.
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
        rows = {category: category_row(group, judge) for category, group in groups.items()}
        macro = macro_mean([*rows.values()]) | {"n": len(pairs)}
        if is_next_qa:
            for letter in "CTD":
                if group := [pair for pair in pairs if str(pair[0]["category"])[0] == letter]:
                    rows[f"Acc@{letter}"] = category_row(group, judge)
        tables[task] = rows | {"macro mean": macro}
    return tables


def macro_mean(rows: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each name over the rows that have it: `Acc@absent` of moments is measured only where an event is absent."""
    columns = {name: [row[name] for row in rows if name in row] for name in (*METRICS, "n", "blind")}
    return {name: sum(column) / len(column) for name, column in columns.items() if column}


def category_row(pairs: list[tuple[dict, dict]], judge: Judge) -> dict[str, float]:
    """The metrics of some samples of one task, and `blind` where there is a blind answer to them."""
    row = means_of([value for _, value in pairs])
    guesses = blind_baselines([sample for sample, _ in pairs], judge).values()
    name = next(name for name in METRICS if name in row)
    known = [guess[name] for guess in guesses if name in guess]
    return row | ({"blind": max(known)} if known else {})


# ---- probes: the same questions, and no longer the same video; or the other way round --------------------------------
#
# Of a spoilt clip only what is seen changes. The number of frames and their positions in time stay, so that the prompt is as
# long as before and nothing but the pixels can tell that something is wrong.


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
    "shuffled": shuffled, "one_frame": one_frame, "black": black, "another_video": None,
    "another_question": None}  # None: the clip as it is
SHOWN = ("video", "start", "end", "fps", "frames")  # the fields of a sample that say what is shown


def probe_samples(probe: str, samples: list[dict], predictions: list[dict]) -> list[dict]:
    """The samples that a probe is about: those whose video the model has seen in the run that is compared with.

    "another_video" shows them that of the next sample, cyclically, whose video is another; if there is none, there is
    no such sample. The length of the clip and its positions are then the other video's.
    """
    seen = [s for s, prediction in zip(samples, predictions) if "video" in s and "problem" not in prediction]
    if probe == "another_question":
        return [changed for sample in seen if (changed := with_another_question(sample, seen))]
    if probe != "another_video":
        return seen
    exchanged = []
    for place, sample in enumerate(seen):
        others = (other for other in seen[place + 1:] + seen[:place] if other["video"] != sample["video"])
        if other := next(others, None):
            kept = {name: value for name, value in sample.items() if name not in SHOWN}
            exchanged.append(kept | {name: other[name] for name in SHOWN if name in other})
    return exchanged
