"""From published annotation files to samples: sixteen formats, one small generator each.

A sample is one JSON object a line: what is asked (`task`, `question`, `options`), about which `video`, and the truth
(`answer`, `spans` in seconds, `boxes` in fractions of the frame). Only annotation files are read here (and, where they are
there, the sizes of GOT-10k's pictures); no video has to exist. Read `convert` at the bottom first for the whole journey,
then `Source`, then any of the generators: they are grouped by task (grounding, tracking, grounded questions, questions,
labels) and independent of each other.

One rule governs all of them: what was annotated is what is written. A span that ends before it starts, or after the
video, is counted, reported and passed on, because repairing the truth would silently move every published number;
what such a span is worth is decided where answers are scored. What cannot be a sample at all (a missing key, a letter
nobody offered, half a box) stops the conversion with the file and the record, and writes nothing. What is one, but an
empty one (a blank question, no window), is written and named: training refuses it, `data.py check` sets it apart.

Every sample has `id`, `task`, `video`, `question` and its truth. `duration`, `fps`, `start` and `end` are there only
where the source tells. One more key is common to all formats: `category` (str), the group for which the dataset's
authors report a figure of their own:

    nextgqa, nextqa, videochat_r1_gqa   the question's type: CW, CH, TN, TC, TP, DC, DL, DO
    mvbench                             the task: "action_antonym"
    videomme                            the length class: short, medium, long (besides `domain` and `task_type`)
    tempcompass                         the dimension: action, direction, speed, order, attribute_change
    perception_test                     the area: memory, semantics, ... (besides `reasoning`)

Left out on purpose: downloading, looking for the video files (their endings vary), shuffling, subsets, and the parquet
files of the hub (`pandas.read_parquet(x).to_json(y, orient="records", lines=True)` turns one into a `.jsonl`).
"""

import ast
import csv
import hashlib
import io
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from PIL import Image
from tqdm import tqdm

from lib.files import write_whole
from lib.samples import LETTERS, NUM_BOXES, field_problem, find_problem, is_number, needed_fields
from lib.terminal import printable

# A folder of frames has no clock of its own: GOT-10k is annotated at 10 Hz, MVBench's TVQA frames are 3 a second.
GOT10K_FPS = 10.0
TVQA_FPS = 3.0

QUALITY_LABELS = {"0": "low quality", "1": "high quality"}
# The label files hold no question. This one names both labels, because a label counts only when it is written exactly.
QUALITY_QUESTION = "Is this video of 'low quality' or of 'high quality', technically and aesthetically?"

# MVBench borrows its videos from eleven other datasets, and its records name the file only.
MVBENCH_FOLDERS = {
    "action_antonym": "ssv2_video",
    "action_count": "perception/videos",
    "action_localization": "sta/sta_video",
    "action_prediction": "star/Charades_v1_480",
    "action_sequence": "star/Charades_v1_480",
    "character_order": "perception/videos",
    "counterfactual_inference": "clevrer/video_validation",
    "egocentric_navigation": "vlnqa",
    "episodic_reasoning": "tvqa/frames_fps3_hq",
    "fine_grained_action": "Moments_in_Time_Raw/videos",
    "fine_grained_pose": "nturgbd",
    "moving_attribute": "clevrer/video_validation",
    "moving_count": "clevrer/video_validation",
    "moving_direction": "clevrer/video_validation",
    "object_existence": "clevrer/video_validation",
    "object_interaction": "star/Charades_v1_480",
    "object_shuffle": "perception/videos",
    "scene_transition": "scene_qa/video",
    "state_change": "perception/videos",
    "unexpected_action": "FunQA_test/test",
}


# ---- reading --------------------------------------------------------------------------------------------------------


@dataclass
class Source:
    """The files under `--src`, and `where` in them we are.

    The generators below read through this object and never catch anything: whatever goes wrong in a record, `convert`
    finds its file and its place here. `digests` collects a sha256 of what was read, so that a log says which edition
    of a dataset it was.
    """

    path: Path
    split: str
    where: str = ""
    digests: dict = field(default_factory=dict)

    def text(self, file: str = "", digest: str = "") -> str:
        """The whole text of a file below `path`, or of `path` itself. Files with the same `digest` share one hash."""
        self.where = file or self.path.name
        data = (self.path / file).read_bytes()
        self.digests.setdefault(digest or self.where, hashlib.sha256()).update(data)
        return data.decode("utf-8-sig")  # spreadsheets put a byte order mark before the first column's name

    def load_json(self, file: str = "") -> dict | list:
        return json.loads(self.text(file))

    def each(self, records: dict | list) -> Iterator[tuple]:
        """(key or 0-based number, record), keeping `where` up to date: `yes_no.json['12']['order'][0]`."""
        parent = self.where
        for key, record in records.items() if isinstance(records, dict) else enumerate(records):
            self.where = f"{parent}[{key!r}]"
            yield key, record

    def lines(self, file: str = "") -> Iterator[tuple[int, str]]:
        """(1-based number, line) of the lines that are not blank."""
        # Not splitlines(): it also cuts at U+2028 and its kin, which JSON allows inside a string.
        for number, line in enumerate(self.text(file).split("\n"), start=1):
            self.where = f"{file or self.path.name}, line {number}"
            if line.strip():
                yield number, line.strip()

    def json_rows(self) -> Iterator[dict]:
        """The objects of a `.json` list, or of any other file with one object a line."""
        if self.path.suffix == ".json":
            yield from (row for _, row in self.each(self.load_json()))
        else:
            yield from (json.loads(line) for _, line in self.lines())

    def csv_rows(self, file: str) -> Iterator[dict[str, str]]:
        """The rows of a CSV file with a header, one dict each."""
        reader = csv.DictReader(io.StringIO(self.text(file)), strict=True)
        for row in reader:
            self.where = f"{file}, line {reader.line_num}"
            # A comma without quotes would shift every later column by one and still give a plausible answer.
            if None in row or None in row.values():
                raise ValueError(f"the row has not {len(reader.fieldnames)} cells as the header has")
            yield row


def letter(place: int, options: list) -> str:
    """The capital letter of the option at 0-based `place`. ValueError where there is none (-1 must not become Z)."""
    if not 0 <= place < len(options):
        raise ValueError(f"option number {place} (from 0) of {len(options)} options")
    return LETTERS[place]


def letter_of_text(answer: str, options: list[str]) -> str:
    """The letter of the first option that reads like `answer`. ValueError where none does."""
    texts = [option.strip() for option in options]
    if answer.strip() not in texts:
        raise ValueError(f"the answer {answer!r} is none of the options {options}")
    return LETTERS[texts.index(answer.strip())]


def without_letters(options: list[str], pattern: str) -> list[str]:
    """`["(A) a cup", ...]` to `["a cup", ...]`. ValueError where a letter is missing or out of order: `answer`, a
    letter too, would then point to another option than the one its annotator meant."""
    texts = []
    for place, option in enumerate(options):
        match = re.fullmatch(pattern, option.strip(), re.DOTALL)
        if not match or match[1] != letter(place, options):
            raise ValueError(f"option {option!r} does not begin with the letter {letter(place, options)}")
        texts.append(match[2])
    return texts


# ---- grounding: when does it happen? --------------------------------------------------------------------------------


def charades_sta(source: Source) -> Iterator[dict]:
    """Charades-STA (Gao et al. 2017): a line is `VID START END##SENTENCE`; Charades' own CSV knows the durations."""
    lengths = {row["id"]: row["length"] for row in source.csv_rows(f"Charades_v1_{source.split}.csv")}
    for number, line in source.lines(f"charades_sta_{source.split}.txt"):
        times, sentence = line.split("##", 1)
        video, start, end = times.split()
        length = lengths.get(video)
        yield {
            "id": f"{video}_{number}",
            "task": "grounding",
            "video": video + ".mp4",
            "question": sentence,
            "spans": [[float(start), float(end)]],
            "duration": float(length) if length else None,
        }


def videochat_r1_grounding(source: Source, file: str = "") -> Iterator[dict]:
    """VideoChat-R1's `charades_test.json`, `train.json`, `test.json`: `{VIDEO: {duration, timestamps, sentences}}`.

    Its ActivityNet `test.json` has a fourth key, `phrases`. It belongs to the other annotator's sentences: not used.
    """
    for video, record in source.each(source.load_json(file)):
        pairs = zip(record["timestamps"], record["sentences"], strict=True)
        for number, (span, sentence) in enumerate(pairs):
            yield {
                "id": f"{video}_{number}",
                "task": "grounding",
                "video": video + ".mp4",
                "question": sentence,
                "spans": [span],
                "duration": record.get("duration"),
            }


def activitynet_captions(source: Source) -> Iterator[dict]:
    """ActivityNet Captions (Krishna et al. 2017). `val_2` is what grounding papers call the test set."""
    yield from videochat_r1_grounding(source, f"{source.split}.json")


def qvhighlights(source: Source) -> Iterator[dict]:
    """QVHighlights (Lei et al. 2021), moment retrieval: `{qid, query, duration, vid, relevant_windows, ...}` a line.

    The videos are parts of longer ones and are named after them, `{youtube_id}_{start}_{end}.mp4`; windows count from the
    part's begin. `relevant_clip_ids` repeats them in steps of two seconds, `saliency_scores` belongs to another task.
    """
    for _, line in source.lines(f"highlight_{source.split}_release.jsonl"):
        row = json.loads(line)
        if row.get("relevant_windows") is None:
            raise ValueError("there is no 'relevant_windows': the test split is published without them, take val or train")
        yield {
            "id": row["qid"],
            "task": "moments",
            "video": row["vid"] + ".mp4",
            "question": row["query"],
            "spans": row["relevant_windows"],
            "duration": row.get("duration"),
        }


# ---- tracking: where is it? -----------------------------------------------------------------------------------------


def videochat_r1_tracking(source: Source) -> Iterator[dict]:
    """VideoChat-R1's `got_val.json`: `[{path, object, gt}]`, `gt` eight boxes already divided by width and height.

    No `frames`: the file does not say which of the sequence's frames its boxes belong to, and none of the obvious
    rules fits them. `got10k` below starts from the original annotation and knows.
    """
    for number, record in source.each(source.load_json()):
        # The path is absolute on its authors' disk; what GOT-10k itself defines is the end, `val/GOT-10k_Val_000010`.
        folder, sequence = PurePosixPath(record["path"]).parts[-2:]
        yield {
            "id": f"{sequence}_{number}",
            "task": "tracking",
            "video": f"{folder}/{sequence}",
            "question": record["object"],
            "boxes": record["gt"],
            "fps": GOT10K_FPS,
        }


def got10k(source: Source) -> Iterator[dict]:
    """GOT-10k (Huang et al. 2021) as distributed: `list.txt`, and a folder for each sequence.

    `groundtruth.txt`: a line `x,y,w,h` in pixels for each frame. The boxes written are (x0, y0, x1, y1) in fractions
    of the frame, cut to it: of its own picture, where that is there, for a few sequences change their size half way, else of
    the `resolution` in meta_info.ini. A sequence that shows its object in fewer than eight frames is left out, by name.
    """
    left_out = without_pictures = 0
    sequences = list(source.lines(f"{source.split}/list.txt"))
    for _, sequence in tqdm(sequences, desc="sequences", unit="sequence", disable=None):  # None: where nobody looks
        folder = f"{source.split}/{sequence}"
        rows, visible, meta = got10k_sequence(source, folder)
        if len(visible) < NUM_BOXES:
            left_out += 1
            tqdm.write(f"left out {printable(folder)}: {len(visible)} frames show the object, {NUM_BOXES} are needed")
            continue
        frames = spread(visible)
        width, height = (float(side) for side in re.findall(r"[\d.]+", meta["resolution"]))
        sizes = [picture_size(source.path / folder / f"{frame + 1:08d}.jpg") for frame in frames]
        without_pictures += None in sizes
        yield {
            "id": sequence,
            "task": "tracking",
            "video": folder,
            "question": meta["object_class"],
            "boxes": [fractions_of_frame(rows[frame], *(size or (width, height))) for frame, size in zip(frames, sizes)],
            "frames": frames,
            "fps": GOT10K_FPS,
        }
    print(f"left out {left_out} sequences")
    if without_pictures:
        print(f"{without_pictures} sequences have no pictures here: their boxes are fractions of meta_info.ini's resolution, "
              "wrong where a sequence changes its size")


def picture_size(file: Path) -> tuple[int, int] | None:
    """Width and height, None where no picture can be read."""
    try:
        with Image.open(file) as picture:
            return picture.size
    except OSError:
        return None


def got10k_sequence(source: Source, folder: str) -> tuple[list[str], list[int], dict[str, str]]:
    """A line of `groundtruth.txt` for each frame, the 0-based numbers of the frames that show the object, and the
    keys of `meta_info.ini`."""
    # The training split is 28,000 files: one hash for all of them, one after the other, instead of a line for each.
    together = f"{source.split}/*/{{groundtruth.txt, absence.label, meta_info.ini}}"
    rows = source.text(f"{folder}/groundtruth.txt", together).rstrip().split("\n")
    absent = [0] * len(rows)
    if (source.path / folder / "absence.label").is_file():
        absent = [int(flag) for flag in source.text(f"{folder}/absence.label", together).split()]
    meta = dict(re.findall(r"(?m)^[ \t]*(\w+)[ \t]*:[ \t]*(.*?)\s*$", source.text(f"{folder}/meta_info.ini", together)))
    source.where = folder
    if len(absent) != len(rows):
        raise ValueError(f"absence.label speaks of {len(absent)} frames, groundtruth.txt of {len(rows)}")
    return rows, [frame for frame, flag in enumerate(absent) if not flag], meta


def spread(visible: list[int]) -> list[int]:
    """Eight of the m >= 8 `visible` frames, the first and the last among them: positions round(k (m - 1) / 7)."""
    return [visible[round(k * (len(visible) - 1) / (NUM_BOXES - 1))] for k in range(NUM_BOXES)]  # a seventh is never a tie


def fractions_of_frame(row: str, width: float, height: float) -> list[float]:
    """`"x,y,w,h"` in pixels to [x0, y0, x1, y1] in [0, 1]."""
    x, y, w, h = (float(number) for number in row.split(","))
    corners = x / width, y / height, (x + w) / width, (y + h) / height
    # Without this test a nan would come out of min and max as a perfectly ordinary 0.
    if not all(math.isfinite(corner) for corner in corners):
        raise ValueError(f"the box {row.strip()!r} is not finite")
    return [min(max(corner, 0.0), 1.0) for corner in corners]


# ---- grounded questions: what, and when was it seen? ----------------------------------------------------------------


def videochat_r1_gqa(source: Source) -> Iterator[dict]:
    """VideoChat-R1's `nextgqa_test.json`: NExT-GQA with lettered options, `"(C)"` for an answer, windows in `glue`."""
    for _, record in source.each(source.load_json()):
        yield {
            "id": record["id"],
            "task": "gqa",
            "video": record["video"],
            "question": record["question"],
            "options": without_letters(record["options"], r"\(([A-Z])\)\s*(.*)"),
            "answer": record["answer"].strip().strip("()"),
            "spans": record["glue"],
            "duration": record.get("duration"),
            "category": record.get("type"),
        }


def nextgqa(source: Source) -> Iterator[dict]:
    """NExT-GQA (Xiao et al. 2024): questions in `S.csv`, windows and durations in `gsub_S.json`.

    Here `answer` is the option's text. Question 4 of video 3842638015 offers the right text twice and gets the letter
    of the first, although NExT-QA, which numbers its answers, means the second: 1 question of 5,553.
    """
    grounding = source.load_json(f"gsub_{source.split}.json")
    folders = source.load_json("map_vid_vidorID.json")
    for row in source.csv_rows(f"{source.split}.csv"):
        options = [row[f"a{place}"] for place in range(5)]
        truth = grounding[row["video_id"]]
        yield {
            "id": f"{row['video_id']}_{row['qid']}",
            "task": "gqa",
            "video": folders[row["video_id"]] + ".mp4",
            "question": row["question"],
            "options": options,
            "answer": letter_of_text(row["answer"], options),
            "spans": truth["location"][row["qid"]],
            "duration": truth.get("duration"),
            "category": row.get("type"),
        }


def rextime(source: Source) -> Iterator[dict]:
    """ReXTime (Chen et al. 2024), in the two shapes it is published in.

    Rows of the evaluation file have a `query`, windows and a letter, but no options: only the grounding can be asked. It
    has one answer: of several windows the first is the truth, and the row is named with those that are left out.
    Rows of the data set have `question`, `options` and one `span`.
    """
    for row in source.json_rows():
        sample = {"id": row["qid"], "video": row["vid"] + ".mp4", "duration": row.get("duration")}
        if "question" in row or "options" in row:
            truth = {"options": row["options"], "answer": row["ans"].strip(), "spans": [row["span"]]}
            yield sample | {"task": "gqa", "question": row["question"]} | truth
        else:
            first, *others = row["relevant_windows"]
            if others:
                tqdm.write(f"left out of {printable(source.where)}, qid {row['qid']!r}: windows {others} behind the first, {first}; "
                           "grounding has exactly one")
            yield sample | {"task": "grounding", "question": row["query"], "spans": [first]}


# ---- questions: which of these? -------------------------------------------------------------------------------------


def nextqa(source: Source) -> Iterator[dict]:
    """NExT-QA (Xiao et al. 2021): a CSV row a question, `answer` the number of the option from 0."""
    mapped = (source.path / "map_vid_vidorID.json").is_file()
    folders = source.load_json("map_vid_vidorID.json") if mapped else {}
    for row in source.csv_rows(f"{source.split}.csv"):
        options = [row[f"a{place}"] for place in range(5)]
        yield {
            "id": f"{row['video']}_{row['qid']}",
            "task": "qa",
            "video": (folders[row["video"]] if mapped else row["video"]) + ".mp4",
            "question": row["question"],
            "options": options,
            "answer": letter(int(row["answer"]), options),
            "category": row.get("type"),
        }


def mvbench(source: Source) -> Iterator[dict]:
    """MVBench (Li et al. 2024): `TASK.json`, a list of `{video, question, candidates, answer}`; one file or the folder.

    Five tasks ask about a part of the file only, from `start` to `end` in seconds: both are passed on.
    """
    is_folder = source.path.is_dir()
    tasks = [task for task in sorted(MVBENCH_FOLDERS) if (source.path / f"{task}.json").is_file()]
    tasks = tasks if is_folder else [source.path.stem]
    if not tasks or tasks[0] not in MVBENCH_FOLDERS:
        raise ValueError(f"neither a folder with task files nor one of them: {', '.join(sorted(MVBENCH_FOLDERS))}")
    for task in tasks:
        for number, record in source.each(source.load_json(f"{task}.json" if is_folder else "")):
            yield {
                "id": f"{task}_{number}",
                "task": "qa",
                "video": f"{MVBENCH_FOLDERS[task]}/" + record["video"],
                "question": record["question"],
                "options": record["candidates"],
                "answer": letter_of_text(record["answer"], record["candidates"]),
                "fps": TVQA_FPS if task == "episodic_reasoning" else None,
                "start": record.get("start"),
                "end": record.get("end"),
                "category": task,
            }
    print(f"read {len(tasks)} of the {len(MVBENCH_FOLDERS)} tasks")


def videomme(source: Source) -> Iterator[dict]:
    """Video-MME (Fu et al. 2024): one row of the parquet file a line. Its `duration` is a class, never seconds."""
    for row in source.json_rows():
        yield {
            "id": row["question_id"],
            "task": "qa",
            "video": row["videoID"] + ".mp4",
            "question": row["question"],
            "options": without_letters(row["options"], r"([A-Z])\s*\.\s*(.*)"),
            "answer": row["answer"].strip(),
            "category": row.get("duration"),
            "domain": row.get("domain"),
            "task_type": row.get("task_type"),
        }


def tempcompass(source: Source) -> Iterator[dict]:
    """TempCompass (Liu et al. 2024): `{VIDEO: {DIMENSION: [{question, answer}]}}`.

    In `multi-choice.json` the options are lines of the question's text. In `yes_no.json` the answer is a word, which
    becomes a choice between two options, so that both files are scored in the same way.
    """
    for video, dimensions in source.each(source.load_json(f"{source.split}.json")):
        for dimension, records in source.each(dimensions):
            for number, record in source.each(records):
                if source.split == "yes_no":
                    question, options = record["question"], ["yes", "no"]
                    answer = letter_of_text(record["answer"].lower(), options)
                else:
                    question, letters, options = split_options(record["question"])
                    # By place and not by name, should a list ever skip a letter. Named twice, it points nowhere.
                    if letters.count(record["answer"].strip()[:1]) != 1:
                        raise ValueError(f"the answer {record['answer']!r} does not begin with one of {letters}")
                    answer = letter(letters.index(record["answer"].strip()[0]), options)
                yield {
                    "id": f"{video}_{dimension}_{number}",
                    "task": "qa",
                    "video": video + ".mp4",
                    "question": question,
                    "options": options,
                    "answer": answer,
                    "category": dimension,
                }


def split_options(text: str) -> tuple[str, list[str], list[str]]:
    """Question, letters and texts of its options: a line that begins with a capital and a full stop opens an option.

    >>> split_options("Where to?\\nA. left\\n B. right\\nC.Both")
    ('Where to?\\n', ['A', 'B', 'C'], ['left\\n', 'right\\n', 'Both'])
    """
    question, *rest = re.split(r"(?m)^\s*([A-Z])\s*\.\s*", text)
    return question, rest[0::2], rest[1::2]


def perception_test(source: Source) -> Iterator[dict]:
    """Perception Test (Patraucean et al. 2023), multiple choice: `{VIDEO: {metadata, mc_question: [...]}}`.

    The cup games end by lifting the cup. `cut_frame_mapping_S.json` says at which frame to stop looking (-1: nowhere).
    """
    cut_file = f"cut_frame_mapping_{source.split}.json"
    cuts = source.load_json(cut_file) if (source.path / cut_file).is_file() else {}
    for video, record in source.each(source.load_json(f"mc_question_{source.split}.json")):
        frame_rate = record["metadata"]["frame_rate"]
        duration = record["metadata"]["num_frames"] / frame_rate
        cut = cuts.get(video, -1)
        for _, question in source.each(record["mc_question"]):
            yield {
                "id": f"{video}_{question['id']}",
                "task": "qa",
                "video": video + ".mp4",
                "question": question["question"],
                "options": question["options"],
                "answer": letter(question["answer_id"], question["options"]),
                "duration": duration,
                "start": 0.0 if cut > 0 else None,
                "end": cut / frame_rate if cut > 0 else None,
                "category": question.get("area"),
                "reasoning": question.get("reasoning"),
            }


# ---- labels: how good is it? ----------------------------------------------------------------------------------------


def videochat_r1_quality(source: Source) -> Iterator[dict]:
    """VideoChat-R1's `Quality_Access_*.json`: `[{video, instruction, answer}]`; the instruction quotes the labels."""
    for number, record in source.each(source.load_json()):
        quoted = re.search(r"\[\s*['\"].*?['\"]\s*\]", record["instruction"])
        if not quoted:
            raise ValueError(f"the instruction {record['instruction']!r} quotes no list of labels")
        yield {
            "id": f"{record['video']}_{number}",
            "task": "classification",
            "video": record["video"],
            "question": record["instruction"],
            "options": ast.literal_eval(quoted[0]),
            "answer": record["answer"].strip(),
        }


def videoeval_quality(source: Source) -> Iterator[dict]:
    """VideoEval's Quality Access (Li et al. 2024): a line is `FILE 0` (low) or `FILE 1` (high)."""
    for number, line in source.lines():
        video, label = line.rsplit(maxsplit=1)
        if label not in QUALITY_LABELS:
            raise ValueError(f"the label is {label!r}")
        yield {
            "id": f"{video}_{number}",
            "task": "classification",
            "video": video,
            "question": QUALITY_QUESTION,
            "options": list(QUALITY_LABELS.values()),
            "answer": QUALITY_LABELS[label],
        }


# ---- all together ---------------------------------------------------------------------------------------------------

# ---- any multiple-choice questions, with pictures, with videos or without -----------------------------------------------


def multiple_choice(source: Source) -> Iterator[dict]:
    """Questions in the forms in which most sets of them come: an object a line, or a `.json` list.

    `question` (or `query`); `options`, `choices` or `candidates` as a list, as {"A": ...} or as columns A, B, C, ...; `answer`
    (or `label`) as a letter, as the number of an option from 0, or as its text; where there is something to see, `image`,
    `images` or `image_path` (one or a list), or `video` or `video_path`; `category` or `subject`; `id`, else the line's number.
    """
    for number, row in enumerate(source.json_rows()):
        options = options_of(row)
        seen = {"image": first_of(row, "image", "images", "image_path"), "video": first_of(row, "video", "video_path")}
        yield {
            "id": row.get("id", f"{source.path.stem}-{number}"),
            "task": "qa",
            **{key: path for key, path in seen.items() if path is not None},
            "question": row["question"] if "question" in row else row["query"],
            "options": options,
            "answer": letter_of(row["answer"] if "answer" in row else row["label"], options),
            "category": first_of(row, "category", "subject"),
        }


def first_of(row: dict, *keys: str) -> object:
    """What stands under the first key that is there and not empty; None if there is none."""
    return next((row[key] for key in keys if row.get(key) not in (None, "", [])), None)


def options_of(row: dict) -> list[str]:
    """In the order of their letters, as texts: numbers are options, too."""
    given = first_of(row, "options", "choices", "candidates")
    if isinstance(given, str):  # a list that was written into a cell
        given = ast.literal_eval(given)
    given = {key: row[key] for key in LETTERS if row.get(key) not in (None, "")} if given is None else given
    if isinstance(given, dict):
        if not given or sorted(given) != list(LETTERS[:len(given)]):
            raise ValueError(f"the options are under {', '.join(map(str, given)) or 'no letter'}; they must be A, B, C, ...")
        given = [given[key] for key in sorted(given)]
    return [str(option) for option in given]


def letter_of(answer: object, options: list[str]) -> str:
    """The letter of an answer in any of its forms. ValueError where two of them mean two options: nobody knows which."""
    if type(answer) is int:
        return letter(answer, options)
    said = str(answer).strip()
    found = {letter_of_text(said, options)} if said in [option.strip() for option in options] else set()
    if match := re.fullmatch(r"\(?([A-Z])[).:]?", said):
        found.add(letter(LETTERS.index(match[1]), options))
    if not found and said.isdecimal():
        found.add(letter(int(said), options))
    if len(found) != 1:
        raise ValueError(f"the answer {answer!r} names {'two' if found else 'none'} of the options {options}")
    return found.pop()


# name: (generator, splits with the default first, what a record looks like: an error message ends with it)
FORMATS = {
    "charades_sta": (charades_sta, ("test", "train"), "VID START END##SENTENCE, and a CSV with `id` and `length`"),
    "activitynet_captions": (
        activitynet_captions,
        ("val_2", "val_1", "train"),
        "{VIDEO: {duration, timestamps: [[s, e], ...], sentences: [...]}}",
    ),
    "videochat_r1_grounding": (
        videochat_r1_grounding,
        (),
        "{VIDEO: {duration, timestamps: [[s, e], ...], sentences: [...]}}",
    ),
    "qvhighlights": (qvhighlights, ("val", "train", "test"), "{qid, query, duration, vid, relevant_windows: [[s, e], ...]}"),
    "videochat_r1_tracking": (videochat_r1_tracking, (), "[{path, object, gt: 8 boxes [x0, y0, x1, y1]}]"),
    "got10k": (
        got10k,
        ("val", "train"),
        "x,y,w,h in groundtruth.txt, 0 or 1 in absence.label, object_class and resolution in meta_info.ini",
    ),
    "videochat_r1_gqa": (
        videochat_r1_gqa,
        (),
        '[{id, video, question, options: ["(A) ...", ...], duration, glue: [[s, e], ...], answer: "(C)"}]',
    ),
    "nextgqa": (
        nextgqa,
        ("test", "val"),
        "video_id, question, answer, qid, type, a0 ... a4, with its video in gsub_S.json and map_vid_vidorID.json",
    ),
    "nextqa": (nextqa, ("test", "val", "train"), "video, question, answer (0 ... 4), qid, type, a0 ... a4"),
    "videochat_r1_quality": (videochat_r1_quality, (), "[{video, instruction: \"... ['a', 'b'] ...\", answer}]"),
    "videoeval_quality": (videoeval_quality, (), "FILE 0 or FILE 1"),
    "mvbench": (mvbench, (), "[{video, question, candidates: [...], answer: one of them}]"),
    "videomme": (videomme, (), '{videoID, question_id, question, options: ["A. ...", ...], answer: "C"}'),
    "tempcompass": (
        tempcompass,
        ("multi-choice", "yes_no"),
        '{VIDEO: {DIMENSION: [{question: "...\\nA. ...\\nB. ...", answer: "B. ..." (or "yes", "no")}]}}',
    ),
    "rextime": (
        rextime,
        (),
        "{qid, vid, duration, query, relevant_windows, ans} or {qid, vid, duration, question, options, span, ans}",
    ),
    "perception_test": (
        perception_test,
        ("valid", "train"),
        "{VIDEO: {metadata: {frame_rate, num_frames}, mc_question: [{id, question, options, answer_id}]}}",
    ),
    "multiple_choice": (multiple_choice, (), '{question, options: [...], answer: a letter, a number from 0 or a text, image: PATH}'),
}

# What a record of another form than the announced one raises when a generator takes it at its word.
MALFORMED = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, SyntaxError, csv.Error)


def convert(name: str, src: Path, out: Path, split: str | None = None) -> int:
    """Write the annotations `src` of the format `name` to `out`, one sample a line, and return how many there are.

    Prints what was left out, a sha256 of what was read, how many oddities were passed on, each sample that training
    will refuse (an empty annotation) and why, and the number of samples last. ValueError for an unknown name or split,
    and for a record of another form than announced (named with its file); OSError for a file that cannot be read or
    written. In both cases `out` stays as it was.
    """
    if name not in FORMATS:
        raise ValueError(f"unknown annotation format {name!r}, take one of: {', '.join(FORMATS)}")
    generator, splits, form = FORMATS[name]
    if split is not None and split not in splits:
        raise ValueError(f"{name} has no split {split!r}, take {' or '.join(splits) or 'none: give the file itself'}")
    src, out = Path(src), Path(out)
    if src.resolve() == out.resolve():
        raise ValueError(f"{name}: {out} is the annotation file itself, give the samples another name")
    source = Source(src, split or "".join(splits[:1]), where=str(src))
    samples, lines = {}, []
    try:
        for record in generator(source):
            sample = checked(record)
            if sample["id"] in samples:
                raise ValueError(f"the id {sample['id']!r} has been given to an earlier record")
            samples[sample["id"]] = sample
            lines.append(json.dumps(sample, ensure_ascii=False, allow_nan=False).encode() + b"\n")
    except OSError as error:
        kind = f"--src is a folder, --split {' or '.join(splits)}, files" if splits else "--src is a file"
        raise type(error)(f"{name}: {error.filename}: {error.strerror}. Expected: {kind} with {form}") from error
    except MALFORMED as error:
        problem = f"there is no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{name}: {source.where}: {problem}. Expected: {form}") from error
    for file, digest in source.digests.items():
        print(f"sha256 {digest.hexdigest()}  {file}")
    for oddity, count in oddities(samples.values()).items():
        print(f"passed on as annotated: {count} {oddity}")
    with write_whole(out) as partial:
        partial.write_bytes(b"".join(lines))
    for line in unloadable(samples.values(), out):
        print(line)
    print(f"wrote {len(lines)} samples to {out}")
    return len(lines)


def checked(record: dict) -> dict:
    """The sample that a generator has put together, without its empty keys, texts stripped, seconds as floats.

    ValueError where it is none. The generators take records at their word; this is where the word is checked, once
    for all of them, because a sample that is wrong in form would only be noticed hours later, as a reward of 0.
    """
    sample = {key: value for key, value in record.items() if value is not None}
    sample["id"], sample["question"] = str(sample["id"]), sample["question"].strip()
    for key in {"duration", "start", "end"} & sample.keys():
        sample[key] = seconds(sample[key])
    if "spans" in sample:
        sample["spans"] = [[seconds(start), seconds(end)] for start, end in sample["spans"]]
    # A generator that speaks of a video has to have one: without it the sample would be text only.
    # Spans may be none at all: such a sample is written and named.
    for key in [*({"video", "image"} & record.keys()), *needed_fields(sample)]:
        if key != "spans" and (problem := field_problem(sample, key)):
            raise ValueError(problem)
    if "options" in sample:
        sample["options"] = [option.strip() for option in sample["options"]]
        # Scoring forgives other capitals. An annotation that does not spell its own label is a broken one all the same.
        if sample["task"] == "classification" and sample["answer"] not in sample["options"]:
            raise ValueError(f"the answer {sample['answer']!r} is none of {sample['options']}")
    return sample


def seconds(value: object) -> float:
    if not is_number(value):
        raise ValueError(f"{value!r} is no number of seconds")
    return float(value)


def oddities(samples: Iterable[dict]) -> dict[str, int]:
    """How often the annotation itself looks wrong. Nothing is done about it, but it should not pass unseen."""
    counts = Counter()
    for sample in samples:
        for start, end in sample.get("spans", []):
            counts["reversed spans"] += end < start
            counts["zero-length spans"] += end == start
            counts["spans with a negative time"] += min(start, end) < 0
            counts["spans beyond the end of the video"] += max(start, end) > sample.get("duration", math.inf)
        counts["samples without a span"] += sample.get("spans") == [] and sample.get("task") != "moments"
        counts["samples with spans but no duration"] += "spans" in sample and "duration" not in sample
        counts["boxes without area"] += sum(x1 <= x0 or y1 <= y0 for x0, y0, x1, y1 in sample.get("boxes", []))
        counts["empty questions"] += not sample["question"]
        options = sample.get("options", [])
        counts["questions with two equal options"] += len(set(options)) < len(options)
    return {oddity: count for oddity, count in counts.items() if count}


def unloadable(samples: Iterable[dict], out: Path) -> list[str]:
    """A line for each sample that `load_samples` will refuse, because something in it is empty, and what to do."""
    problems = [f"{out}:{number}: cannot be loaded: {problem}" for number, sample in enumerate(samples, start=1)
                if (problem := find_problem(sample))]
    remedy = f"training refuses a file with such lines; `python data.py check {out}` sets {len(problems)} of them apart"
    return problems + [remedy] * bool(problems)
