"""What the converters must do with published annotation files: invented miniatures of every format, warts included."""

import doctest
import hashlib
import json
import math
import re
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from video_files import pictures, write_folder

import tools.convert
from lib.samples import load_samples
from tools.check import check
from tools.convert import FORMATS, MVBENCH_FOLDERS, convert, oddities, split_options, spread, without_letters


def put(folder, files):
    """Write `{name: text, bytes or JSON value}` below `folder`, which is returned."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not isinstance(content, bytes):
            content = (content if isinstance(content, str) else json.dumps(content)).encode()
        path.write_bytes(content)
    return folder


def converted(name, src, tmp_path, split=None):
    """The samples that `convert` writes, read back from the file; the number it returns must be theirs."""
    out = tmp_path / "samples.jsonl"
    count = convert(name, src, out, split)
    samples = [json.loads(line) for line in out.read_text(encoding="utf-8").split("\n") if line]
    assert len(samples) == count
    return samples


def jsonl(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def only(samples, *keys):
    return [tuple(sample.get(key) for key in keys) for sample in samples]


# ---- one miniature for each format ----------------------------------------------------------------------------------

CHARADES_CSV = (
    "id,subject,scene,quality,relevance,verified,script,objects,descriptions,actions,length\n"
    'AB1CD,x,x,x,x,x,"Says ""hello, you"" and\nleaves.",x,"One, two.",x,31.25\n'
    "ZZ9ZZ,x,x,x,x,x,plain,x,plain,x,12\n"
    "EMPTY,x,x,x,x,x,plain,x,plain,x,\n"
)
CHARADES = {
    "charades_sta_test.txt": "ZZ9ZZ 4.4 9.2## a person sits down.\n"
    "AB1CD 20 10.5##person reads ## a sign \n"
    "ZZ9ZZ 0.0 12.7##Person leaves",  # no line break at the end
    "Charades_v1_test.csv": CHARADES_CSV,
    "charades_sta_train.txt": "ZZ9ZZ 3 5##sneezes\nEMPTY 1.0 1.0##waits\n\n\n",
    "Charades_v1_train.csv": CHARADES_CSV.replace(",12\n", ",13.5\n"),
}
DESCRIBED = {
    "v_b": {
        "duration": 30,
        "timestamps": [[0, 4.14], [9.5, 3.25], [7, 7]],
        "sentences": ["A dog runs.", " It  stops. ", "\nIt is\nwet"],
        "phrases": ["belongs", "elsewhere"],
    },
    "v_empty": {"duration": 12.5, "timestamps": [], "sentences": []},
    "v_a": {"duration": 8.0, "timestamps": [[-0.5, 9]], "sentences": ["Ünïcode \u2028 line"]},
}
QVHIGHLIGHTS = [
    {"qid": 12, "query": " A cook stirs a pot. ", "duration": 150, "vid": "aB-_c9xYz01_60.0_210.0",
     "relevant_windows": [[0, 16], [90, 152]], "relevant_clip_ids": [0, 1], "saliency_scores": [[4, 1, 1], [2, 2, 3]]},
    {"qid": 13, "query": "Hände\u2028waschen", "duration": 126, "vid": "a_b_c_d_e_f_660.0_810.0",
     "relevant_windows": [[82, 126]], "relevant_clip_ids": [41], "saliency_scores": [[4, 4, 4]]},
]
EIGHT = [[0.1, 0.2, 0.3, 0.4]] * 7 + [[0, 0, 1, 1]]
TRACKING = [
    {"path": "/disk/of/the/authors/GOT-10k/val/GOT-10k_Val_000777", "object": " kite ", "gt": EIGHT},
    {"path": "GOT-10k/train/GOT-10k_Train_000001/", "object": "owl", "gt": EIGHT[::-1]},
]
GQA = [
    {
        "id": "77_3",
        "video": "0001/77.mp4",
        "question": " why did he wave ",
        "options": ["(A) (B) was tempting", "(B)nothing before it", "(C)  to greet. ", "(D) say\nbye", "(E) A. Milne"],
        "duration": 30,
        "glue": [[3.5, 9], [-0.1, 2], [25, 31.5]],
        "type": "CW",
        "answer": "(C)",
    },
]
NEXT_HEADER = "frame_count,width,height,question,answer,qid,type,a0,a1,a2,a3,a4\n"
NEXTGQA = {
    "test.csv": "video_id,"
    + NEXT_HEADER
    + '88,9,9,9,"why, do you think,\nis he happy",wins,4,CW,loses,"a, b",wins ,wins,sleeps\n'
    + "77,9,9,9,how,rests,0,CH,rests,b,c,d,e\n",
    "gsub_test.json": {
        "77": {"duration": 30, "location": {"0": [[1.5, 4.0], [6, 7]]}, "fps": 29.97},
        "88": {"duration": 41, "location": {"4": [[0, 42]], "5": [[1, 2]]}, "fps": 25.0},
        "99": {"duration": 5, "location": {}, "fps": 25.0},
    },
    "map_vid_vidorID.json": {"77": "0001/77", "88": "0002/88"},
}
NEXTQA = {
    "test.csv": "video," + NEXT_HEADER + "55,9,9,9,what,4,6,DO,a,b,c,d,e\n" + '66,9,9,9,"""who""?",0,1,DC,1,2,3,4,5\n',
}
QUALITY = [
    {"video": "0001.mp4", "instruction": "Rate [now]. One of ['bad', \"so-so, it's\"]. ", "answer": "so-so, it's"},
    {"video": "0001.mp4", "instruction": "Rate it: ['bad', 'good'].", "answer": "bad"},
]
MVBENCH = {
    "state_change.json": [
        {"video": "v 1.mp4", "question": "What now?", "candidates": ["ice ", "water", "ice"], "answer": "ice"},
    ],
    "episodic_reasoning.json": [
        {"video": "show_s01/clip", "question": "Y", "candidates": ["A", "B."], "answer": "B.", "start": 0, "end": 7.1},
    ],
    "action_antonym.json": [
        {"video": "5.webm", "question": "Which?", "candidates": ["up", "down"], "answer": "down"},
        {"video": "5.webm", "question": "Which?", "candidates": ["up", "down"], "answer": "up"},
    ],
    "README.json": ["something else"],
}
VIDEOMME = [
    {
        "video_id": "001",
        "duration": "short",
        "domain": "Art",
        "sub_category": "x",
        "url": "x",
        "videoID": "aB-_9",
        "question_id": "001-1",
        "task_type": "Counting Problem",
        "question": "How many?\n",
        "options": ["A. B. B. King", "B. 2.", "C.Three\u2028or so", "D. "],
        "answer": "B",
    },
    {"duration": "long", "videoID": "c", "question_id": "002-1", "question": "q", "options": ["A. x"], "answer": "A"},
]
TEMPCOMPASS = {
    "multi-choice.json": {
        "12_reverse": {
            "order": [
                {"question": "Which is first?\nA. jump\nB. sit\nC.Both events", "answer": "C.Both events"},
                {"question": "Which\nway? \n A. up\n B . down \nC. U.S. way\n D. away", "answer": " D. away"},
            ],
            "speed": [{"question": "How fast?\r\nA. slow\r\nB.\r\nC. fast", "answer": "A. slow"}],
        },
        "13": {},
        "14": {"action": []},
    },
    "yes_no.json": {"12": {"action": [{"question": "Is it?", "answer": "no"}, {"question": "Or?", "answer": "yes"}]}},
}
REXTIME_ROWS = [
    {"qid": "q1", "query": "When? ", "duration": 150, "vid": "v_1", "relevant_windows": [[0, 28], [3, 4]], "ans": "A"},
]
REXTIME_SET = [
    {
        "qid": "q2",
        "source": "x",
        "vid": "v_2_0.0_150.0",
        "duration": 99.5,
        "question": "Why?",
        "options": ["a", "b", " c", "d"],
        "answer": "From <s0> to <e0>, <option>.",
        "span": [5, 8.5],
        "ans": "C",
    },
]
PERCEPTION = {
    "mc_question_valid.json": {
        "video_7": {
            "metadata": {"frame_rate": 29.97, "num_frames": 600},
            "mc_question": [
                {"id": 5, "question": "q", "options": ["1", "2", "3"], "answer_id": 2, "area": "physics"},
                {"id": 9, "question": "q", "options": ["1", "2", "3"], "answer_id": 0, "reasoning": "predictive"},
            ],
        },
        "video_8": {
            "metadata": {"frame_rate": 30.0, "num_frames": 45},
            "mc_question": [{"id": 5, "question": "q", "options": ["x", "y", "z"], "answer_id": 1}],
        },
        "video_9": {"metadata": {"frame_rate": 30.0, "num_frames": 45}, "mc_question": []},
    },
}
CUTS = {"cut_frame_mapping_valid.json": {"video_7": 450, "video_8": -1}}


def got10k_files(rows, absent=None, name="GOT-10k_Val_000001", resolution="(200, 100)"):
    files = {
        f"val/{name}/groundtruth.txt": "".join(f"{row}\n" for row in rows),
        f"val/{name}/meta_info.ini": "[METAINFO]\nurl: https://x.org/a=b\nbegin:\nobject_class: toy car\n"
        f"anno_fps: 10Hz\nresolution: {resolution}",
    }
    if absent is not None:
        files[f"val/{name}/absence.label"] = "".join(f"{flag}\n" for flag in absent)
    return files


GOT10K = {"val/list.txt": "GOT-10k_Val_000001\n", **got10k_files([f"{i},20,40,10" for i in range(8)])}

# name: (files, what --src is inside their folder, number of samples)
CHOICES = [
    {"question": "Which?", "choices": ["cat", "dog"], "answer": 1},
    {"question": "Which?", "options": {"B": "dog", "A": "cat"}, "answer": "(B)", "image": "a.png", "subject": "animals"},
    {"id": 7, "question": "Which?", "options": "['cat', 'dog']", "answer": "dog", "images": ["a.png", "b.png"]},
    {"query": "How many?", "options": [1, 2], "label": "1", "image_path": "c.jpg"},
    {"question": "Which?", "A": "cat", "B": "dog", "C": None, "answer": "B"},
    {"question": "Which?", "candidates": ["cat", "dog"], "answer": "0", "video_path": "v.mp4"},
]
MINIATURES = {
    "charades_sta": (CHARADES, "", 3),
    "activitynet_captions": ({"val_2.json": DESCRIBED}, "", 4),
    "videochat_r1_grounding": ({"test.json": DESCRIBED}, "test.json", 4),
    "qvhighlights": ({"highlight_val_release.jsonl": jsonl(QVHIGHLIGHTS)}, "", 2),
    "videochat_r1_tracking": ({"got_val.json": TRACKING}, "got_val.json", 2),
    "got10k": (GOT10K, "", 1),
    "videochat_r1_gqa": ({"nextgqa_val.json": GQA}, "nextgqa_val.json", 1),
    "nextgqa": (NEXTGQA, "", 2),
    "nextqa": (NEXTQA, "", 2),
    "videochat_r1_quality": ({"Quality.json": QUALITY}, "Quality.json", 2),
    "videoeval_quality": ({"test.txt": "0001.mp4 0\nname with blanks.mp4 1\n"}, "test.txt", 2),
    "mvbench": (MVBENCH, "", 4),
    "videomme": ({"v.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in VIDEOMME)}, "v.jsonl", 2),
    "tempcompass": (TEMPCOMPASS, "", 3),
    "rextime": ({"rextime_val.json": REXTIME_ROWS + REXTIME_SET}, "rextime_val.json", 2),
    "perception_test": (PERCEPTION, "", 3),
    "multiple_choice": ({"any.jsonl": "".join(json.dumps(row) + "\n" for row in CHOICES)}, "any.jsonl", 6),
}


@pytest.mark.parametrize("row, said", [
    ({"options": ["a", "b"], "answer": 2}, "option number 2"), ({"options": ["a", "b"], "answer": "c"}, "names none"),
    ({"options": ["B", "A"], "answer": "A"}, "names two"), ({"answer": "A"}, "no letter"),
    ({"A": "a", "C": "b", "answer": "A"}, "A, C; they must be A, B, C"), ({"options": ["a", "b"]}, "there is no 'label'"),
    ({"options": ["a", "b"], "answer": "A", "image": ["x", 3]}, "'image'"),
])
def test_a_question_whose_answer_may_mean_two_options_is_refused(tmp_path, row, said):
    (tmp_path / "x.jsonl").write_text(json.dumps({"question": "?", **row}))
    with pytest.raises(ValueError, match=said):
        convert("multiple_choice", tmp_path / "x.jsonl", tmp_path / "out.jsonl")


def test_multiple_choice_reads_the_forms_that_are_common(tmp_path):
    samples = converted("multiple_choice", put(tmp_path / "in", MINIATURES["multiple_choice"][0]) / "any.jsonl", tmp_path)
    assert [sample["answer"] for sample in samples] == list("BBBABA")
    assert [sample.get("image") for sample in samples] == [None, "a.png", ["a.png", "b.png"], "c.jpg", None, None]
    assert samples[3]["options"] == ["1", "2"] and samples[5]["video"] == "v.mp4" and samples[0]["id"] == "any-0"


def test_there_is_a_miniature_of_every_format():
    """A format without one would pass every test below by not being looked at."""
    assert set(MINIATURES) == set(FORMATS) and len(FORMATS) == 17


# ---- what every format promises -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MINIATURES)
def test_every_annotation_becomes_a_sample_and_the_last_line_counts_them(name, tmp_path, capsys):
    """A converter that drops what it does not like changes the denominator of every published metric."""
    files, src, count = MINIATURES[name]
    samples = converted(name, put(tmp_path / "in", files) / src, tmp_path)
    assert len(samples) == count
    last_line = capsys.readouterr().out.rstrip("\n").split("\n")[-1]
    assert last_line == f"wrote {count} samples to {tmp_path / 'samples.jsonl'}"


@pytest.mark.parametrize("name", MINIATURES)
def test_samples_have_the_promised_fields_and_no_empty_ones(name, tmp_path):
    """`"duration": null` or a duration that is a word crashes the evaluation hours later, far from the cause."""
    files, src, _ = MINIATURES[name]
    samples = converted(name, put(tmp_path / "in", files) / src, tmp_path)
    truth = {"grounding": {"spans"}, "qa": {"options", "answer"}, "gqa": {"options", "answer", "spans"}}
    truth |= {"moments": {"spans"}, "tracking": {"boxes"}, "classification": {"options", "answer"}}
    texts = {"id", "task", "video", "question", "answer", "category", "domain", "task_type", "reasoning"}
    numbers = {"duration", "start", "end", "fps"}
    for sample in samples:
        needed = {"id", "task", "question"} | truth[sample["task"]] | ({"video"} if name != "multiple_choice" else set())
        assert needed <= sample.keys() <= needed | texts | numbers | {"frames", "image"}
        assert all(type(sample[key]) is str for key in texts & sample.keys())
        assert all(type(sample[key]) is float for key in numbers & sample.keys())
        assert all(text == text.strip() for text in [sample["question"], *sample.get("options", [])])
        if sample["task"] in ("qa", "gqa"):
            assert sample["answer"] in list("ABCDEFGH"[: len(sample["options"])])
    assert len({sample["id"] for sample in samples}) == len(samples)


@pytest.mark.parametrize("name", MINIATURES)
def test_a_byte_order_mark_and_windows_line_ends_change_nothing(name, tmp_path):
    """With a byte order mark the first CSV column is called `\\ufeffid`; with CRLF a sentence ends in `\\r`."""
    files, src, _ = MINIATURES[name]
    plain = converted(name, put(tmp_path / "in", files) / src, tmp_path)
    for path in (tmp_path / "in").rglob("*"):
        if path.is_file():
            path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    samples = json.dumps(converted(name, tmp_path / "in" / src, tmp_path))
    # Inside a quoted cell a line break is text and stays as it is.
    assert json.loads(samples.replace("\\r\\n", "\\n")) == plain


def paths(value, path=()):
    """The path to everything inside nested dicts and lists."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*path, key)
        yield from paths(inner, (*path, key))


NEEDED_KEYS = {
    "activitynet_captions": {"timestamps", "sentences"},
    "videochat_r1_grounding": {"timestamps", "sentences"},
    "videochat_r1_tracking": {"path", "object", "gt"},
    "videochat_r1_gqa": {"id", "video", "question", "options", "glue", "answer"},
    "videochat_r1_quality": {"video", "instruction", "answer"},
    "mvbench": {"video", "question", "candidates", "answer"},
    "tempcompass": {"question", "answer"},
    "rextime": {"qid", "vid", "query", "relevant_windows", "options", "span"},
    "perception_test": {"metadata", "frame_rate", "num_frames", "mc_question", "id", "options", "answer_id"},
}


@pytest.mark.parametrize("name", NEEDED_KEYS)
def test_a_missing_key_is_named_with_its_file_and_nothing_is_written(name, tmp_path):
    """Every needed key of every record, taken away one at a time: never a sample with a hole, never a bare KeyError."""
    files, src, _ = MINIATURES[name]
    tried = set()
    for file, content in files.items():
        for path in paths(content):
            if path[-1] not in NEEDED_KEYS[name] or file == "yes_no.json":
                continue
            holder = broken = json.loads(json.dumps(content))
            for key in path[:-1]:
                holder = holder[key]
            del holder[path[-1]]
            with pytest.raises(ValueError, match=f"^{name}: ") as caught:
                convert(name, put(tmp_path / "in", files | {file: broken}) / src, tmp_path / "out" / "x.jsonl")
            assert f"{file}[{path[0]!r}]" in str(caught.value) and f"there is no {path[-1]!r}" in str(caught.value)
            tried.add(path[-1])
    assert tried == NEEDED_KEYS[name] and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", NEEDED_KEYS)
def test_any_value_in_any_place_converts_or_is_a_value_error(name, tmp_path):
    """A list for a text, a number for an object: no TypeError or ZeroDivisionError may escape, and what is written
    must be JSON that reads back."""
    files, src, _ = MINIATURES[name]
    folder, refused = put(tmp_path / "in", files), 0
    for file, content in files.items():
        for path in paths(content):
            if len(path) > 4 or path[-1] == 1:  # the second of a list shows nothing that the first does not
                continue
            for odd in (None, -1.5, "\ud83d", [[]], {"x": [0, 1]}, 10**400):
                holder = changed = json.loads(json.dumps(content))
                for key in path[:-1]:
                    holder = holder[key]
                holder[path[-1]] = odd
                put(folder, {file: changed})
                try:
                    converted(name, folder / src, tmp_path)
                except ValueError as error:
                    assert str(error).startswith(f"{name}: ")
                    refused += 1
        put(folder, {file: content})
    assert refused > 20


@pytest.mark.parametrize("column", ["id", "length"])
def test_a_charades_csv_without_its_columns_is_refused(column, tmp_path):
    """Without this the durations of the whole set would be missing, and nobody would notice."""
    files = CHARADES | {"Charades_v1_test.csv": CHARADES_CSV.replace(column, "other", 1)}
    with pytest.raises(ValueError, match=f"charades_sta: Charades_v1_test.csv, line 3: there is no '{column}'"):
        convert("charades_sta", put(tmp_path / "in", files), tmp_path / "x.jsonl")


def described(timestamps, sentences):
    return {"val_2.json": {"v": {"duration": 9, "timestamps": timestamps, "sentences": sentences}}}


def tracking(**change):
    return {"got_val.json": [TRACKING[0] | change]}


def gqa(**change):
    return {"nextgqa_val.json": [GQA[0] | change]}


def nextqa(row):
    return {"test.csv": NEXTQA["test.csv"] + row}


def nextgqa(row):
    return {"test.csv": "video_id," + NEXT_HEADER + row}


def quality(**change):
    return {"Quality.json": [QUALITY[1] | change]}


def state_change(**change):
    return {"state_change.json": [MVBENCH["state_change.json"][0] | change]}


def tempcompass(question, answer, file="multi-choice.json"):
    return {file: {"1": {"d": [{"question": question, "answer": answer}]}}}


def perception(frame_rate, answer_id):
    question = {"id": 0, "question": "q", "options": ["a"], "answer_id": answer_id}
    metadata = {"frame_rate": frame_rate, "num_frames": 5}
    return {"mc_question_valid.json": {"v": {"metadata": metadata, "mc_question": [question]}}}


def rextime(row, **change):
    return {"rextime_val.json": [row | change]}


INFINITE = '{"v": {"duration": 1e999, "timestamps": [[1, 2]], "sentences": ["s"]}}'
LETTERLESS = {key: value for key, value in REXTIME_SET[0].items() if key != "ans"}
SEQUENCE = "val/GOT-10k_Val_000001"
# what is wrong: (format, the files that are, words that the message must hold)
BROKEN = {
    "no sentence": ("charades_sta", {"charades_sta_test.txt": "ZZ9ZZ 1 2##ok\nZZ9ZZ 1 2 no\n"}, "sta_test.txt, line 2"),
    "a time that is a word": ("charades_sta", {"charades_sta_test.txt": "\nZZ9ZZ 1 x##ok"}, "sta_test.txt, line 2"),
    "a time that is nan": ("charades_sta", {"charades_sta_test.txt": "ZZ9ZZ nan 2##ok"}, "nan is no number"),
    "a duration without end": ("activitynet_captions", {"val_2.json": INFINITE}, "val_2.json['v']: inf"),
    "a sentence too many": ("activitynet_captions", described([[1, 2]], ["s", "t"]), "val_2.json['v']"),
    "a span of three": ("activitynet_captions", described([[1, 2, 3]], ["s"]), "val_2.json['v']"),
    "a span in quotes": ("activitynet_captions", described([["1", "2"]], ["s"]), "'1' is no number"),
    "a span of truth values": ("activitynet_captions", described([[False, True]], ["s"]), "False is no number"),
    "a sentence that is null": ("activitynet_captions", described([[1, 2]], [None]), "'question'"),
    "a list for an object": ("activitynet_captions", {"val_2.json": list(DESCRIBED.values())}, "val_2.json[0]"),
    "broken JSON": ("activitynet_captions", {"val_2.json": '{"v": '}, "val_2.json"),
    "no UTF-8": ("activitynet_captions", {"val_2.json": b"\xff\xfe"}, "val_2.json"),
    "half a character": ("activitynet_captions", described([[1, 2]], ["\ud83d"]), "val_2.json['v']"),
    "seven boxes": ("videochat_r1_tracking", tracking(gt=EIGHT[:7]), "got_val.json[0]: field 'boxes'"),
    "a box of three": ("videochat_r1_tracking", tracking(gt=EIGHT[:7] + [[0, 0, 1]]), "got_val.json[0]: field 'boxes'"),
    "a box in quotes": ("videochat_r1_tracking", tracking(gt=EIGHT[:7] + [["0"] * 4]), "got_val.json[0]: field 'boxes'"),
    "a path of one part": ("videochat_r1_tracking", tracking(path="x"), "got_val.json[0]"),
    "an option without its letter": ("videochat_r1_gqa", gqa(options=["(A) x", "Be y"]), "with the letter B"),
    "an option that is a number": ("mvbench", state_change(candidates=[1, 2], answer="1"), "state_change.json[0]"),
    "letters out of order": ("videochat_r1_gqa", gqa(options=["(B) x", "(A) y"]), "'(B) x'"),
    "an answer nobody offered": ("videochat_r1_gqa", gqa(answer="(F)"), "'F'"),
    "the same id twice": ("videochat_r1_gqa", {"nextgqa_val.json": GQA * 2}, "'77_3'"),
    "a video that is a number": ("videochat_r1_gqa", gqa(video=77), "field 'video' is 77"),
    "a text nobody offered": ("nextgqa", nextgqa("77,9,9,9,q,zzz,0,CW,a,b,c,d,e\n"), "test.csv, line 2"),
    "a question without windows": ("nextgqa", nextgqa("77,9,9,9,q,a,3,CW,a,b,c,d,e\n"), "there is no '3'"),
    "a comma without quotes": ("nextqa", nextqa("55,9,9,9,a,3,0,7,DO,a,b,c,d,e\n"), "test.csv, line 4: the row"),
    "a row cut short": ("nextqa", nextqa("55,9,9,9,what,4,7"), "test.csv, line 4: the row"),
    "a quote that closes early": ("nextqa", nextqa('55,9,9,9,"what"s,4,7,DO,a,b,c,d,e\n'), "test.csv"),
    "a minus as answer": ("nextqa", nextqa("5,9,9,9,q,-1,7,DO,a,b,c,d,e\n"), "option number -1"),
    "an answer too high": ("nextqa", nextqa("5,9,9,9,q,5,7,DO,a,b,c,d,e\n"), "option number 5"),
    "a label not quoted": ("videochat_r1_quality", quality(answer="Good"), "Quality.json[0]: the answer 'Good'"),
    "no labels quoted": ("videochat_r1_quality", quality(instruction="Rate [it]"), "Quality.json[0]"),
    "labels that are no list": ("videochat_r1_quality", quality(instruction="['a' 1']"), "Quality.json[0]"),
    "a label 2": ("videoeval_quality", {"test.txt": "a.mp4 0\nb.mp4 2\n"}, "test.txt, line 2: the label is '2'"),
    "no label": ("videoeval_quality", {"test.txt": "a.mp4\n"}, "test.txt, line 1"),
    "no such candidate": ("mvbench", state_change(answer="Ice"), "state_change.json[0]: the answer 'Ice'"),
    "a length as time": ("mvbench", state_change(start="short"), "'short' is no number"),
    "a CSV without its answers": ("nextqa", {"test.csv": NEXTQA["test.csv"].replace("answer", "x")}, "no 'answer'"),
    "a row without an answer": ("videomme", {"v.jsonl": json.dumps({"videoID": "c"})}, "v.jsonl, line 1: there is no"),
    "a nan elsewhere": ("videomme", {"v.jsonl": json.dumps(VIDEOMME[1] | {"domain": math.nan})}, "v.jsonl, line 1"),
    "half a line": ("videomme", {"v.jsonl": json.dumps(VIDEOMME[0]) + '\n{"videoID": '}, "v.jsonl, line 2"),
    "options in one string": ("rextime", rextime(REXTIME_SET[0], options="abcd"), "'abcd'; it must be a list"),
    "no window": ("rextime", rextime(REXTIME_ROWS[0], relevant_windows=[]), "rextime_val.json[0]"),
    "no letter": ("rextime", rextime(LETTERLESS), "rextime_val.json[0]: there is no 'ans'"),
    "maybe": ("tempcompass:yes_no", tempcompass("q", "maybe", "yes_no.json"), "yes_no.json['1']['d'][0]"),
    "no option line": ("tempcompass", tempcompass("q", "A. x"), "multi-choice.json['1']['d'][0]"),
    "a letter twice": ("tempcompass", tempcompass("q\nA. x\nA. y", "A. x"), "'A. x'"),
    "no frame rate": ("perception_test", perception(0, 0), "mc_question_valid.json['v']"),
    "an answer before the first": ("perception_test", perception(30.0, -1), "option number -1"),
    "fewer flags than frames": ("got10k", got10k_files(["1,1,1,1"] * 9, [0] * 8), f"{SEQUENCE}: absence.label"),
    "a box of three numbers": ("got10k", got10k_files(["1,1,1"] * 8), SEQUENCE),
    "a box of nan": ("got10k", got10k_files(["1,nan,1,1"] * 8), f"{SEQUENCE}: the box '1,nan,1,1'"),
    "no resolution": ("got10k", got10k_files(["1,1,1,1"] * 8, resolution="unknown"), SEQUENCE),
    "no pixels": ("got10k", got10k_files(["1,1,1,1"] * 8, resolution="(0, 0)"), SEQUENCE),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_record_of_another_form_stops_the_conversion_and_is_named(case, tmp_path):
    """Whatever is wrong inside a record: one kind of error that says where, and the old output left as it was."""
    name, files, words = BROKEN[case]
    name, _, split = name.partition(":")
    whole, src, _ = MINIATURES[name]
    out = tmp_path / "x.jsonl"
    out.write_text("the samples of yesterday\n")
    with pytest.raises(ValueError) as caught:
        convert(name, put(tmp_path / "in", whole | files) / src, out, split or None)
    message = str(caught.value)
    assert message.startswith(f"{name}: ") and words in message and "Expected: " in message
    assert out.read_text() == "the samples of yesterday\n" and sorted(tmp_path.iterdir()) == [tmp_path / "in", out]


@pytest.mark.parametrize("name", MINIATURES)
def test_a_missing_file_is_named_and_nothing_is_written(name, tmp_path):
    """A misspelt --src must not end in an empty file that a training run then reads without complaint."""
    with pytest.raises((OSError, ValueError), match="nowhere"):
        convert(name, tmp_path / "nowhere", tmp_path / "out" / "x.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_src_says_what_was_expected(tmp_path):
    """"Is a directory" alone leaves the reader to guess which of the files in it is meant."""
    folder = put(tmp_path / "in", CHARADES | {"v.jsonl": json.dumps(VIDEOMME[1])})
    with pytest.raises(IsADirectoryError, match=r"videomme: .*in: Is a directory. Expected: --src is a file with \{videoID"):
        convert("videomme", folder, tmp_path / "x.jsonl")
    with pytest.raises(NotADirectoryError, match=r"charades_sta: .*v1_test.csv: Not a directory. Expected: --src is a "
                                                 "folder, --split test or train, files with VID START END##SENTENCE"):
        convert("charades_sta", folder / "v.jsonl", tmp_path / "x.jsonl")
    (folder / "charades_sta_test.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"in/charades_sta_test.txt: No such file.*Expected: --src is a folder, --split test or train"):
        convert("charades_sta", folder, tmp_path / "x.jsonl")


def test_an_empty_annotation_is_written_and_named_with_its_line_and_the_remedy(tmp_path, capsys):
    """It stays in the file, as published, and the loader refuses that file: the user is not to find out in training."""
    records = [GQA[0], GQA[0] | {"id": "b", "glue": []}, GQA[0] | {"id": "c", "question": " "}]
    samples = converted("videochat_r1_gqa", put(tmp_path / "in", {"g.json": records}) / "g.json", tmp_path)
    assert [(sample["spans"] == [], sample["question"] == "") for sample in samples] == [
        (False, False), (True, False), (False, True)]
    out = tmp_path / "samples.jsonl"
    lines = capsys.readouterr().out.splitlines()
    assert lines[-4].startswith(f"{out}:2: cannot be loaded: field 'spans' is []")
    assert lines[-3].startswith(f"{out}:3: cannot be loaded: field 'question' is ''")
    assert lines[-2:] == [f"training refuses a file with such lines; `python data.py check {out}` sets 2 of them apart",
                          f"wrote 3 samples to {out}"]
    with pytest.raises(ValueError, match="samples.jsonl:2: field 'spans'"):
        load_samples([str(out)])
    for sample in samples:
        sample["video"] = "frames"
    write_folder(tmp_path / "frames", pictures(4))
    out.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    assert check(str(out), tmp_path / "checked", num_workers=0) == (1, 2)
    assert len(load_samples([str(tmp_path / "checked" / "good.jsonl")])) == 1
    convert("videochat_r1_gqa", put(tmp_path / "in", {"g.json": [GQA[0]]}) / "g.json", out)
    assert "training refuses" not in capsys.readouterr().out


def test_converted_data_sets_train_together_each_with_its_own_root_and_limit(tmp_path):
    """VideoChat-R1's joint recipe: `--train_data A@ROOT:N B@ROOT:P% C@ROOT`. One root for all finds no video of two."""
    entries = []
    for name, limit in (("charades_sta", ":2"), ("activitynet_captions", ":50%"), ("videochat_r1_gqa", "")):
        files, source, _ = MINIATURES[name]
        convert(name, put(tmp_path / name, files) / source, tmp_path / f"{name}.jsonl")
        entries.append(f"{tmp_path / name}.jsonl@/videos/{name}{limit}")
    samples = load_samples(entries, "/elsewhere")
    assert [sample["task"] for sample in samples] == ["grounding"] * 4 + ["gqa"]
    assert [sample["video"].rsplit("/", 1)[0] for sample in samples] == [
        "/videos/charades_sta"] * 2 + ["/videos/activitynet_captions"] * 2 + ["/videos/videochat_r1_gqa/0001"]
    assert [sample["id"] for sample in samples[:2]] == ["ZZ9ZZ_1", "AB1CD_2"]


def test_an_unknown_name_or_split_says_what_there_is(tmp_path):
    """A split that is silently ignored converts the test set in the belief that it is the training set."""
    with pytest.raises(ValueError, match="'charades'.*charades_sta.*perception_test"):
        convert("charades", tmp_path, tmp_path / "x.jsonl")
    with pytest.raises(ValueError, match="nextgqa has no split 'train', take test or val"):
        convert("nextgqa", tmp_path, tmp_path / "x.jsonl", "train")
    with pytest.raises(ValueError, match="videomme has no split 'test', take none"):
        convert("videomme", tmp_path, tmp_path / "x.jsonl", "test")
    with pytest.raises(ValueError, match="has no split ''"):
        convert("nextqa", tmp_path, tmp_path / "x.jsonl", "")


def test_the_annotation_file_cannot_be_overwritten_with_its_samples(tmp_path):
    """`--src v.jsonl --out v.jsonl` would replace the only copy of the annotations."""
    source = put(tmp_path, {"v.jsonl": json.dumps(VIDEOMME[1])}) / "v.jsonl"
    with pytest.raises(ValueError, match="v.jsonl is the annotation file itself"):
        convert("videomme", source, tmp_path / "." / "v.jsonl")
    assert json.loads(source.read_text()) == VIDEOMME[1]


def test_the_folder_of_the_output_is_made_and_no_temporary_file_stays(tmp_path):
    """Nor does one stay when the rename fails, here because a folder has the name of the output."""
    folder = put(tmp_path / "in", CHARADES)
    convert("charades_sta", folder, tmp_path / "a" / "b" / "x.jsonl")
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["x.jsonl"]
    (tmp_path / "taken" / "x.jsonl" / "y").mkdir(parents=True)
    with pytest.raises(OSError):
        convert("charades_sta", folder, tmp_path / "taken" / "x.jsonl")
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["x.jsonl"]


def test_the_log_names_what_was_read_and_what_looked_wrong(tmp_path, capsys):
    """Oddities are never repaired, so the log is the only place where they show; the digest tells editions apart."""
    converted("activitynet_captions", put(tmp_path / "in", {"val_2.json": DESCRIBED}), tmp_path)
    digest = hashlib.sha256((tmp_path / "in" / "val_2.json").read_bytes()).hexdigest()
    assert capsys.readouterr().out.split("\n")[:5] == [
        f"sha256 {digest}  val_2.json",
        "passed on as annotated: 1 reversed spans",
        "passed on as annotated: 1 zero-length spans",
        "passed on as annotated: 1 spans with a negative time",
        "passed on as annotated: 1 spans beyond the end of the video",
    ]


def test_oddities_are_counted_by_span_and_sound_samples_have_none():
    """A span that ends exactly with the video is no oddity: half of ActivityNet does."""
    sound = {"question": "q", "spans": [[0, 5], [5, 10]], "duration": 10, "boxes": [[0, 0, 1, 1]]}
    absent = {"task": "moments", "question": "q", "spans": [], "duration": 10}
    assert oddities([sound, {"question": "q", "options": ["a", "b"]}, absent]) == {}
    odd = {"question": "", "spans": [[11, 4], [-1, -1]], "options": ["a", "a"], "boxes": [[0, 0, 0, 1], [1, 1, 0, 0]]}
    assert oddities([odd, odd | {"duration": 10.0}, {"question": "q", "spans": []}]) == {
        "reversed spans": 2,
        "zero-length spans": 2,
        "spans with a negative time": 2,
        "spans beyond the end of the video": 1,
        "samples without a span": 1,
        "samples with spans but no duration": 2,
        "boxes without area": 4,
        "empty questions": 2,
        "questions with two equal options": 2,
    }


# ---- grounding ------------------------------------------------------------------------------------------------------


def test_charades_lines_keep_their_order_and_take_the_duration_of_their_own_video(tmp_path):
    """The CSV has another order than the lines; its texts hold commas, quotes and line breaks."""
    samples = converted("charades_sta", put(tmp_path / "in", CHARADES), tmp_path)
    assert only(samples, "video", "question", "spans", "duration") == [
        ("ZZ9ZZ.mp4", "a person sits down.", [[4.4, 9.2]], 12.0),
        ("AB1CD.mp4", "person reads ## a sign", [[20.0, 10.5]], 31.25),
        ("ZZ9ZZ.mp4", "Person leaves", [[0.0, 12.7]], 12.0),
    ]


def test_a_duration_nobody_gives_is_absent(tmp_path):
    """Not null and not 0: an evaluation would divide by it."""
    folder = put(tmp_path / "in", CHARADES | {"charades_sta_test.txt": "OTHER 1 2##no row in the CSV"})
    sneeze, wait = converted("charades_sta", folder, tmp_path, "train")
    assert sneeze["spans"] == [[3.0, 5.0]] and sneeze["duration"] == 13.5
    assert wait["spans"] == [[1.0, 1.0]] and "duration" not in wait
    assert "duration" not in converted("charades_sta", folder, tmp_path)[0]
    for given_value in ({}, {"duration": None}):
        file = {"x.json": {"v": {"timestamps": [[1, 2]], "sentences": ["s"]} | given_value}}
        assert "duration" not in converted("videochat_r1_grounding", put(tmp_path, file) / "x.json", tmp_path)[0]


def test_each_sentence_of_a_description_goes_with_its_own_span(tmp_path):
    """Reversed, empty, negative and too late spans stay as they are; `phrases` belongs to other sentences."""
    expected = [
        ("v_b.mp4", "A dog runs.", [[0, 4.14]], 30),
        ("v_b.mp4", "It  stops.", [[9.5, 3.25]], 30),
        ("v_b.mp4", "It is\nwet", [[7, 7]], 30),
        ("v_a.mp4", "Ünïcode \u2028 line", [[-0.5, 9]], 8),
    ]
    file = put(tmp_path / "in", {"test.json": DESCRIBED}) / "test.json"
    samples = converted("videochat_r1_grounding", file, tmp_path)
    assert only(samples, "video", "question", "spans", "duration") == expected
    folder = put(tmp_path / "in", {f"{split}.json": {split: DESCRIBED["v_a"]} for split in ("val_1", "train")})
    put(folder, {"val_2.json": DESCRIBED})
    assert converted("activitynet_captions", folder, tmp_path) == samples
    assert converted("activitynet_captions", folder, tmp_path, "val_1")[0]["video"] == "val_1.mp4"
    assert converted("activitynet_captions", folder, tmp_path, "train")[0]["video"] == "train.mp4"


def test_samples_are_one_line_each_in_plain_utf8(tmp_path):
    """A line separator inside a sentence must not split the object for readers that break lines at \\n."""
    converted("videochat_r1_grounding", put(tmp_path / "in", {"t.json": DESCRIBED}) / "t.json", tmp_path)
    written = (tmp_path / "samples.jsonl").read_bytes()
    assert written.count(b"\n") == 4 and written.endswith(b"}\n") and "Ünïcode".encode() in written


# ---- moments --------------------------------------------------------------------------------------------------------


def test_all_windows_of_a_query_are_the_truth_and_the_part_names_the_file(tmp_path, capsys):
    """Its other converters keep the first window alone; a start that is added twice would move every window."""
    folder = put(tmp_path / "in", {"highlight_val_release.jsonl": jsonl(QVHIGHLIGHTS),
                                   "highlight_train_release.jsonl": jsonl(QVHIGHLIGHTS[1:])})
    samples = converted("qvhighlights", folder, tmp_path)
    assert samples[0] == {"id": "12", "task": "moments", "video": "aB-_c9xYz01_60.0_210.0.mp4", "question": "A cook stirs a pot.",
                          "spans": [[0.0, 16.0], [90.0, 152.0]], "duration": 150.0}
    assert "1 spans beyond the end of the video" in capsys.readouterr().out
    assert converted("qvhighlights", folder, tmp_path, "train") == samples[1:]
    assert len(load_samples([str(tmp_path / "samples.jsonl")])) == 1


@pytest.mark.parametrize("key", ["qid", "query", "vid", "relevant_windows"])
def test_a_line_without_a_key_is_named(key, tmp_path):
    row = {name: value for name, value in QVHIGHLIGHTS[0].items() if name != key}
    folder = put(tmp_path / "in", {"highlight_val_release.jsonl": jsonl([QVHIGHLIGHTS[1], row])})
    with pytest.raises(ValueError, match=f"qvhighlights: highlight_val_release.jsonl, line 2: there is no '{key}'"):
        convert("qvhighlights", folder, tmp_path / "x.jsonl")
    assert not (tmp_path / "x.jsonl").exists()


@pytest.mark.parametrize("windows", ["none", [[0]], [[0, "16"]], [5, 9], [[0, None]]])
def test_windows_of_another_form_are_refused(windows, tmp_path):
    folder = put(tmp_path / "in", {"highlight_val_release.jsonl": jsonl([{**QVHIGHLIGHTS[0], "relevant_windows": windows}])})
    with pytest.raises(ValueError, match="^qvhighlights: highlight_val_release.jsonl, line 1: "):
        convert("qvhighlights", folder, tmp_path / "x.jsonl")


def test_a_split_without_its_windows_is_refused_in_a_sentence(tmp_path):
    """Written as `[]`, it would say that none of its events is in its video."""
    for hidden in ({}, {"relevant_windows": None}):
        row = {key: QVHIGHLIGHTS[0][key] for key in ("qid", "query", "duration", "vid")} | hidden
        folder = put(tmp_path / "in", {"highlight_test_release.jsonl": jsonl([row])})
        with pytest.raises(ValueError, match="the test split is published without them, take val or train"):
            convert("qvhighlights", folder, tmp_path / "x.jsonl", "test")
    assert not (tmp_path / "x.jsonl").exists()


def test_the_recipe_for_events_that_are_not_there(tmp_path, monkeypatch):
    """docs/data.md makes them by asking about one video what another one shows; a question about itself would be a lie."""
    page = (Path(tools.convert.__file__).parent.parent / "docs" / "data.md").read_text(encoding="utf-8")
    [recipe] = [text for text in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "moments" in text]
    monkeypatch.chdir(tmp_path)
    given_samples = [{"id": f"{k}", "task": "grounding", "video": f"{k % 40}.mp4", "question": f"event {k}", "target": "x",
                      "spans": [[k, k + 1]]} for k in range(200)]
    Path("charades_train.jsonl").write_text(jsonl(given_samples))
    exec(recipe, {})
    made = load_samples(["moments_train.jsonl"])
    videos = {sample["question"]: sample["video"] for sample in given_samples}
    assert len(made) == 200 and 20 <= sum(sample["spans"] == [] for sample in made) <= 60
    for before, after in zip(given_samples, made):
        assert after["task"] == "moments" and "target" not in after
        same = after["question"] == before["question"]
        assert after["spans"] == (before["spans"] if same else [])
        assert same or videos[after["question"]] != before["video"]


# ---- tracking -------------------------------------------------------------------------------------------------------


def test_tracking_boxes_pass_unchanged_and_the_path_keeps_two_parts(tmp_path):
    """The authors' disk is not ours; and the file does not say which frames its boxes belong to, so neither do we."""
    samples = converted("videochat_r1_tracking", put(tmp_path / "in", {"g.json": TRACKING}) / "g.json", tmp_path)
    assert only(samples, "video", "question", "boxes", "frames", "fps") == [
        ("val/GOT-10k_Val_000777", "kite", EIGHT, None, 10.0),
        ("train/GOT-10k_Train_000001", "owl", EIGHT[::-1], None, 10.0),
    ]


@given(st.integers(8, 500))
def test_eight_frames_are_spread_as_exact_fractions_spread_them(count):
    """Rounding down would never show the middle; a frame taken twice would make the given box worth more."""
    nearest = [int(Fraction(k * (count - 1), 7) + Fraction(1, 2)) for k in range(8)]
    assert spread([10 * frame for frame in range(count)]) == [10 * place for place in nearest]
    assert nearest[0] == 0 and nearest[-1] == count - 1 and len(set(nearest)) == 8


def test_got10k_takes_eight_visible_frames_and_cuts_their_boxes_to_the_frame(tmp_path):
    """Frame numbers count all frames, not the visible ones; corners, not width and height; columns not swapped."""
    rows = [f"{10 * i},5.5,20,200" for i in range(12)]
    rows[3] = "nan,nan,nan,nan"  # an absent object has no box that could be read
    rows[0] = "-30,10,50,20"
    absent = [0, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0]
    folder = put(tmp_path / "in", {"val/list.txt": "GOT-10k_Val_000001"} | got10k_files(rows, absent))
    (sample,) = converted("got10k", folder, tmp_path)
    # Ten visible frames: 0 1 2 4 5 7 8 9 10 11; of those the places 0 1 3 4 5 6 8 9.
    assert sample["frames"] == [0, 1, 4, 5, 7, 8, 10, 11]
    assert sample["boxes"][:2] == [[0.0, 0.1, 0.1, 0.3], [0.05, 0.055, 0.15, 1.0]]
    assert sample["boxes"][-1] == [0.55, 0.055, 0.65, 1.0]
    assert only([sample], "id", "video", "question", "fps") == [
        ("GOT-10k_Val_000001", "val/GOT-10k_Val_000001", "toy car", 10.0)
    ]


def test_got10k_without_absence_labels_sees_the_object_in_every_frame(tmp_path):
    """The test split and some mirrors come without the label files."""
    (sample,) = converted("got10k", put(tmp_path / "in", GOT10K), tmp_path)
    assert sample["frames"] == list(range(8))
    assert sample["boxes"][7] == [7 / 200, 0.2, 47 / 200, 0.3]


def test_got10k_divides_each_box_by_its_own_frames_size(tmp_path, capsys):
    """Two of the 180 validation sequences become smaller half way: by the one resolution their object jumps and shrinks."""
    folder = put(tmp_path / "in", GOT10K)
    for k in range(8):
        size = (200, 100) if k < 4 else (100, 50)
        Image.new("RGB", size).save(folder / "val/GOT-10k_Val_000001" / f"{k + 1:08d}.jpg")
    (sample,) = converted("got10k", folder, tmp_path)
    assert sample["boxes"][3] == [3 / 200, 0.2, 43 / 200, 0.3] and sample["boxes"][7] == [7 / 100, 0.4, 47 / 100, 0.6]
    assert "no pictures" not in capsys.readouterr().out
    (folder / "val/GOT-10k_Val_000001/00000008.jpg").unlink()
    (sample,) = converted("got10k", folder, tmp_path)
    assert sample["boxes"][7] == [7 / 200, 0.2, 47 / 200, 0.3]
    assert "1 sequences have no pictures here" in capsys.readouterr().out


def test_got10k_leaves_out_short_sequences_by_name_and_hashes_the_rest_together(tmp_path, capsys):
    """The one format that leaves something out says what, why and how many; 28,000 digests would drown it."""
    rows = ["1,1,1,1"] * 9
    files = {"val/list.txt": "LONG\nSHORT\n\n"}
    files |= got10k_files(rows, [0] * 8 + [1], "LONG") | got10k_files(rows, [0] * 7 + [1, 1], "SHORT")
    assert only(converted("got10k", put(tmp_path / "in", files), tmp_path), "id") == [("LONG",)]
    lines = capsys.readouterr().out.split("\n")
    assert lines[0] == "left out val/SHORT: 7 frames show the object, 8 are needed"
    assert lines[1] == "left out 1 sequences"
    assert sum(line.startswith("sha256 ") for line in lines) == 2


# ---- grounded questions ---------------------------------------------------------------------------------------------


def test_videochat_r1_questions_lose_their_letters_and_nothing_else(tmp_path):
    """Only the first letter is a letter: `(B)` inside an option, and a middle initial, are text."""
    (sample,) = converted("videochat_r1_gqa", put(tmp_path / "in", {"g.json": GQA}) / "g.json", tmp_path)
    assert sample == {
        "id": "77_3",
        "task": "gqa",
        "video": "0001/77.mp4",
        "question": "why did he wave",
        "options": ["(B) was tempting", "nothing before it", "to greet.", "say\nbye", "A. Milne"],
        "answer": "C",
        "spans": [[3.5, 9.0], [-0.1, 2.0], [25.0, 31.5]],
        "duration": 30.0,
        "category": "CW",
    }


@given(st.lists(st.text(), min_size=1, max_size=26))
def test_letters_put_before_any_texts_come_off_again(texts):
    """Round trip over arbitrary texts, line breaks and brackets included."""
    lettered = [f"({letter}) {text}" for letter, text in zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", texts)]
    assert without_letters(lettered, r"\(([A-Z])\)\s*(.*)") == [text.strip() for text in texts]


def test_nextgqa_joins_three_files_and_takes_the_first_of_two_equal_options(tmp_path, capsys):
    """The windows are those of the question, not of the video; quoted cells hold commas and line breaks."""
    samples = converted("nextgqa", put(tmp_path / "in", NEXTGQA), tmp_path)
    assert only(samples, "id", "video", "question", "options", "answer", "spans", "duration", "category") == [
        (
            "88_4",
            "0002/88.mp4",
            "why, do you think,\nis he happy",
            ["loses", "a, b", "wins", "wins", "sleeps"],
            "C",
            [[0, 42]],
            41,
            "CW",
        ),
        ("77_0", "0001/77.mp4", "how", ["rests", "b", "c", "d", "e"], "A", [[1.5, 4.0], [6, 7]], 30, "CH"),
    ]
    out = capsys.readouterr().out
    assert "1 questions with two equal options" in out and "1 spans beyond the end" in out


def test_nextgqa_reads_the_files_of_its_split(tmp_path):
    """`val` with the windows of `test` would be a different data set that looks the same."""
    windows = NEXTGQA["gsub_test.json"] | {"77": {"location": {"0": [[9, 10]]}}}
    files = NEXTGQA | {"val.csv": NEXTGQA["test.csv"], "gsub_val.json": windows}
    samples = converted("nextgqa", put(tmp_path / "in", files), tmp_path, "val")
    assert only(samples, "spans", "duration") == [([[0, 42]], 41), ([[9, 10]], None)]


def test_a_question_without_any_window_is_passed_on_and_counted(tmp_path, capsys):
    """Leaving it out would change the number of questions of the test set."""
    file = put(tmp_path / "in", {"g.json": [GQA[0] | {"glue": []}]}) / "g.json"
    assert converted("videochat_r1_gqa", file, tmp_path)[0]["spans"] == []
    assert "1 samples without a span" in capsys.readouterr().out


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_rextime_rows_with_options_are_questions_and_rows_without_are_not(suffix, tmp_path):
    """The evaluation file has a letter but no options; its first window is the truth. The data set's `answer` is a
    template sentence, `ans` the letter."""
    rows = REXTIME_ROWS + REXTIME_SET
    content = json.dumps(rows) if suffix == "json" else "\n".join(json.dumps(row) for row in rows)
    file = put(tmp_path / "in", {f"rextime_val.{suffix}": content}) / f"rextime_val.{suffix}"
    assert converted("rextime", file, tmp_path) == [
        {"id": "q1", "task": "grounding", "video": "v_1.mp4", "question": "When?", "spans": [[0, 28]], "duration": 150},
        {
            "id": "q2",
            "task": "gqa",
            "video": "v_2_0.0_150.0.mp4",
            "question": "Why?",
            "options": ["a", "b", "c", "d"],
            "answer": "C",
            "spans": [[5, 8.5]],
            "duration": 99.5,
        },
    ]


def test_rextime_windows_that_are_left_out_are_named(tmp_path, capsys):
    """The first window became the truth, and the others were dropped without a word."""
    row = REXTIME_ROWS[0] | {"relevant_windows": [[0, 16], [40, 58]]}
    [sample] = converted("rextime", put(tmp_path / "in", {"qv.jsonl": json.dumps(row)}) / "qv.jsonl", tmp_path)
    assert sample["spans"] == [[0, 16]]
    assert "left out of qv.jsonl, line 1, qid 'q1': windows [[40, 58]] behind the first, [0, 16]" in capsys.readouterr().out


# ---- questions ------------------------------------------------------------------------------------------------------


def test_nextqa_numbers_become_letters_with_and_without_a_map(tmp_path):
    """With the map file the video lies in a numbered folder; a map that lacks a video is an error, not a guess."""
    folder = put(tmp_path / "in", NEXTQA)
    samples = converted("nextqa", folder, tmp_path)
    assert only(samples, "id", "video", "question", "answer", "category") == [
        ("55_6", "55.mp4", "what", "E", "DO"),
        ("66_1", "66.mp4", '"who"?', "A", "DC"),
    ]
    put(folder, {"map_vid_vidorID.json": {"55": "0009/55", "66": "0007/66"}})
    assert only(converted("nextqa", folder, tmp_path), "video") == [("0009/55.mp4",), ("0007/66.mp4",)]
    put(folder, {"map_vid_vidorID.json": {"55": "0009/55"}})
    with pytest.raises(ValueError, match="nextqa: test.csv, line 3: there is no '66'"):
        convert("nextqa", folder, tmp_path / "x.jsonl")


def test_nextqa_reads_every_split_it_announces(tmp_path):
    """`train`, `val` and `test` have the same columns: only the file tells them apart."""
    for split in ("test", "val", "train"):
        put(tmp_path / "in", {f"{split}.csv": f"video,{NEXT_HEADER}{split},9,9,9,q,0,0,CW,a,b,c,d,e\n"})
    for split in ("test", "val", "train"):
        assert converted("nextqa", tmp_path / "in", tmp_path, split)[0]["video"] == f"{split}.mp4"


def test_mvbench_reads_its_tasks_in_alphabetical_order_and_leaves_other_files_alone(tmp_path, capsys):
    """Each task's videos lie in another folder; the first of two equal candidates counts; `start` 0 is a start."""
    samples = converted("mvbench", put(tmp_path / "in", MVBENCH), tmp_path)
    assert only(samples, "video", "options", "answer", "start", "end", "fps", "category") == [
        ("ssv2_video/5.webm", ["up", "down"], "B", None, None, None, "action_antonym"),
        ("ssv2_video/5.webm", ["up", "down"], "A", None, None, None, "action_antonym"),
        ("tvqa/frames_fps3_hq/show_s01/clip", ["A", "B."], "B", 0.0, 7.1, 3.0, "episodic_reasoning"),
        ("perception/videos/v 1.mp4", ["ice", "water", "ice"], "A", None, None, None, "state_change"),
    ]
    assert "read 3 of the 20 tasks" in capsys.readouterr().out


def test_mvbench_takes_a_single_task_and_refuses_a_file_that_is_none(tmp_path):
    """The task is known from the file's name only, so a renamed file would look for its videos in the wrong folder."""
    folder = put(tmp_path / "in", MVBENCH)
    assert only(converted("mvbench", folder / "state_change.json", tmp_path), "id") == [("state_change_0",)]
    with pytest.raises(ValueError, match="README.json: neither a folder with task files nor one of them"):
        convert("mvbench", folder / "README.json", tmp_path / "x.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: neither a folder"):
        convert("mvbench", tmp_path / "empty", tmp_path / "x.jsonl")


def test_mvbench_has_twenty_tasks_in_eleven_folders():
    """A task that is missing from the table would be left alone like a README."""
    folders = Counter(MVBENCH_FOLDERS.values())
    assert len(MVBENCH_FOLDERS) == 20 and len(folders) == 11
    assert folders["clevrer/video_validation"] == 5 and folders["perception/videos"] == 4
    assert folders["star/Charades_v1_480"] == 3


def test_videomme_durations_are_classes_and_its_options_lose_one_letter(tmp_path):
    """`short` is no number of seconds; `A. B. B. King` is a name; a line separator inside an option is no line end."""
    files, src, _ = MINIATURES["videomme"]
    samples = converted("videomme", put(tmp_path / "in", files) / src, tmp_path)
    assert samples[0] == {
        "id": "001-1",
        "task": "qa",
        "video": "aB-_9.mp4",
        "question": "How many?",
        "options": ["B. B. King", "2.", "Three\u2028or so", ""],
        "answer": "B",
        "category": "short",
        "domain": "Art",
        "task_type": "Counting Problem",
    }
    assert samples[1]["category"] == "long" and "domain" not in samples[1]


def test_tempcompass_options_are_cut_out_of_the_question(tmp_path):
    """`C.Both events` and ` D. away` are option lines; `U.S.` inside one is not; an empty option keeps its place."""
    samples = converted("tempcompass", put(tmp_path / "in", TEMPCOMPASS), tmp_path)
    assert only(samples, "video", "category", "question", "options", "answer") == [
        ("12_reverse.mp4", "order", "Which is first?", ["jump", "sit", "Both events"], "C"),
        ("12_reverse.mp4", "order", "Which\nway?", ["up", "down", "U.S. way", "away"], "D"),
        ("12_reverse.mp4", "speed", "How fast?", ["slow", "", "fast"], "A"),
    ]


def test_tempcompass_answers_count_places_where_a_letter_is_skipped(tmp_path):
    """Options A, C: the model is shown A, B, so the right answer that is called C is B."""
    file = {"multi-choice.json": {"1": {"d": [{"question": "q\nA. x\nC. y", "answer": "C. y"}]}}}
    assert converted("tempcompass", put(tmp_path / "in", file), tmp_path)[0]["answer"] == "B"


def test_tempcompass_yes_and_no_become_two_options(tmp_path):
    """A is yes and B is no in every sample, so that a constant answer is one baseline and not two."""
    samples = converted("tempcompass", put(tmp_path / "in", TEMPCOMPASS), tmp_path, "yes_no")
    assert only(samples, "options", "answer") == [(["yes", "no"], "B"), (["yes", "no"], "A")]


plain_lines = st.text(st.characters(exclude_categories=["Cs"], exclude_characters=".\n"), max_size=20)


@given(plain_lines, st.lists(plain_lines, min_size=1, max_size=6))
def test_options_written_below_a_question_are_found_again(question, options):
    """Round trip over arbitrary texts without full stops, which alone can look like an option."""
    text = question + "".join(f"\n{'ABCDEF'[place]}. {option}" for place, option in enumerate(options))
    found, letters, texts = split_options(text)
    assert found.strip() == question.strip()
    assert letters == list("ABCDEF")[: len(options)] and [t.strip() for t in texts] == [o.strip() for o in options]


def test_perception_test_cuts_only_the_videos_that_are_to_be_cut(tmp_path):
    """-1 means the whole video: a cut at -1 / 30 seconds would leave no frame. Each video has its own frame rate."""
    folder = put(tmp_path / "in", PERCEPTION | CUTS)
    samples = converted("perception_test", folder, tmp_path)
    assert only(samples, "id", "answer", "duration", "start", "end", "category", "reasoning") == [
        ("video_7_5", "C", 600 / 29.97, 0.0, 450 / 29.97, "physics", None),
        ("video_7_9", "A", 600 / 29.97, 0.0, 450 / 29.97, None, "predictive"),
        ("video_8_5", "B", 1.5, None, None, None, None),
    ]
    put(folder, {"cut_frame_mapping_valid.json": {"video_7": 0}})
    assert only(converted("perception_test", folder, tmp_path), "start", "end") == [(None, None)] * 3


def test_perception_test_works_without_a_cut_file(tmp_path):
    """It is published separately from the questions."""
    samples = converted("perception_test", put(tmp_path / "in", PERCEPTION), tmp_path)
    assert only(samples, "video", "start", "end")[0] == ("video_7.mp4", None, None)


# ---- labels ---------------------------------------------------------------------------------------------------------


def test_quality_labels_are_the_list_the_instruction_quotes(tmp_path):
    """Brackets without quotes are not the list, and an apostrophe or a comma inside a label does not end it."""
    samples = converted("videochat_r1_quality", put(tmp_path / "in", {"q.json": QUALITY}) / "q.json", tmp_path)
    assert only(samples, "video", "question", "options", "answer") == [
        ("0001.mp4", QUALITY[0]["instruction"].strip(), ["bad", "so-so, it's"], "so-so, it's"),
        ("0001.mp4", "Rate it: ['bad', 'good'].", ["bad", "good"], "bad"),
    ]


def test_quality_numbers_become_labels(tmp_path):
    """0 is low. The question names both labels word for word, because only the exact label scores."""
    files, src, _ = MINIATURES["videoeval_quality"]
    samples = converted("videoeval_quality", put(tmp_path / "in", files) / src, tmp_path)
    labels = ["low quality", "high quality"]
    assert only(samples, "video", "options", "answer") == [
        ("0001.mp4", labels, "low quality"),
        ("name with blanks.mp4", labels, "high quality"),
    ]
    assert len({sample["question"] for sample in samples}) == 1
    assert all(label in samples[0]["question"] for label in labels)


def test_the_examples_in_the_docstrings_are_true():
    """Prose that is not run goes stale."""
    result = doctest.testmod(tools.convert)
    assert result.attempted >= 1 and result.failed == 0
