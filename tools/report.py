"""One page about a run, for the eyes: what came of it, its curves, what was said about which frames, and what to worry about.

    python -m tools.report runs/x                             runs/x/report.html
    python -m tools.report runs/a runs/b --out compare.html   several runs, one over the other

The page is one file that needs nothing else: frames are JPEGs inside it, uPlot draws the curves, and whatever comes from
outside (questions, completions) travels as JSON and is shown as text. What a run has written is all that is read, and the
videos: a run that goes on has a report too. docs/report.md says how to read it.

Left out on purpose: a server, a database of runs, and anything that would have to be logged for the report alone.
"""

import argparse
import base64
import io
import itertools
import json
import math
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch

import rewards
from data import Clip, VideoSettings, picture_arguments, read_picture, read_video, target_text, video_arguments
from eval import blind_baselines, clip_length, first_metrics, score_of, values_of
from lib import hf_folder
from lib.files import write_whole
from lib.questions import with_style
from lib.readers import VideoError
from lib.run import PARTS
from lib.samples import files_of, load_samples
from tools.intervals import intervals_of, resampled_means

PAGE = Path(__file__).parent / "page"
LIMIT = 10_000_000  # bytes of a page: more is slow on a phone, and too much for many a mail
FRAMES_LIMIT = 6_000_000  # of these, for frames
STAGES = {"before": "before", "after_sft": "warm start", "after": "after GRPO"}  # as state.json and the page name them


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tools.report", description="One page about one run, or several in comparison.")
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs (--out of train.py)")
    parser.add_argument("--out", type=Path, help="the page; by default report.html in the folder of the run, of several "
                                                 "compare.html here")
    parser.add_argument("--groups", type=int, default=200, help="most groups of completions to show, over all runs")
    return parser.parse_args(arguments)


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(1)  # frames are small: threads would wait for one another
    try:
        usual = args.runs[0] / "report.html" if len(args.runs) == 1 else Path("compare.html")
        file = write_report(args.runs, args.out or usual, args.groups)
    except (ValueError, OSError) as error:  # a wrong folder, named in the message
        sys.exit(f"error: {error}")
    print(f"{file}: {file.stat().st_size / 1e6:.1f} MB; a browser opens it")


def write_report(folders: list[Path], out: Path, groups: int = 200, seconds: float = math.inf) -> Path:
    """The page about these runs. Frames are decoded for at most so many `seconds`; what comes later is shown without."""
    runs = [run_data(folder) for folder in folders]
    page = ""
    while True:
        clips = Clips(groups // len(runs), time.monotonic() + seconds)
        for folder, run in zip(folders, runs):
            run |= shown_groups(folder, run["files"], groups // len(runs), clips)
        public = [{name: value for name, value in run.items() if name != "files"} for run in runs]
        page = page_of({"runs": public, "clips": clips.kept, "curves": CURVES, "parts": PARTS})
        if len(page) < LIMIT or not groups:
            break
        groups //= 2
    with write_whole(out) as file:
        file.write_text(page, encoding="utf-8")
    return out


def page_of(data: dict) -> str:
    """Template, style, scripts and data as one text. `<` is escaped in the data: no text in it can end the script tag."""
    text = json.dumps(finite(data)).replace("<", "\\u003c")
    page = (PAGE / "report.html").read_text(encoding="utf-8")
    for name in ("uPlot.min.css", "report.css", "uPlot.iife.min.js", "report.js"):
        page = page.replace(f"/*{name}*/", (PAGE / name).read_text(encoding="utf-8"))
    return page.replace("/*data*/", text)  # last: nothing in the data is taken for a place to fill


def finite(value):
    """The same for JSON: numbers short, and null for what is no number there (nan, inf)."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(part) for part in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value


# --- what a run has written --------------------------------------------------------------------------------------------


def run_data(folder: Path) -> dict:
    """All of the page about one run but its groups. `files` is what those are made from."""
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder} holds no config.json: it is not the folder of a run (--out of train.py)")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    metrics = list(read_lines(folder / "metrics.jsonl"))
    grpo = [line for line in metrics if line["phase"] == "grpo"]
    train, held_out, missing = samples_of(folder, config)
    state = read_json(folder / "state.json")
    results = results_of(folder, config, state, held_out)
    reasons = reasons_of(folder)
    evaluations = [(line["step"], line["evaluation"]) for line in grpo if line.get("evaluation")]
    if state.get("after") and grpo:
        evaluations.append((grpo[-1]["step"], state["after"]))
    sft = [line for line in metrics if line["phase"] == "sft"]
    late = late_records(folder, grpo[-1]["step"] if grpo else 0)
    said = late_answers(late, {sample["id"]: sample for sample in train})
    selected = (state.get("selected") or {}).get("report") or read_json(folder / "selected.report.json")
    return {"name": folder.resolve().name, "config": config, "missing": missing, "results": results,
            "seconds": state.get("seconds", {}), "steps": len(grpo), "reasons": reasons, "selected": selected,
            "worries": worries(config, grpo, evaluations, said, results, sft=sft, late=late,
                               held_out=held_out_answers(folder, held_out)),
            "sft": columns_of(sft),
            "grpo": columns_of(with_shares(grpo)), "evaluations": evaluation_columns(evaluations),
            "files": (config, train, held_out)}


def read_lines(file: Path) -> Iterator[dict]:
    """The lines of a log that may just be written: the last one counts when it is whole."""
    if file.exists():
        with open(file, encoding="utf-8") as lines:
            yield from (json.loads(line) for line in lines if line.endswith("\n"))


def read_json(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def samples_of(folder: Path, config: dict) -> tuple[list[dict], list[dict], str]:
    """(training samples, held-out samples, what is missing, in words). Paths are seen from where the run was started;
    the synthetic clips lie there in toy/, which is looked for beside the run too."""
    train, held_out = config["train_data"], config["eval_data"]
    if not train:
        name = f"seed{config['seed']}-{config['toy_train']}-{config['toy_eval']}"
        places = [base / "toy" / name for base in (Path(), folder.parent, folder.resolve().parent.parent)]
        toy = next((place for place in places if place.exists()), places[0])
        train, held_out = [str(toy / "train.jsonl")], [str(toy / "eval.jsonl")]
    try:
        root = config["video_root"] or None
        loaded = [load_samples(entries, root, config["tasks"], config["seed"]) if entries else []
                  for entries in (train, held_out)]
    except (ValueError, OSError) as error:
        return [], [], f"The samples are not where they were, so questions, frames and intervals are missing: {error}"
    return *(with_style(samples, config["prompt"], box_units_of(folder, config)) for samples in loaded), ""


def box_units_of(folder: Path, config: dict) -> int:
    """Of the model that was trained, as one of its folders says; the run may be older than the first of them."""
    places = [*(folder / name for name in ("final", "best", "warm_start", "initial")), Path(config["model"])]
    known = next((place for place in places if (place / "config.json").exists()), None)
    return hf_folder.geometry_in(str(known)).box_units if known else 1


# --- results -----------------------------------------------------------------------------------------------------------


def results_of(folder: Path, config: dict, state: dict, held_out: list[dict]) -> list[dict]:
    """Rows {title, kind, metrics, intervals}: each stage that is done, then the blind answers."""
    rows = []
    for name, title in STAGES.items():
        if state.get(name):
            answers = list(read_lines(folder / f"predictions.{name}.jsonl"))
            rows.append({"title": title, "kind": name, "metrics": state[name],
                         "intervals": stage_intervals(config, held_out, answers)})
    guesses = blind_baselines(held_out) if held_out else read_json(folder / "summary.json").get("baselines", {})
    for name, metrics in guesses.items():
        if metrics["n"]:
            rows.append({"title": f"blind: {name.replace('_', ' ')}", "kind": "blind", "metrics": metrics, "intervals": {}})
    return rows


def stage_intervals(config: dict, held_out: list[dict], answers: list[dict]) -> dict[str, list[float]]:
    """95 % bootstrap over videos, where the answers are those to these samples."""
    if not held_out or [line["id"] for line in answers] != [sample["id"] for sample in held_out]:
        return {}
    found = intervals_of(resampled_means(values_of(held_out, answers), held_out))
    # Captions were measured by the run's judge, which is not loaded for a report.
    return {name: pair for name, pair in found.items() if not (config["judge"] and name.startswith("captioning"))}


# --- what to worry about -----------------------------------------------------------------------------------------------

RECENT = 20  # steps that count as now
COLLAPSED = 0.9  # share of equal answers to different questions


def worries(config: dict, grpo: list[dict], evaluations: list[tuple[int, dict]], said: dict[str, list[tuple[str, str]]],
            results: list[dict], *, sft: list[dict] = (), late: list[dict] = (),
            held_out: dict[str, list[tuple[dict, dict]]] | None = None) -> list[str]:
    """What is wrong with a run, in sentences; none where nothing is. `python -m tools.drills` makes runs for some of them.

    grpo, sft: lines of metrics.jsonl. evaluations: (step, metrics) on the way and at the end. said: late completions by task,
    as (id of the question, answer). results: rows of `results_of`. late: lines of completions.jsonl, of the last steps.
    held_out: of each stage that is done, the samples with their lines of predictions.
    """
    found = collapse_worries(said) + result_worries(results)
    if grpo:
        recent = grpo[-RECENT:]
        found = (group_worries(recent, late) + cut_worries(config, recent, late) + format_worries(grpo[:RECENT], recent)
                 + number_worries(config, grpo, recent) + found + held_out_worries(grpo, evaluations))
    return (nan_worries("of the warm start ", sft) + nan_worries("", grpo) + video_worries(config, (grpo or sft)[-RECENT:], held_out or {})
            + time_worries(held_out or {}) + found)


def mean_of(lines: list[dict], name: str) -> float:
    values = [line[name] for line in lines if line.get(name) is not None]
    return sum(values) / len(values) if values else 0.0


def nan_worries(of_what: str, lines: list[dict]) -> list[str]:
    """Steps without a finite loss or gradient, and whether the gradient had grown before."""
    lost = [line["step"] for line in lines if any(name in line and line[name] is None for name in ("loss", "grad_norm"))]
    if not lost:
        return []
    before = [line["grad_norm"] for line in lines if line["step"] < lost[0] and line.get("grad_norm") is not None]
    if not before:
        why = ("It is so from the first step on: the weights that the run starts from hold nan, or the loss gives it for any "
               "completion")
    elif before[-1] > 10 * statistics.median(before):
        why = f"The gradient had grown to {before[-1]:.3g}, from {statistics.median(before):.3g}: lower --lr"
    else:
        why = (f"The gradient had not grown before ({before[-1]:.3g}), so it is hardly --lr: look for a logarithm of 0, a division "
               "by 0 or an overflow in what was changed last, and at the questions that the screen names")
    return [f"Not a number: {len(lost)} of {len(lines)} steps {of_what}had no finite loss or gradient, the first of them step "
            f"{lost[0]}, and taught nothing. {why}."]


def video_worries(config: dict, recent: list[dict], held_out: dict[str, list[tuple[dict, dict]]]) -> list[str]:
    """Videos that cannot be read, in training and in the newest evaluation."""
    found = []
    if lost := sum(line.get("unreadable", 0) for line in recent):
        asked = sum(line["groups"] + line.get("unreadable", 0) if "groups" in line else config["sft_questions"] for line in recent)
        found.append(f"Unreadable videos: {lost:.0f} questions of the last {len(recent)} steps were left out because their videos could "
                     f"not be read, {lost / max(asked, 1):.0%} of all. The screen names each; python data.py check finds the others, with "
                     "the reason, and writes what is left to good.jsonl.")
    answers = list(held_out.values())[-1] if held_out else []
    if lost := sum("unreadable_video" in line["reasons"] for _, line in answers):
        found.append(f"Unreadable videos: {lost} of {len(answers)} held-out questions count as 0 because their videos could not be "
                     f"read, so no model reaches more than {1 - lost / len(answers):.2f} there.")
    return found


def group_worries(recent: list[dict], late: list[dict]) -> list[str]:
    """Nothing to compare, and why."""
    dead, groups = (sum(line[name] for line in recent) for name in ("dead_groups", "groups"))
    if not groups or dead < 0.9 * groups:
        return []
    return [f"All groups are dead, or nearly: {dead:.0f} of the last {groups:.0f} had completions of equal reward, and teach "
            f"nothing; {why_dead(recent, late)}."]


def why_dead(recent: list[dict], late: list[dict]) -> str:
    answers: dict[tuple, set] = {}
    for record in late:
        answer = rewards.last_block(record["completion"], "answer")[0]
        answers.setdefault((record["step"], record["id"]), set()).add(answer)
    differ = sum(len(group - {None}) > 1 for group in answers.values())
    can_be_read = any(record["reason"] == "ok" for record in late)  # else a reward of 0 is right
    if len({record["reward"] for record in late}) == 1 and differ >= 0.5 * len(answers) and can_be_read:
        return (f"all {len(late)} completions got the same {late[0]['reward']:.2f}, although in {differ} of {len(answers)} groups the "
                "answers differ: the reward does not tell them apart. Score two of them by hand, with the function that "
                "train.py calls, and look at what was changed in it")
    parts = [name for name in PARTS if any(name in line for line in recent)]
    if parts and min(mean_of(recent, name) for name in parts) > 0.9:
        return "the training questions are solved: take harder ones, or stop"
    if cut_share(recent) > 0.5:
        return "most completions were cut before their answer"
    return ("the questions are too hard, or the answers cannot be read: look at the reasons below; a warm start (--sft_steps), "
            "--select_k or --resample helps")


def cut_share(recent: list[dict]) -> float:
    return sum(line["truncated"] for line in recent) / max(sum(map(completions_of, recent)), 1)


def cut_worries(config: dict, recent: list[dict], late: list[dict]) -> list[str]:
    """Answers that were cut before they were given, or because they do not end."""
    if (share := cut_share(recent)) <= 0.05:
        return []
    limit = f"truncated at --max_new_tokens {config['max_new_tokens']}"
    cut = [record["completion"] for record in late if record["reason"] == "truncated"]
    talking = sum("</glue>" in text or ("</answer>" in text and "<glue>" not in text) for text in cut)
    if talking and talking >= 0.5 * len(cut):
        if share <= 0.5:  # most know how to end
            return [f"{share:.0%} of the latest completions were {limit}, and {talking} of {len(cut)} of these had given their answer and "
                    "went on: raising the limit does not help; look at what stands behind the answer."]
        return [f"The end token is not said: {share:.0%} of the latest completions were {limit}, and {talking} of {len(cut)} of these had "
                "given their answer and went on, so raising the limit does not help. Either the warm start was too "
                "short (a model from random weights needs some hundred steps), or the end token has been left out of what is learned, as "
                "by a mask of `tokens != pad` where pad and end are one token; the mask has to go by position, up to and including the "
                "first end token, and a target has to end with one."]
    return [f"{share:.0%} of the latest completions were {limit}: what is cut has no answer and scores 0; raise it, or find out what "
            "makes the model talk."]


def completions_of(line: dict) -> float:
    """How many completions a step had."""
    return line["sampled"] / line["length"] if line["length"] else 0.0


def collapse_worries(said: dict[str, list[tuple[str, str]]]) -> list[str]:
    """One answer for all questions of a task: it no longer depends on the video."""
    found = []
    for task, answers in said.items():
        (answer, count), = Counter(answer for _, answer in answers).most_common(1)
        questions = len({question for question, _ in answers})
        if questions >= 8 and count >= COLLAPSED * len(answers):
            found.append(f"One constant answer: {count / len(answers):.0%} of the latest {task} completions, to {questions} questions, "
                         f"say {shorten(answer, 60)!r}. Such an answer has not looked at the video; compare with the blind ones.")
    return found


def format_worries(first: list[dict], recent: list[dict]) -> list[str]:
    """The tags are learned and what stands in them is not."""
    parts = [name for name in PARTS if name != "format" and any(name in line for line in recent)]
    if not parts or mean_of(recent, "format") < 0.9 or len(recent) < 5:
        return []
    if max(mean_of(recent, name) for name in parts) > 0.1:
        return []
    said = ", ".join(f"{name} {mean_of(recent, name):.2f}, at first {mean_of(first, name):.2f}" for name in parts)
    text = (f"Format without accuracy: `format` is {mean_of(recent, 'format'):.2f}, and no part of the task is above 0.1 ({said}). The "
            "answers can be read and are wrong: the questions may be too hard, or the videos not what they should be.")
    return [text]


def number_worries(config: dict, grpo: list[dict], recent: list[dict]) -> list[str]:
    """KL and gap."""
    found = []
    kl, before = mean_of(grpo[-10:], "kl"), mean_of(grpo[len(grpo) // 3:2 * len(grpo) // 3], "kl")
    if kl > 1 or (len(grpo) >= 30 and kl > 0.1 and kl > 4 * before):
        found.append(f"The KL runs away: {kl:.2f} nats a token in the last steps, {before:.2f} in the middle of the run. The policy "
                     "leaves its reference, and its language with it; lower --lr or raise --beta.")
    gap = mean_of(recent, "logp_gap_mean")
    # The log does not say on what the run was; bfloat16, on a GPU, rounds to about 1e-2.
    in_float32 = config["device"] == "cpu" or not (config["model"] or torch.cuda.is_available())
    if gap > (1e-4 if in_float32 else 0.05):
        found.append(f"The gap of log-probabilities is no rounding: {gap:.1e} on average between sampled and scored. A position, mask "
                     "or temperature is not the same in both, and the gradient is that of another policy.")
    return found


def held_out_worries(grpo: list[dict], evaluations: list[tuple[int, dict]]) -> list[str]:
    """Since the best evaluation the reward has gone up and the held-out metric down."""
    if len(evaluations) < 2:
        return []
    scores = [(step, score_of(metrics)) for step, metrics in evaluations]
    step, best = max(scores, key=lambda pair: pair[1])
    last_step, last = scores[-1]
    then = mean_of([line for line in grpo if abs(line["step"] - step) <= 5], "reward")
    now = mean_of([line for line in grpo if abs(line["step"] - last_step) <= 5], "reward")
    if best - last <= 0.03 or now <= then:
        return []
    text = (f"The reward rises while the held-out metric falls: from step {step} to {last_step} the reward goes from {then:.2f} to "
            f"{now:.2f}, and the mean of the first metrics from {best:.3f} to {last:.3f}. Something else is paid for, or the "
            "training questions are learned by heart; best/ holds the best model.")
    return [text]


def result_worries(results: list[dict]) -> list[str]:
    """GRPO that took something away, or that is no better than an answer without eyes."""
    rows = {row["kind"]: row for row in results if row["kind"] != "blind"}
    blind = [row for row in results if row["kind"] == "blind"]
    last, start = rows.get("after"), rows.get("after_sft") or rows.get("before")
    found = []
    for name in first_metrics(last["metrics"]) if last else []:
        value, (low, _) = last["metrics"][name], last["intervals"].get(name, (last["metrics"][name],) * 2)
        guess = max(((row["metrics"].get(name, -1.0), row["title"]) for row in blind), default=(-1.0, ""))
        if low <= guess[0]:
            found.append(f"{name} is {value:.3f} after GRPO, and an answer that never looks at the video gets {guess[0]:.3f} "
                         f"({guess[1]}): nothing shows that the video is used.")
        if start and value < min(start["metrics"].get(name, 0) - 0.03, start["intervals"].get(name, (1.0,))[0]):
            found.append(f"{name} fell in GRPO, from {start['metrics'][name]:.3f} to {value:.3f}.")
    return found


ENOUGH_TIMES = 10  # answers with a time, for a line through them
SCALES = (0.8, 1.25)  # of time, that are nothing to worry about


def time_worries(held_out: dict[str, list[tuple[dict, dict]]]) -> list[str]:
    """Times that follow the true ones on another scale; GRPO learns to undo it, so the earliest stage that shows it is named."""
    for stage, answers in held_out.items():
        pairs = [(sum(sample["spans"][0]) / 2, sum(span) / 2) for sample, line in answers if sample["task"] == "grounding"
                 if (span := rewards.parse_interval(rewards.last_block(line["completions"][0], "answer")[0] or "")[0])]
        scale = time_scale(pairs[:200])
        if scale and not SCALES[0] <= scale <= SCALES[1]:
            return [f"Times are on a wrong scale: the {len(pairs)} held-out intervals said in the stage {stage!r} follow the true ones, "
                    f"times {scale:.2f}. Frames are probably sampled at another rate than their positions say, or times are "
                    "in another unit (frames, shares of the video); compare `seconds` and `sample_fps` of data.read_video with the "
                    "file's own clock."]
    return []


def time_scale(pairs: list[tuple[float, float]]) -> float | None:
    """Slope of the line through (true, said) middles of intervals: the median over all pairs of points (Theil and Sen), for some
    answers are just wrong. None where the middles are no line, or where their mean has not moved as the slope says: answers that
    are drawn to the middle of the video have a small slope, too."""
    if len(pairs) < ENOUGH_TIMES or len({true for true, _ in pairs}) < 2 or len({said for _, said in pairs}) < 2:
        return None
    slope = statistics.median((b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.combinations(pairs, 2) if a[0] != b[0])
    true, said = zip(*pairs)
    moved = statistics.mean(said) / max(statistics.mean(true), 1e-9)
    if statistics.correlation(true, said) < 0.8 or abs(moved - 1) < 0.5 * abs(slope - 1) or (moved > 1) != (slope > 1):
        return None
    return slope


def held_out_answers(folder: Path, held_out: list[dict]) -> dict[str, list[tuple[dict, dict]]]:
    """{title of a stage: [(sample, its line of predictions)]}, in the order of time."""
    samples = {sample["id"]: sample for sample in held_out}
    stages = {title: [(samples[line["id"]], line) for line in read_lines(folder / f"predictions.{name}.jsonl") if line["id"] in samples]
              for name, title in STAGES.items()}
    return {title: answers for title, answers in stages.items() if answers}


def late_records(folder: Path, last: int) -> list[dict]:
    """Lines of completions.jsonl of the steps before `last`, and of `last`."""
    return [record for record in read_lines(folder / "completions.jsonl") if record["step"] > last - RECENT]


def late_answers(late: list[dict], samples: dict[str, dict]) -> dict[str, list[tuple[str, str]]]:
    """{task: [(id, what stands in the tags)]} of these completions."""
    said: dict[str, list[tuple[str, str]]] = {}
    for record in late:
        if record["id"] in samples:
            blocks = [rewards.last_block(record["completion"], tag)[0] or "" for tag in ("answer", "glue")]
            if any(blocks):
                said.setdefault(samples[record["id"]]["task"], []).append((record["id"], " ".join(blocks).strip()))
    return said


# --- curves ------------------------------------------------------------------------------------------------------------

MOST_POINTS = 1000  # of a curve; longer ones are means of neighbouring steps

# Title, phase of the log ("evaluations": the held-out metrics), names, logarithmic or not; what it is, what is healthy, and
# what it means when it is not. As in docs/log.md.
CURVES = [
    ("reward", "grpo", ["reward"], False, ("Mean sum of the parts over the completions of a step. Healthy: it rises. If it does "
     "not, look at the parts, then at dead groups.")),
    ("parts of the reward", "grpo", list(PARTS), False, ("Each part, over the tasks that have it. Healthy: format near 1 soon, the "
     "others rise after it. Format alone means answers that can be read and are wrong; a low one, answers that cannot be read.")),
    ("held-out metrics", "evaluations", ["*"], False, ("The first metric of each task on questions that are not trained on "
     "(--eval_every). Healthy: rises with the reward. If it falls while the reward rises, something else is paid for.")),
    ("KL to the reference", "grpo", ["kl"], False, ("How far the policy is from where GRPO began, in nats a token. Healthy: rises "
     "slowly, then stays. A jump or a steep climb: lower --lr or raise --beta.")),
    ("dead groups", "grpo", ["dead share"], False, ("Share of groups whose completions all got the same reward, which teach nothing. "
     "Healthy: well below 1. All wrong: too hard; all right: solved; --select_k and --resample help.")),
    ("completion length", "grpo", ["length"], False, ("Tokens of a completion, end token included. Healthy: changes slowly. It "
     "collapses or explodes when length is rewarded by accident.")),
    ("truncated", "grpo", ["truncated share"], False, ("Share of completions cut at --max_new_tokens. Healthy: near 0. More: raise "
     "the limit, for a cut answer scores 0.")),
    ("gradient norm", "grpo", ["grad_norm"], False, ("Before clipping at 1. Healthy: no spikes. Spikes: lower --lr; a gap in the "
     "line is a step without a finite gradient, which was skipped.")),
    ("gap of log-probabilities", "grpo", ["logp_gap_mean", "logp_gap_max"], True, ("Difference of a token's log-probability when "
     "sampled and when scored. Healthy: a mean below 1e-4 in float32, about 1e-2 in bfloat16. More is a bug, no rounding.")),
    ("entropy", "grpo", ["entropy"], False, ("Of the next token, in nats. Healthy: falls slowly. Near 0 the completions of a group "
     "become equal, and nothing is left to compare.")),
    ("seconds by phase", "grpo", ["wait s", "sample s", "sync s", "score s", "step s"], False, ("Of each step. Healthy: wait (for "
     "videos) near 0 after the first step, else more --num_workers or --frame_cache; much sync means processes that wait for one "
     "another.")),
    ("loss of the warm start", "sft", ["loss"], False, ("Negative log-likelihood of a token of the targets. Healthy: falls, and is "
     "still above 0 at the end; near 0 the targets are known by heart and no spread is left for GRPO.")),
]


def with_shares(lines: list[dict]) -> list[dict]:
    """Counts as shares, and the seconds of each phase under a name of their own."""
    return [{**line, "dead share": line["dead_groups"] / line["groups"] if line["groups"] else None,
             "truncated share": line["truncated"] / max(completions_of(line), 1),
             **{f"{phase} s": value for phase, value in line["seconds"].items()}} for line in lines]


def columns_of(lines: list[dict]) -> dict[str, list]:
    """{name: values} of what CURVES shows, and `step`; at most MOST_POINTS of each."""
    wanted = {name for curve in CURVES for name in curve[2]} & {name for line in lines for name in line}
    size = math.ceil(len(lines) / MOST_POINTS) or 1
    bins = [lines[at:at + size] for at in range(0, len(lines), size)]
    columns = {name: [mean_of(part, name) if any(line.get(name) is not None for line in part) else None for part in bins]
               for name in sorted(wanted)}
    return {"step": [part[-1]["step"] for part in bins], **columns}


def evaluation_columns(evaluations: list[tuple[int, dict]]) -> dict[str, list]:
    names = first_metrics(evaluations[-1][1]) if evaluations else []
    return {"step": [step for step, _ in evaluations],
            **{name: [metrics.get(name) for _, metrics in evaluations] for name in names}}


# --- groups of completions, and the held-out questions through training ------------------------------------------------

WATCHED = 4  # held-out questions of each task
MOST_TEXT = 1200  # characters of a completion; its answer stands at the end


def shown_groups(folder: Path, files: tuple, most: int, clips: "Clips") -> dict:
    """{groups, watched, all_groups}: what the page shows of the completions, with the frames behind them."""
    config, train, held_out = files
    settings = VideoSettings(config["fps"], config["max_frames"], config["total_pixels"], config["min_pixels"])
    watched = watched_answers(folder, held_out, settings, clips)
    samples = {sample["id"]: sample for sample in train}
    total = sum(1 for _ in read_groups(folder, config["group_size"]))
    chosen = {k * total // min(most, total) for k in range(min(most, total))}  # evenly over the steps
    groups = [group_of(records, samples.get(records[0]["id"]), settings, clips)
              for place, records in enumerate(read_groups(folder, config["group_size"])) if place in chosen]
    return {"groups": groups, "watched": watched, "all_groups": total}


def read_groups(folder: Path, size: int) -> Iterator[list[dict]]:
    """The groups of completions.jsonl, in the order of the log."""
    records = read_lines(folder / "completions.jsonl")
    for _, of_question in itertools.groupby(records, key=lambda record: (record["step"], record["id"])):
        while group := list(itertools.islice(of_question, size)):  # a question may come twice in a step
            yield group


def group_of(records: list[dict], sample: dict | None, settings: VideoSettings, clips: "Clips") -> dict:
    completions = [{"text": shorten(record["completion"], MOST_TEXT), **marks_of(sample, record["completion"]),
                    **{name: record[name] for name in ("reward", "parts", "reason", "advantage")}} for record in records]
    return {"step": records[0]["step"], "id": records[0]["id"], **question_of(sample, settings, clips),
            "completions": completions}


def write_question(out: Path, about: str, sample: dict, clip: Clip, answers: list[dict]) -> Path:
    """The page about one question without a truth, asked by hand (tools/ask.py): a card as of a group.

    about: a line in front of it. clip: what the model saw. answers: {title, text, reason, note} of each; what it marks is
    added here. sample: has a `duration` in seconds.
    """
    marked = [answer | marks_of(sample, answer["text"]) for answer in answers]
    asked = {"id": sample["id"], "about": about, **words_of(sample), "clip": 0, "length": sample["duration"],
             "boxes": sample["boxes"][:1] if "boxes" in sample else None, "completions": marked}
    with write_whole(out) as file:
        file.write_text(page_of({"runs": [], "asked": asked, "clips": [strip_of(clip, FRAMES_LIMIT, 4 * MOST_FRAMES)]}),
                        encoding="utf-8")
    return out


def words_of(sample: dict) -> dict:
    return {"task": sample["task"], "question": shorten(str(sample.get("question", "")), MOST_TEXT),
            "options": sample.get("options")}


def question_of(sample: dict | None, settings: VideoSettings, clips: "Clips") -> dict:
    """What was asked about which frames, and the truth."""
    if sample is None:
        return {"task": "?", "question": "(the sample is not where it was)", "truth": "", "clip": None, "length": None}
    clip = clips.place_of(sample, settings)
    length = clip_length(sample, math.nan)
    if math.isnan(length):
        length = clips.kept[clip]["length"] if clip is not None else max((end for _, end in sample.get("spans") or ()), default=None)
    known = {name: value for name, value in sample.items() if name not in ("target", "think")}
    return {**words_of(sample), "truth": shorten(target_text(known, "answer"), MOST_TEXT),
            "spans": sample.get("spans"), "boxes": sample.get("boxes"), "clip": clip, "length": length}


def marks_of(sample: dict | None, completion: str) -> dict:
    """The spans or boxes that a completion names, as its reward reads them."""
    for tag, block in rewards.reward_of(sample["task"]).blocks.items() if sample else ():
        found = rewards.read(sample, completion, tag)[0]
        if block is rewards.EIGHT_BOXES:
            return {"boxes": found}
        if block in (rewards.INTERVAL, rewards.WINDOWS, rewards.MOMENTS):
            return {"spans": [found] if isinstance(found, tuple) else found}
    return {}


def watched_answers(folder: Path, held_out: list[dict], settings: VideoSettings, clips: "Clips") -> list[dict]:
    """The same few held-out questions at every evaluation that has left its answers."""
    on_the_way = sorted(file.name.split(".")[1] for file in folder.glob("predictions.step*.jsonl"))
    names = {"before": "before", "after_sft": "warm start",
             **{name: f"step {int(name.removeprefix('step'))}" for name in on_the_way}, "after": "after"}
    answers = {title: {line["id"]: line for line in read_lines(folder / f"predictions.{name}.jsonl")}
               for name, title in names.items()}
    answers = {title: lines for title, lines in answers.items() if lines}
    shown = []
    for sample in first_of_each_task(held_out, WATCHED):
        said = [(title, lines[sample["id"]]) for title, lines in answers.items() if sample["id"] in lines]
        if said:
            clips.unreadable |= {line["id"] for _, line in said if line.get("problem")}
            rows = [{"title": title, "text": shorten(line["completions"][0], MOST_TEXT), "reward": line["rewards"][0],
                     "reason": line["reasons"][0], **marks_of(sample, line["completions"][0])} for title, line in said]
            shown.append({"id": sample["id"], **question_of(sample, settings, clips), "answers": rows})
    return shown


def first_of_each_task(lines: list[dict], count: int) -> list[dict]:
    """Of samples or answers; in their order."""
    seen: Counter = Counter()
    chosen = []
    for line in lines:
        seen[line["task"]] += 1
        if seen[line["task"]] <= count:
            chosen.append(line)
    return chosen


def reasons_of(folder: Path) -> list[dict]:
    """Rows {reason, count, step, id, text}, the commonest first, each with its first example."""
    counts: Counter = Counter()
    examples: dict[str, dict] = {}
    for record in read_lines(folder / "completions.jsonl"):
        counts[record["reason"]] += 1
        examples.setdefault(record["reason"], record)
    return [{"reason": reason, "count": count, "step": examples[reason]["step"], "id": examples[reason]["id"],
             "text": shorten(examples[reason]["completion"], MOST_TEXT)} for reason, count in counts.most_common()]


def shorten(text: str, most: int) -> str:
    """Its begin and its end."""
    return text if len(text) <= most else f"{text[:most // 2]} […] {text[-most // 2:]}"


# --- frames ------------------------------------------------------------------------------------------------------------

MOST_FRAMES = 16  # of a clip; more are thinned out evenly
SIZES = ((160, 70), (128, 65), (96, 60), (64, 55), (48, 40))  # longer side in pixels, quality of the JPEG


class Clips:
    """The clips on the page, each once: as one JPEG with the frames side by side, and their times."""

    def __init__(self, questions: int, deadline: float):
        self.limit = FRAMES_LIMIT // max(questions + 6 * WATCHED, 1)  # bytes of a clip
        self.deadline = deadline  # on time.monotonic
        self.kept: list[dict] = []
        self.places: dict[str, int | None] = {}
        self.unreadable: set[str] = set()  # ids of samples; a video that hung in a worker would hang here for ever

    def place_of(self, sample: dict, settings: VideoSettings) -> int | None:
        """Where in `kept` the frames are that the model sees; None if there are none, or no time is left to decode."""
        if not files_of(sample) or sample["id"] in self.unreadable:
            return None
        arguments = picture_arguments(settings) if "image" in sample else video_arguments(sample, settings)
        key = json.dumps([files_of(sample), arguments], default=str)
        if key not in self.places and time.monotonic() < self.deadline:
            try:
                clip = (side_by_side([read_picture(file, **arguments) for file in files_of(sample)]) if "image" in sample
                        else read_video(sample["video"], **arguments))
                self.kept.append(strip_of(clip, self.limit))
                self.places[key] = len(self.kept) - 1
            except (VideoError, ValueError, OSError):  # the log of the run has said so
                self.places[key] = None
        return self.places.get(key)


def side_by_side(pictures: list[Clip]) -> Clip:
    """One clip with a frame for each picture, the smaller ones with white below and to the right."""
    height, width = (max(picture.frames.shape[axis] for picture in pictures) for axis in (2, 3))
    frames = torch.full((len(pictures), 3, height, width), 255, dtype=torch.uint8)
    for frame, picture in zip(frames, pictures):
        frame[:, : picture.frames.shape[2], : picture.frames.shape[3]] = picture.frames[0]
    return Clip(frames, torch.zeros(len(pictures)), 1.0)


def strip_of(clip: Clip, limit: int, most: int = MOST_FRAMES) -> dict:
    """A clip as {src, frames, of, shown, times, width, height, length}, with `src` of at most `limit` bytes if it can be."""
    T, _, height, width = clip.frames.shape
    count = min(T, most)
    shown = [round(k * (T - 1) / max(count - 1, 1)) for k in range(count)]
    frames = clip.frames[shown]
    for longest, quality in SIZES:
        scale = min(1.0, longest / max(height, width))
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        src = jpeg_of(frames, size, quality)
        if len(src) <= limit:
            break
    return {"src": src, "of": T, "shown": shown, "times": clip.seconds[shown].tolist(), "width": size[0], "height": size[1],
            "length": float(clip.seconds[-1]) + 1 / clip.sample_fps}


def jpeg_of(frames: torch.Tensor, size: tuple[int, int], quality: int) -> str:
    """Frames (T, 3, H, W) uint8 side by side, each of `size` (width, height), as a data URI."""
    from PIL import Image

    strip = Image.new("RGB", (size[0] * len(frames), size[1]))
    for place, frame in enumerate(frames):
        strip.paste(Image.fromarray(frame.permute(1, 2, 0).numpy()).resize(size), (place * size[0], 0))
    file = io.BytesIO()
    strip.save(file, "JPEG", quality=quality)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


if __name__ == "__main__":
    main()
