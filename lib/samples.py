"""The sample: one JSON object a line. What its fields may be, and reading and writing files of them.

This is the only place that knows what makes a sample right. A file is checked as it is read (`read_jsonl`), the truth
once more where it is scored (rewards.py), because samples also come from Python, and what converters make before it is
written (tools/convert.py). Pure Python, so that rewards.py can be imported where nobody wants to load torch.
"""

import json
import random
import re
import sys
from collections import Counter
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import NamedTuple, TypeVar

from lib.files import write_whole

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
NUM_BOXES = 8  # of a tracking sample, as in VideoChat-R1
Entry = TypeVar("Entry")  # what a dict by task holds

# ---- what a sample is -----------------------------------------------------------------------------------------------


def is_number(value: object) -> bool:
    # Compared instead of math.isfinite, which raises for an integer that no float can hold.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_list(value: object, length: int | None = None) -> bool:
    """JSON has lists only; samples that are made in Python may have tuples."""
    return isinstance(value, (list, tuple)) and len(value) > 0 and length in (None, len(value))


def _are_rows(value: object, width: int) -> bool:
    return _is_list(value) and all(_is_list(row, width) and all(map(is_number, row)) for row in value)


class Field(NamedTuple):
    """What a field has to be: `is_right` by itself, and `misfit` says why it does not fit the sample's other fields."""

    is_right: Callable[[object], bool]
    wanted: str  # in words, for the message
    misfit: Callable[[dict], str | None] = lambda sample: None


def _not_one_span(sample: dict) -> str | None:
    if len(sample["spans"]) != 1:
        return f"field 'spans' has {len(sample['spans'])} spans; grounding has exactly one (gqa may have several)"
    return None


def _not_offered(sample: dict) -> str | None:
    if sample["answer"] not in list(LETTERS[:len(sample["options"])]):
        return f"field 'answer' is {sample['answer']!r}; it must be a letter of the {len(sample['options'])} options"
    return None


def _no_label(sample: dict) -> str | None:
    labels = sample.get("options", [sample["answer"]])
    if sample["answer"].strip().lower() not in [label.strip().lower() for label in labels]:
        return f"field 'answer' is {sample['answer']!r}; it must be one of the options {labels}"
    return None


def _no_part(sample: dict) -> str | None:
    if sample["end"] <= sample.get("start", 0):
        return f"field 'end' is {sample['end']}; it must lie behind 'start' ({sample.get('start', 0)})"
    return None


OPTIONS = Field(lambda value: _is_list(value) and len(value) <= len(LETTERS)
                and all(isinstance(option, str) for option in value), "a list of 1 to 26 strings without letters")
SPANS = Field(lambda value: _are_rows(value, 2), "a list of [start, end] in seconds")
BOXES = Field(lambda value: _are_rows(value, 4) and len(value) == NUM_BOXES, "a list of 8 [x0, y0, x1, y1]")
EVENTS = Field(lambda value: _is_list(value)
               and all(isinstance(event, str) and any(map(str.isalnum, event)) for event in value),
               "a list of sentences with words in them, one for each event")

# What a sample of each task must hold, beside id, task and question. This is the first of four dicts by the name of a
# task, and a task has an entry in each: TASKS here, TEXTS in data.py (how it is asked), REWARDS in rewards.py (what a
# completion is worth), REPORTS in eval.py (what is reported). docs/your-own.md adds a task to them, step by step.
TASKS = {
    "grounding": {"spans": SPANS._replace(misfit=_not_one_span)},
    "qa": {"options": OPTIONS, "answer": Field(_is_text, "a string", _not_offered)},
    "gqa": {"options": OPTIONS, "answer": Field(_is_text, "a string", _not_offered), "spans": SPANS},
    "tracking": {"boxes": BOXES},
    "classification": {"options": OPTIONS, "answer": Field(_is_text, "a string", _no_label)},
    "captioning": {"events": EVENTS},
}

# What a field has to be in a sample of any task. The fields of TASKS are among them, each by itself: `spans` of a qa sample
# still tell how long its video may be.
FIELDS = {
    "id": Field(_is_text, "a string"),
    "task": Field(lambda value: isinstance(value, str) and value in TASKS, f"one of {', '.join(TASKS)}"),
    "video": Field(_is_text, "a path; leave it out for a text-only sample"),
    "question": Field(_is_text, "a string"),
    **{field: Field(rule.is_right, rule.wanted) for fields in TASKS.values() for field, rule in fields.items()},
    "frames": Field(lambda value: _is_list(value, NUM_BOXES) and all(type(i) is int and i >= 0 for i in value),
                    "a list of 8 frame numbers from 0"),
    "duration": Field(lambda value: is_number(value) and value > 0, "seconds above 0; leave it out if unknown"),
    "fps": Field(lambda value: is_number(value) and value > 0, "frames a second above 0"),
    "think": Field(lambda value: isinstance(value, bool), "true or false"),
    "target": Field(lambda value: isinstance(value, str), "a string"),
    "start": Field(lambda value: is_number(value) and value >= 0, "seconds from 0"),
    "end": Field(lambda value: is_number(value) and value > 0, "seconds above 0", _no_part),
}


def entry_of(entries: dict[str, Entry], task: str, place: str) -> Entry:
    """A task's entry in one of the four dicts. KeyError that names the place where it is missing: no other stands in."""
    if task not in entries:
        raise KeyError(f"task {task!r} has no entry in {place}: add it there, as docs/your-own.md shows")
    return entries[task]


def rule_of(sample: dict, field: str) -> Field:
    """What a field of this sample has to be, needed or not."""
    return TASKS.get(str(sample.get("task")), {}).get(field) or FIELDS[field]


def find_problem(sample: object) -> str | None:
    """What is wrong with a sample, in words that name field, value and remedy; None if it is sound."""
    if not isinstance(sample, dict):
        return f"{str(sample)[:60]!r} is not a JSON object; write one object a line"
    given = [field for field in FIELDS if field in sample]
    needed = ["id", "task", "question", *TASKS.get(str(sample.get("task")), {})]
    problems = chain((value_problem(sample, field) for field in given + needed), (_misfit(sample, field) for field in given))
    return next((problem for problem in problems if problem), None)


def field_problem(sample: dict, field: str) -> str | None:
    """What is wrong with one field, by itself or beside the others of the sample; None if it is sound."""
    return value_problem(sample, field) or _misfit(sample, field)


def value_problem(sample: dict, field: str) -> str | None:
    """What is wrong with one field by itself."""
    rule = rule_of(sample, field)
    if field not in sample:
        return f"field {field!r} is missing; it must be {rule.wanted}"
    if not rule.is_right(sample[field]):
        return f"field {field!r} is {str(sample[field])[:80]!r}; it must be {rule.wanted}"
    return None


def _misfit(sample: dict, field: str) -> str | None:
    """Why a field whose value alone is right does not fit the others."""
    return rule_of(sample, field).misfit(sample)


# ---- files of samples -----------------------------------------------------------------------------------------------


def load_samples(entries: list[str], video_root: str | Path | None = None, tasks: list[str] | None = None,
                 seed: int = 0) -> list[dict]:
    """Samples of all `entries`, in file order, each with an absolute `video`.

    An entry is FILE[@VIDEO_ROOT][:N] (its first N samples) or FILE[@VIDEO_ROOT][:P%] (a share, drawn with `seed`, in
    file order); N and P count samples of the wanted `tasks`. Videos lie under the entry's root, else `video_root`, else
    beside the file. An id that occurs in two files is prefixed with its file's stem. Spans are passed on as annotated.
    Raises ValueError that names file, line, field, value and remedy.
    """
    if unknown := set(tasks or ()) - set(TASKS):
        raise ValueError(f"unknown task {sorted(unknown)[0]!r}; the tasks are {', '.join(TASKS)}")
    parts = [parse_entry(entry) for entry in entries]
    loaded = []
    for file, root, take in parts:
        samples = [sample for sample in read_jsonl(file) if not tasks or sample["task"] in tasks]
        if not samples:
            raise ValueError(f"{file}: no sample{' of task ' + ', '.join(tasks) if tasks else ''}; check the file "
                             "and --tasks")
        samples = take_part(samples, take, random.Random(f"{seed} {file.name}"))
        if not samples:
            raise ValueError(f"{file}: ':{take}' leaves no sample of it")
        for sample in samples:
            if "video" in sample:
                sample["video"] = str((Path(root or video_root or file.parent) / sample["video"]).absolute())
        loaded.append(samples)
    _make_ids_unique([file for file, _, _ in parts], loaded)
    return [sample for samples in loaded for sample in samples]


def parse_entry(entry: str) -> tuple[Path, str | None, str | None]:
    """FILE, VIDEO_ROOT and N or "P%" of an entry; the last two may be None."""
    name, take = re.fullmatch(r"(.+?)(?::(\d+(?:\.\d+)?%|\d+))?", entry, re.DOTALL).groups()
    # A path may itself contain an @, so the root begins at the first @ that a file's name ends before.
    for at in (match.start() for match in re.finditer("@", name)):
        if Path(name[:at]).is_file():
            return Path(name[:at]), name[at + 1:], take
    if not Path(name).is_file():
        raise ValueError(f"{name.partition('@')[0]}: no such file (entry {entry!r}; an entry is "
                         "FILE[@VIDEO_ROOT][:N] or FILE[@VIDEO_ROOT][:P%])")
    return Path(name), None, take


def take_part(samples: list[dict], take: str | None, rng: random.Random) -> list[dict]:
    if take is None:
        return samples
    if not take.endswith("%"):
        return samples[:int(take)]
    count = min(round(len(samples) * float(take[:-1]) / 100), len(samples))
    return [samples[i] for i in sorted(rng.sample(range(len(samples)), count))]


def _make_ids_unique(files: list[Path], loaded: list[list[dict]]) -> None:
    """Prefix the ids that several files share, in place. Two files of one name are told apart by their place."""
    count = Counter(sample["id"] for samples in loaded for sample in samples)
    stems = Counter(file.stem for file in files)
    for place, (file, samples) in enumerate(zip(files, loaded), 1):
        name = file.stem if stems[file.stem] == 1 else f"{file.stem}#{place}"
        for sample in samples:
            if count[sample["id"]] > 1:
                sample["id"] = f"{name}/{sample['id']}"


def read_jsonl(file: str | Path) -> list[dict]:
    """The validated samples of one file as they stand in it. ValueError names the line, the field and the value."""
    samples, line_of = [], {}
    with open(file, "rb") as lines:  # bytes: text mode would also break lines at characters other than \n
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                sample = json.loads(line)
            except ValueError as error:  # no JSON, or no UTF-8
                raise ValueError(f"{file}:{number}: not a JSON object ({error}); write one object a line") from error
            if problem := find_problem(sample):
                raise ValueError(f"{file}:{number}: {problem}")
            if sample["id"] in line_of:
                raise ValueError(f"{file}:{number}: field 'id': {sample['id']!r} is also the id of line "
                                 f"{line_of[sample['id']]}; ids must be unique within a file")
            line_of[sample["id"]] = number
            samples.append(sample)
    return samples


def write_jsonl(file: Path, samples: list[dict], source: Path | None = None) -> None:
    """One sample a line, UTF-8. `source`: the file they come from. Where `file` lies elsewhere, videos that lie beside
    `source` get their absolute path, so that they are found from there too."""
    moved = source is not None and file.parent.resolve() != source.parent.resolve()
    # Half a surrogate pair is no UTF-8, but JSON may hold it as \ud83d, which is just how backslashreplace writes it.
    with write_whole(file) as partial, open(partial, "w", encoding="utf-8", errors="backslashreplace", newline="\n") as lines:
        for sample in samples:
            if moved and "video" in sample and (video := source.parent.resolve() / sample["video"]).exists():
                sample = {**sample, "video": str(video)}
            lines.write(json.dumps(sample, ensure_ascii=False) + "\n")
