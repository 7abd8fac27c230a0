"""The sample: one JSON object a line. What its fields may be, and reading and writing files of them.

This is the only place that knows what makes a sample right. A file is checked as it is read (`read_jsonl`), the truth
once more where it is scored (rewards.py), because samples also come from Python, and what converters make before it is
written (tools/convert.py). Pure Python, so that rewards.py can be imported where nobody wants to load torch.
"""

import difflib
import json
import os
import random
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple, TypeVar

from lib.files import write_whole

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
NUM_BOXES = 8  # of a tracking sample, as in VideoChat-R1
MOST = 10_000_000  # seconds or frames of a video; larger numbers are a mistake, and overflow in timers and decoders
DEEPEST = 20  # brackets in brackets of a line; what walks through a value must not exhaust the stack
Entry = TypeVar("Entry")  # what a dict by task holds

# ---- what a sample is -----------------------------------------------------------------------------------------------


def is_number(value: object) -> bool:
    # Compared instead of math.isfinite, which raises for an integer that no float can hold.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_path(value: object) -> bool:
    """A system call refuses a NUL, and names that are longer: with an error that stops a run and names no line."""
    if not _is_text(value) or "\0" in value:
        return False
    parts = value.encode("utf-8", "replace").split(os.sep.encode())
    return max(map(len, parts)) <= 255 and sum(map(len, parts)) + len(parts) <= 2000  # the root comes in front of it


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
        return (f"field 'spans' has {len(sample['spans'])} spans; grounding has exactly one (gqa may have several, moments any "
                "number)")
    return None


def _not_offered(sample: dict) -> str | None:
    if sample["answer"] not in list(LETTERS[:len(sample["options"])]):
        return f"field 'answer' is {sample['answer']!r}; it must be a letter of the {len(sample['options'])} options"
    return None


def _no_label(sample: dict) -> str | None:
    labels = sample.get("options", [sample["answer"]])
    # "é" is one character or two, and both look alike: rewards.py reads either
    answer, *known = (unicodedata.normalize("NFC", text).strip().lower() for text in (sample["answer"], *labels))
    if answer not in known:
        return f"field 'answer' is {sample['answer']!r}; it must be one of the options {labels}"
    return None


def _not_for_pictures(sample: dict) -> str | None:
    if "video" in sample:
        return "fields 'video' and 'image' are both given; a sample shows one or the other"
    if sample.get("task") not in PICTURE_TASKS:
        return f"field 'image' does not go with task {sample.get('task')!r}; pictures go with {', '.join(PICTURE_TASKS)}"
    return None


def _no_part(sample: dict) -> str | None:
    if sample["end"] <= sample.get("start", 0):
        return f"field 'end' is {sample['end']}; it must lie behind 'start' ({sample.get('start', 0)})"
    return None


OPTIONS = Field(lambda value: _is_list(value) and len(value) <= len(LETTERS)
                and all(isinstance(option, str) for option in value), "a list of 1 to 26 strings without letters")
SPANS = Field(lambda value: _are_rows(value, 2), "a list of [start, end] in seconds")
ANY_SPANS = Field(lambda value: value in ([], ()) or _are_rows(value, 2),
                  "a list of [start, end] in seconds, [] for what is not in the video")
VIDEO = Field(_is_path, "the path of a video or of a folder of frames")
PICTURES = Field(lambda value: _is_path(value) or _is_list(value) and all(map(_is_path, value)),
                 "the path of a picture, or a list of paths of pictures", _not_for_pictures)
PICTURE_TASKS = ("qa", "classification", "captioning")  # a sample of these may have `image` in place of `video`
BOXES = Field(lambda value: _are_rows(value, 4) and len(value) == NUM_BOXES, "a list of 8 [x0, y0, x1, y1]")
EVENTS = Field(lambda value: _is_list(value)
               and all(isinstance(event, str) and any(map(str.isalnum, event)) for event in value),
               "a list of sentences with words in them, one for each event")

# What a sample of each task must hold, beside id, task and question. This is the first of four dicts by the name of a
# task, and a task has an entry in each: TASKS here, TEXTS in data.py (how it is asked), REWARDS in rewards.py (what a
# completion is worth), REPORTS in eval.py (what is reported). docs/your-own.md adds a task to them, step by step.
TASKS = {
    "grounding": {"video": VIDEO, "spans": SPANS._replace(misfit=_not_one_span)},
    "moments": {"video": VIDEO, "spans": ANY_SPANS},
    "qa": {"options": OPTIONS, "answer": Field(_is_text, "a string", _not_offered)},  # without a video it is text only
    "gqa": {"video": VIDEO, "options": OPTIONS, "answer": Field(_is_text, "a string", _not_offered), "spans": SPANS},
    "tracking": {"video": VIDEO, "boxes": BOXES},
    "classification": {"video": VIDEO, "options": OPTIONS, "answer": Field(_is_text, "a string", _no_label)},
    "captioning": {"video": VIDEO, "events": EVENTS},
}

# What a field has to be in a sample of any task. The fields of TASKS are among them, each by itself: `spans` of a qa sample
# still tell how long its video may be.
FIELDS = {
    "id": Field(_is_text, "a string"),
    "task": Field(lambda value: isinstance(value, str) and value in TASKS, f"one of {', '.join(TASKS)}"),
    "question": Field(_is_text, "a string"),
    **{field: Field(rule.is_right, rule.wanted) for fields in TASKS.values() for field, rule in fields.items()},
    "image": PICTURES,
    "frames": Field(lambda value: _is_list(value, NUM_BOXES) and all(type(i) is int and 0 <= i <= MOST for i in value),
                    f"a list of 8 frame numbers from 0 to {MOST}"),
    "duration": Field(lambda value: is_number(value) and 0 < value <= MOST,
                      f"seconds above 0, at most {MOST}; leave it out if unknown"),
    "fps": Field(lambda value: is_number(value) and 0.001 <= value <= 10_000, "frames a second from 0.001 to 10000"),
    "think": Field(lambda value: isinstance(value, bool), "true or false"),
    "box_units": Field(lambda value: value in (1, 1000), "1 or 1000"),  # set by lib/questions.py for the model
    "target": Field(lambda value: isinstance(value, str), "a string"),
    "dense_windows": SPANS,  # where the video is looked at more closely, and how much more (data.denser_frames)
    "density": Field(lambda value: is_number(value) and 1 <= value <= 1000, "a number from 1 to 1000"),
    "start": Field(lambda value: is_number(value) and 0 <= value <= MOST, f"seconds from 0 to {MOST}"),
    "end": Field(lambda value: is_number(value) and 0 < value <= MOST, f"seconds above 0, at most {MOST}", _no_part),
}
# Passed on by tools/convert.py for evaluation by category; nothing else reads them.
EXTRA_FIELDS = ("category", "domain", "task_type", "reasoning")


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
        return f"{shown(sample)} is not a JSON object; write one object a line"
    given = [field for field in FIELDS if field in sample]
    needed = ["id", "task", "question", *needed_fields(sample)]
    problems = chain((text_problem(sample, field) for field in sample),
                     (value_problem(sample, field) for field in given + needed),
                     [_mistaken_for_text_only(sample)],
                     (_misfit(sample, field) for field in given))
    return next((problem for problem in problems if problem), None)


def needed_fields(sample: dict) -> list[str]:
    """What a sample of its task must hold, beside id, task and question."""
    return [field for field in TASKS.get(str(sample.get("task")), {}) if field != "video" or "image" not in sample]


def field_problem(sample: dict, field: str) -> str | None:
    """What is wrong with one field, by itself or beside the others of the sample; None if it is sound."""
    return value_problem(sample, field) or _misfit(sample, field)


def value_problem(sample: dict, field: str) -> str | None:
    """What is wrong with one field by itself."""
    rule = rule_of(sample, field)
    if field not in sample:
        other = next((key for key in sample if key not in FIELDS and resembled(key) == field), None)
        hint = "" if other is None else f"; rename {other!r}, if that is it"
        return f"field {field!r} is missing; it must be {rule.wanted}{hint}"
    if not rule.is_right(sample[field]):
        return f"field {field!r} is {shown(sample[field])}; it must be {rule.wanted}"
    return None


def _misfit(sample: dict, field: str) -> str | None:
    """Why a field whose value alone is right does not fit the others."""
    return rule_of(sample, field).misfit(sample)


def _mistaken_for_text_only(sample: dict) -> str | None:
    """A sample that may do without a video, and has something under a key that looks like one, or like a picture: nobody
    would see it."""
    other = next((key for key in sample if key not in FIELDS and resembled(key) in ("video", "image")), None)
    if "video" in sample or "image" in sample or other is None:
        return None
    field = resembled(other)
    return (f"field {field!r} is missing, and {other!r} is not read; rename it to {field!r}, or take it out of a sample "
            "that is text only")


def text_problem(sample: dict, field: str) -> str | None:
    """Half of a surrogate pair (an emoji that was cut in two) is no text: a tokenizer dies of it. Known field or not,
    for names are printed and lines are written, too."""
    todo = [field, sample[field]]
    while todo:
        value = todo.pop()
        if isinstance(value, dict):
            todo += [*value.keys(), *value.values()]
        elif isinstance(value, (list, tuple)):
            todo += value
        elif isinstance(value, str) and (half := re.search("[\ud800-\udfff]", value)):
            return (f"field {field!r} holds half of a character ({half[0]!r} at place {half.start()} of "
                    f"{shown(value)}); write the whole character, or leave it out")
    return None


def shown(value: object) -> str:
    """A value for a message: as Python writes it, so that 8 and '8' differ and no control character acts; shortened."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more than 4,300 digits
        text = "a number of thousands of digits"
    return text if len(text) <= 80 else text[:80] + "..."


def files_of(sample: dict) -> list[str]:
    """What a sample shows: its video, its pictures in their order, or nothing.

    >>> files_of({"video": "v.mp4"}), files_of({"image": "a.jpg"}), files_of({"image": ["a.jpg", "b.jpg"]}), files_of({})
    (['v.mp4'], ['a.jpg'], ['a.jpg', 'b.jpg'], [])
    """
    shown = sample.get("video", sample.get("image", []))
    return [shown] if isinstance(shown, str) else list(shown)


def with_files(sample: dict, change: Callable[[str], str]) -> dict:
    """The sample with other paths, in the same form."""
    if "video" in sample:
        return {**sample, "video": change(sample["video"])}
    if "image" in sample:
        one = isinstance(sample["image"], str)
        return {**sample, "image": change(sample["image"]) if one else [change(path) for path in sample["image"]]}
    return sample


def option_texts(sample: dict) -> list[str]:
    """The options without letters of their own, where all of them carry one and in order: a prompt gives them theirs.

    >>> option_texts({"options": ["A. a lamp", "(B) a fan"]}), option_texts({"options": ["A. Smith", "C. Jones"]})
    (['a lamp', 'a fan'], ['A. Smith', 'C. Jones'])
    """
    options = list(sample["options"])
    matches = [re.match(r"\s*(?:\(([A-Z])\)\s*|([A-Z])[.):]\s+)(?=\S)", option) for option in options]
    if len(options) > 1 and all(matches) and [m[1] or m[2] for m in matches] == list(LETTERS[:len(options)]):
        return [option[match.end():] for option, match in zip(options, matches)]
    return options


# ---- keys that nobody reads -----------------------------------------------------------------------------------------

# Words that stand in keys of other people's data for what is called otherwise here.
VIDEO_WORDS = ("video", "vid", "path", "clip", "movie", "media", "file", "mp4", "url")
PICTURE_WORDS = ("image", "img", "picture", "photo", "jpg", "png")
OTHER_WORDS = {"query": "question", "prompt": "question", "choice": "options", "candidate": "options", "option": "options",
               "label": "answer", "gt": "answer", "solution": "answer", "timestamp": "spans", "window": "spans",
               "span": "spans", "box": "boxes", "bbox": "boxes", "begin": "start", "stop": "end", "length": "duration",
               "event": "events", "uid": "id", "qid": "id"}


def resembled(key: str) -> str | None:
    """The field that an unknown key was meant for, as far as its words tell.

    >>> [resembled(key) for key in ("Video", "video_path", "videos", "vidoe", "video_start", "Spans", "colour")]
    ['video', 'video', 'video', 'video', 'start', 'spans', None]
    """
    words = [word.lower() for word in re.findall(r"[a-zA-Z][a-z]*\d*|[A-Z]+", key[:200])]
    known = [_field_of(word) for word in ([key.lower()] if key.isupper() else words)]
    if "image" in known and known[-1] in (None, "id", "video"):  # image_path, image_id
        return "image"
    if "video" in known and known[-1] in (None, "id"):  # video_path, video_id; but video_start is a start
        return "video"
    if found := [field for field in known if field]:
        return found[-1]
    return next(iter(difflib.get_close_matches(key.lower()[:30], FIELDS, 1, 0.75)), None)


def _field_of(word: str) -> str | None:
    singular = word if word in FIELDS else word.removesuffix("s")
    if singular in FIELDS:
        return singular
    if singular in PICTURE_WORDS or word.startswith("image"):
        return "image"
    if singular in VIDEO_WORDS or word.startswith(("video", "file", "clip")):
        return "video"
    return OTHER_WORDS.get(singular) or OTHER_WORDS.get(word.removesuffix("es"))


def trained_on(train: list[dict], held_out: list[dict]) -> list[str]:
    """A line where held-out questions are trained on as well: same task, files and words, whatever the ids."""
    known = {(sample["task"], *files_of(sample), sample["question"]) for sample in train}
    both = [sample["id"] for sample in held_out if (sample["task"], *files_of(sample), sample["question"]) in known]
    return [f"warning: {len(both)} of {len(held_out)} held-out questions are trained on as well ({', '.join(both[:3])}"
            f"{', ...' if len(both) > 3 else ''}): what they score says little"] if both else []


def unread_keys(samples: list[dict]) -> list[str]:
    """A line for each key that nothing reads, with the known one that it resembles."""
    count = Counter(key for sample in samples for key in sample if key not in FIELDS and key not in EXTRA_FIELDS)
    lines = []
    for key, number in count.items():
        field = resembled(key)
        hint = f"; is it meant for {field!r}?" if field else ""
        lines.append(f"unknown key {shown(key)} in {number} sample{'s' * (number > 1)} is not read{hint}")
    return lines


# ---- files of samples -----------------------------------------------------------------------------------------------


def load_samples(entries: list[str], video_root: str | Path | None = None, tasks: list[str] | None = None,
                 seed: int = 0) -> list[dict]:
    """Samples of all `entries`, in file order, each with an absolute `video`, or `image`.

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
        folder = Path(root or video_root or file.parent)
        loaded.append([with_files(sample, lambda path: str((folder / path).absolute())) for sample in samples])
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
    if float(take[:-1]) > 100:
        raise ValueError(f"':{take}': a share is at most 100%, which is all samples; leave it out")
    count = round(len(samples) * float(take[:-1]) / 100)
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
    samples = []
    for number, sample, problem in judged_lines(file):
        if problem:
            raise ValueError(f"{file}:{number}: {problem}")
        samples.append(sample)
    return samples


def judged_lines(file: str | Path) -> Iterator[tuple[int, dict, str | None]]:
    """(line number, sample, what is wrong with it or None) of the lines that are not blank, whatever stands in them. A line
    without an object stands in as {"text": line}. Of two lines with one id the first is the sample."""
    line_of = {}
    with open(file, "rb") as lines:  # bytes: text mode would also break lines at characters other than \n
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                sample = parse_line(line)
                problem = find_problem(sample)
            except ValueError as error:
                sample, problem = None, f"not a JSON object ({error}); write one object a line"
            if not problem and (first := line_of.setdefault(sample["id"], number)) != number:
                problem = (f"field 'id': {sample['id']!r} is also the id of line {first}; ids must be unique within a file")
            yield number, sample if isinstance(sample, dict) else {"text": line.decode(errors="replace").strip()}, problem


def parse_line(line: bytes) -> object:
    """The value of a line of JSON. ValueError for everything that is none, or is nested deeper than a sample can be."""
    try:
        value = json.loads(line)
    except RecursionError:
        raise ValueError("brackets in brackets in brackets without end") from None
    level = [value]
    for _ in range(DEEPEST):
        level = [inner for outer in level if isinstance(outer, (list, dict))
                 for inner in (outer.values() if isinstance(outer, dict) else outer)]
    if level:
        raise ValueError(f"brackets are nested more than {DEEPEST} deep")
    return value


def write_jsonl(file: Path, samples: list[dict], source: Path | None = None) -> None:
    """One sample a line, UTF-8. `source`: the file they come from. Where `file` lies elsewhere, videos and
    pictures that lie beside `source` get their absolute path, so that they are found from there too."""
    moved = source is not None and file.parent.resolve() != source.parent.resolve()
    # Half a surrogate pair is no UTF-8, but JSON may hold it as \ud83d, which is just how backslashreplace writes it.
    with write_whole(file) as partial, open(partial, "w", encoding="utf-8", errors="backslashreplace", newline="\n") as lines:
        for sample in samples:
            # Of a bad sample anything may stand there.
            if moved and all(FIELDS[field].is_right(sample[field]) for field in ("video", "image") if field in sample):
                sample = with_files(sample, lambda path: _beside(source, path))
            lines.write(json.dumps(sample, ensure_ascii=False) + "\n")


def _beside(source: Path, path: str) -> str:
    """The absolute path where the file lies beside `source`, else the path as it stands."""
    try:
        absolute = source.parent.resolve() / path
        return str(absolute) if absolute.exists() else path
    except OSError:  # a folder without permission
        return path
