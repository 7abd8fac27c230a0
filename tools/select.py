"""`python data.py select`: the samples whose completions differ, from completions that are there already.

They come from eval.py (`predictions.jsonl`), or from training itself (`completions.jsonl`): a run has answered its
samples in groups anyway, so the samples worth a second run are known without asking a model again. The rule is in
lib/selection.py.
"""

import argparse
import json
from collections import Counter
from pathlib import Path

from lib.flags import SEED, SHARE, number
from lib.samples import load_samples, parse_entry, read_jsonl, write_jsonl
from lib.selection import CONTROLS, report_text, select
from rewards import task_score

NO_RECORD = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError)  # of a line of another form


# ---- reading what was answered --------------------------------------------------------------------------------------


def is_training_log(file: Path) -> bool:
    """Whether `file` is a `completions.jsonl` of training, told by its first line: one completion a line, each with
    its step. ValueError where an evaluation has not finished writing `file`."""
    partial = file.parent / "partial"
    if not file.exists() and partial.is_dir():
        raise ValueError(f"{file}: not there yet, the evaluation is unfinished ({partial} holds what is answered); "
                         "give the same eval.py command again, it goes on from there")
    if not file.exists():
        raise FileNotFoundError(f"{file}: no such file; eval.py --num_samples 8 writes predictions.jsonl, a training run "
                                "completions.jsonl")
    with open(file, "rb") as lines:
        first = next((line for line in lines if line.strip()), b"")
    try:
        return {"step", "completion"} <= json.loads(first).keys()
    except (ValueError, AttributeError):  # no object: read_predictions says so, with the line
        return False


def read_predictions(file: str | Path) -> dict[str, dict]:
    """The lines of `predictions.jsonl` by id. ValueError names the line."""
    predictions = {}
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                prediction = json.loads(line)
                key, _ = prediction["id"], [task_score(parts) for parts in prediction["parts"]]
                is_second = key in predictions
            except NO_RECORD as error:
                raise ValueError(f"{file}:{number}: not a prediction with 'id' and 'parts' ({error}); "
                                 "eval.py --num_samples 8 writes them") from error
            if is_second:
                raise ValueError(f"{file}:{number}: a second prediction for sample {key!r}")
            predictions[key] = prediction
    return predictions


def read_training_log(file: str | Path, since: int = 0) -> tuple[dict[str, dict], dict]:
    """The latest group of each sample in `completions.jsonl`, as predictions by id, and a note of what that rests on.

    The latest, because the policy has moved since the groups before it; groups of steps before `since` do not count at
    all. Groups that training replaced (`--resample`) are in the log and count. What a killed run leaves at the end,
    half a line or half a group, is left out and noted. ValueError names any other line that is no record.
    """
    groups, key, notes = {}, None, []  # groups: (sample id, step) to its completions' [(parts, reason), ...]
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                task_score(record["parts"])
                key = record["id"], int(record["step"])
                groups.setdefault(key, []).append((record["parts"], record["reason"]))
            except NO_RECORD as error:
                if not line.endswith(b"\n"):  # can only be the last
                    notes.append(f"line {number} is torn, as of a killed run: left out")
                    continue
                raise ValueError(f"{file}:{number}: not a completion with 'id', 'step', 'parts' and 'reason' "
                                 f"({error}); train.py writes them to completions.jsonl") from error
    usual = Counter(map(len, groups.values())).most_common(1)
    if usual and len(groups[key]) < usual[0][0]:
        notes.append(f"the last group, {key[0]!r} in step {key[1]}, has {len(groups[key])} of {usual[0][0]} "
                     "completions: left out")
        del groups[key]
    latest = {}
    for name, step in groups:
        if step >= max(since, latest.get(name, since)):
            latest[name] = step
    predictions = {}
    for name, step in latest.items():
        parts, reasons = zip(*groups[name, step])
        predictions[name] = {"id": name, "parts": list(parts), "reasons": list(reasons)}
    steps = [min(latest.values()), max(latest.values())] if latest else []
    return predictions, {"since": since, "steps": steps, "notes": notes}


# ---- writing what is chosen ------------------------------------------------------------------------------------------


def write_selection(answers: Path, entry: str, out: Path, options: dict, *, since: int | None = None,
                    unseen: str | None = None) -> dict:
    """Write the kept lines of `entry` to `out` and the report, which is returned, beside it.

    answers: eval.py's `predictions.jsonl`, or training's `completions.jsonl`. options: keywords of `select`. For a
    training log only: `since`, the first step that counts (0), and `unseen`, what becomes of samples that training
    never reached, "drop" (the default: nothing is known of them) or "keep". ValueError as in the readers and `select`.
    """
    samples, source = load_samples([entry]), parse_entry(entry)[0]
    if out.resolve() == source.resolve():
        raise ValueError(f"--out {out} is the data itself; give the selection another name")
    if is_training_log(answers):
        kept, report = _select_from_log(answers, samples, source, options, since or 0, unseen == "keep")
    elif since is None and unseen is None:
        kept, report = select(samples, _with_own_ids(read_predictions(answers), samples, source), **options)
    else:
        raise ValueError(f"{answers}: --since and --unseen are for the completions.jsonl of a training run; "
                         "predictions have no steps, and there is one for every sample")
    if not kept:
        raise ValueError(f"nothing is worth keeping, and {out} is not written: no answers of one sample differ enough.\n"
                         + report_text(report))
    kept = set(kept)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_jsonl(out, [sample for sample in read_jsonl(source) if sample["id"] in kept], source)
    out.with_suffix(".report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


def _select_from_log(file: Path, samples: list[dict], source: Path, options: dict, since: int,
                     keep_unseen: bool) -> tuple[list[str], dict]:
    """`select` among the samples that training has seen; the others are counted in the report, kept or not."""
    predictions, log = read_training_log(file, since)
    predictions = _with_own_ids(predictions, samples, source)
    seen = [sample for sample in samples if sample["id"] in predictions]
    unseen = [sample for sample in samples if sample["id"] not in predictions]
    if not seen:
        raise ValueError(f"{file}: none of the {len(samples)} samples of {source} occurs in it from step {since} on; "
                         "name the file that this run was trained on, or an earlier --since")
    kept, report = select(seen, predictions, **options)
    kept += [sample["id"] for sample in unseen if keep_unseen]
    counts = dict(sorted(Counter(sample["task"] for sample in unseen).items()))
    return kept, {**report, "source": "training log", "log": log, "total": len(samples), "kept": len(kept),
                  "unseen": {"kept": len(unseen) * keep_unseen, "tasks": counts}}


def _with_own_ids(predictions: dict[str, dict], samples: list[dict], source: Path) -> dict[str, dict]:
    """With the ids that the samples have in their own file: ids that several files of a joint run share had their
    file's stem put before them (`load_samples`)."""
    joint = {sample["id"]: f"{source.stem}/{sample['id']}" for sample in samples}
    return predictions | {own: predictions[name] for own, name in joint.items()
                          if own not in predictions and name in predictions}


# ---- the command line -----------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("answers", metavar="ANSWERS", type=Path,
                        help="predictions.jsonl of eval.py --num_samples K, or completions.jsonl of a training run: "
                             "then each sample's latest group counts, and nothing is asked again")
    parser.add_argument("--data", required=True, help="the samples that were asked: FILE, or the same part FILE:N")
    parser.add_argument("--out", type=Path, required=True, help="jsonl file to write; the report goes beside it")
    for name, meaning in (("std", "spread"), ("mean", "mean")):  # absent flags stay out of the namespace
        either = parser.add_mutually_exclusive_group()
        either.add_argument(f"--min_{name}", type=number(float, *SHARE), default=argparse.SUPPRESS,
                            help=f"continuous tasks: least {meaning} of the task scores (0 to 1; 0.1)")
        either.add_argument(f"--{name}_quantile", type=number(float, *SHARE), default=argparse.SUPPRESS,
                            help=f"the {meaning} at this quantile of the task's samples instead (0 to 1)")
    parser.add_argument("--control", choices=CONTROLS,
                        help="as many samples of each task, but by chance, or those of the highest or lowest mean; "
                             "random_pool: as many in all by chance, whatever their task")
    parser.add_argument("--seed", type=number(int, *SEED), default=0,
                        help="of what a control draws (0 to 2^32 - 1; %(default)s)")
    parser.add_argument("--since", type=number(int, 0, 10**7), metavar="STEP",
                        help="training run: ignore the steps before this one (0 to 10^7; 0)")
    parser.add_argument("--unseen", choices=["drop", "keep"],
                        help="training run: what becomes of samples that it never reached (drop)")


def run(args: argparse.Namespace) -> None:
    options = ("min_std", "min_mean", "std_quantile", "mean_quantile", "control", "seed")
    options = {name: value for name, value in vars(args).items() if name in options}
    report = write_selection(args.answers, args.data, args.out, options, since=args.since, unseen=args.unseen)
    print(report_text(report))
    print(f"{report['kept']} of {report['total']} samples kept in {args.out}")
