"""Files of samples: what is wrong with them is said by file, line, field and value."""

import doctest
import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_samples import ALL, QA, write_lines

import lib.samples
from lib.samples import FIELDS, find_problem, judged_lines, load_samples, parse_entry, trained_on, unread_keys, write_jsonl
from tools.check import check

GROUNDING, _, GQA, TRACKING, LABELS, CAPTIONING, MOMENTS = ({"video": "v.mp4", **sample} for sample in ALL)


def test_a_video_is_looked_for_under_the_root_of_its_own_entry_first(tmp_path):
    """One global root for data sets that lie in several places reads the wrong files, or none."""
    file = write_lines(tmp_path / "x.jsonl", [{**QA, "video": "v/1.mp4"}, {**GQA, "video": "/far/2.mp4"}])
    assert load_samples([str(file)])[0]["video"] == str(tmp_path / "v/1.mp4")
    assert load_samples([str(file)], video_root="/videos")[0]["video"] == "/videos/v/1.mp4"
    own, far = load_samples([f"{file}@/elsewhere"], video_root="/videos")
    assert (own["video"], far["video"]) == ("/elsewhere/v/1.mp4", "/far/2.mp4")


def test_an_at_sign_in_a_folder_name_does_not_begin_the_root(tmp_path):
    """Splitting at the first @ makes files under user@host folders unreachable."""
    file = write_lines(tmp_path / "me@here" / "x.jsonl", [{**QA, "video": "1.mp4"}])
    assert load_samples([f"{file}@/videos:1"])[0]["video"] == "/videos/1.mp4"
    assert load_samples([f"{file}"])[0]["video"] == str(tmp_path / "me@here" / "1.mp4")


def test_a_label_may_be_composed_otherwise_than_its_option():
    """Both look alike on the screen, and the message said that one was not the other."""
    sample = {**LABELS, "options": ["cafe\u0301", "bar"], "answer": "caf\u00e9"}
    assert find_problem(sample) is None and find_problem({**sample, "answer": "cafe"})


def test_held_out_questions_that_are_trained_on_are_said():
    """The first lines of the training file make the finest test set; ids say nothing, since each file has its own."""
    train = [{"id": "a", "task": "qa", "video": "v.mp4", "question": "who?"}, {"id": "b", "task": "qa", "question": "why?"}]
    held_out = [{**train[0], "id": "x"}, {**train[0], "question": "when?"}, {**train[0], "task": "gqa"}, {**train[0], "video": "w.mp4"}]
    (line,) = trained_on(train, held_out)
    assert line.startswith("warning: 1 of 4 held-out questions are trained on as well (x)")
    assert trained_on(train, held_out[1:]) == []


def test_an_entry_takes_the_first_n_or_a_seeded_share_in_file_order(tmp_path):
    """A share drawn without a seed of its own differs from rank to rank, and training data with it."""
    file = write_lines(tmp_path / "x.jsonl", [{**QA, "id": f"{k:03d}"} for k in range(200)])
    ids = lambda entry, seed=0: [sample["id"] for sample in load_samples([f"{file}{entry}"], seed=seed)]  # noqa: E731
    assert ids(":3") == ["000", "001", "002"] and len(ids(":500")) == 200 and len(ids(":100%")) == 200
    random.seed(1)
    share = ids(":12.5%")
    random.seed(2)
    assert len(share) == 25 and share == ids(":12.5%") == sorted(share)
    assert share != ids(":12.5%", seed=1) and share != ids(":25")


def test_n_counts_samples_of_the_wanted_tasks(tmp_path):
    """In a file sorted by task, the first N of all lines may hold none of the wanted ones."""
    file = write_lines(tmp_path / "x.jsonl", [*({**QA, "id": f"q{k}"} for k in range(5)), {**LABELS, "id": "l"}])
    assert [sample["id"] for sample in load_samples([f"{file}:1"], tasks=["classification"])] == ["l"]
    with pytest.raises(ValueError, match="no sample of task tracking"):
        load_samples([str(file)], tasks=["tracking"])
    with pytest.raises(ValueError, match="unknown task 'vqa'"):
        load_samples([str(file)], tasks=["vqa"])


@pytest.mark.parametrize("sample, words", [
    ({**QA, "task": "vqa"}, ["'task'", "'vqa'", "grounding"]),
    ({**LABELS, "task": "captioning"}, ["'events'", "missing", "sentences"]),
    ({**CAPTIONING, "events": []}, ["'events'", "[]"]),
    ({**CAPTIONING, "events": "a dog barks"}, ["'events'", "a dog barks"]),
    ({**CAPTIONING, "events": ["a dog barks", " ."]}, ["'events'", "' .'"]),
    ({**CAPTIONING, "events": [["a dog barks", 3]]}, ["'events'", "sentences"]),
    ({key: CAPTIONING[key] for key in ("id", "task", "events")}, ["'question'", "missing"]),
    ({key: QA[key] for key in ("id", "task", "options", "answer")}, ["'question'", "missing"]),
    ({key: GQA[key] for key in GQA if key != "spans"}, ["'spans'", "missing"]),
    ({**QA, "answer": "C"}, ["'answer'", "'C'", "2 options"]),
    ({**QA, "answer": "b"}, ["'answer'", "'b'"]),
    ({**QA, "answer": "AB"}, ["'answer'", "'AB'", "a letter"]),
    ({**QA, "duration": 10**400}, ["'duration'", "seconds above 0"]),
    ({**LABELS, "answer": "medium"}, ["'answer'", "medium", "low"]),
    ({**GROUNDING, "spans": [[1, 2], [3, 4]]}, ["'spans'", "exactly one"]),
    ({**GROUNDING, "spans": [[1, float("nan")]]}, ["'spans'", "nan"]),
    ({**GROUNDING, "spans": []}, ["'spans'", "[]"]),
    ({**GQA, "spans": []}, ["'spans'", "[]"]),
    ({**MOMENTS, "spans": None}, ["'spans'", "None", "[] for what is not in the video"]),
    ({**MOMENTS, "spans": [[]]}, ["'spans'", "[[]]"]),
    ({**MOMENTS, "spans": [5, 9]}, ["'spans'", "[5, 9]"]),
    ({key: MOMENTS[key] for key in MOMENTS if key != "spans"}, ["'spans'", "missing"]),
    ({**TRACKING, "boxes": TRACKING["boxes"][:7]}, ["'boxes'", "8"]),
    ({**TRACKING, "frames": [0, 1, 2, 3, 4, 5, 6, -1]}, ["'frames'", "-1"]),
    ({**QA, "duration": None}, ["'duration'", "None", "leave it out"]),
    ({**QA, "start": 5, "end": 5}, ["'end'", "5"]),
    ({**QA, "think": "false"}, ["'think'", "true or false"]),
    ({**QA, "id": 7}, ["'id'", "7"]),
    ([QA], ["not a JSON object"]),
])
def test_a_bad_sample_is_named_by_file_line_field_and_value(tmp_path, sample, words):
    """A field that is missing at step 900 of a training run costs the run."""
    file = write_lines(tmp_path / "x.jsonl", [GROUNDING, sample])
    with pytest.raises(ValueError) as error:
        load_samples([str(file)])
    for word in [f"{file}:2", *words]:
        assert word in str(error.value)


def test_moments_may_be_many_or_none(tmp_path):
    """"Not in this video" is an annotation, and no hole in one."""
    lines = [MOMENTS, {**MOMENTS, "id": "none", "spans": []}]
    assert [sample["spans"] for sample in load_samples([str(write_lines(tmp_path / "x.jsonl", lines))])] == [MOMENTS["spans"], []]


BAD_LINES = {  # what stands in the line -> what is said of it
    '{"id": "x", ': "not a JSON object (Expecting",
    "[" * 100_000: "not a JSON object (brackets",
    '{"x": ' * 30 + "0" + "}" * 30: "not a JSON object (brackets are nested more than 20 deep)",
    '{"id": ' + "1" * 5000 + "}": "not a JSON object (Exceeds the limit",
    "7": "7 is not a JSON object",
    json.dumps({**QA, "id": 8}): "field 'id' is 8; it must be a string",
    json.dumps({**QA, "id": "8", "task": 8}): "field 'task' is 8; it must be one of",
    json.dumps({**QA, "question": "cut \ud83d"}): "field 'question' holds half of a character ('\\ud83d' at place 4",
    json.dumps({**QA, "options": ["a", "b\udc00"]}): "field 'options' holds half of a character",
    json.dumps({**QA, "category": {"x": ["\ud83d"]}}): "field 'category' holds half of a character",
    json.dumps({**QA, "duration": 10**400}): "field 'duration' is 1000",
    json.dumps({**GROUNDING, "spans": [[1, 10**400]]}): "field 'spans' is [[1, 1000",
    json.dumps({**TRACKING, "frames": [0, 1, 2, 3, 4, 5, 6, 10**400]}): "field 'frames' is [0, 1, 2",
    json.dumps({**QA, "duration": 1e300}): "field 'duration' is 1e+300; it must be seconds above 0, at most 10000000",
    json.dumps({**QA, "fps": 1e-300}): "field 'fps' is 1e-300; it must be frames a second from 0.001",
    json.dumps({**QA, "video": "a\0b.mp4"}): "field 'video' is 'a\\x00b.mp4'; it must be the path",
    json.dumps({**QA, "video": "v" * 5000}): "field 'video' is 'vvvv",
    json.dumps({**QA, "video": "v/" * 2500}): "field 'video' is 'v/v/",
    json.dumps({**QA, "video": 7}): "field 'video' is 7; it must be the path",
    json.dumps({**QA, "task": "\x1b]0;title\x07"}): "field 'task' is '\\x1b]0;title\\x07'; it must be",
    **{json.dumps({key: value for key, value in sample.items() if key != "video"}): "field 'video' is missing; it must be"
       for sample in (GROUNDING, GQA, TRACKING, LABELS, CAPTIONING, MOMENTS)},
    json.dumps({"video_path": "v.mp4", **ALL[0]}): "field 'video' is missing; it must be the path of a video or of a folder "
                                                   "of frames; rename 'video_path', if that is it",
    json.dumps({**QA, "videos": ["v.mp4"]}): "field 'video' is missing, and 'videos' is not read; rename it to 'video'",
    json.dumps({**QA, "Video": "v.mp4"}): "field 'video' is missing, and 'Video' is not read",
    json.dumps({**QA, "path": "v.mp4"}): "field 'video' is missing, and 'path' is not read",
    json.dumps({**QA, "image_path": "v.jpg"}): "field 'image' is missing, and 'image_path' is not read; rename it to 'image'",
    json.dumps({**QA, "pictures": ["v.jpg"]}): "field 'image' is missing, and 'pictures' is not read",
    json.dumps({**QA, "image": "v.jpg", "video": "v.mp4"}): "fields 'video' and 'image' are both given",
    json.dumps({**QA, "image": []}): "field 'image' is []; it must be the path of a picture, or a list of paths",
    json.dumps({**QA, "image": ["a.jpg", 7]}): "field 'image' is ['a.jpg', 7]",
    json.dumps({**GROUNDING, "video": "v.mp4", "image": "v.jpg"}): "fields 'video' and 'image' are both given",
    json.dumps({**{key: value for key, value in GROUNDING.items() if key != "video"}, "image": "v.jpg"}):
        "field 'image' does not go with task 'grounding'; pictures go with qa, classification, captioning",
}


@pytest.mark.parametrize("line, said", BAD_LINES.items(), ids=lambda text: text[:30])
def test_a_bad_line_is_named_in_training_and_set_apart_by_check(tmp_path, line, said):
    """Each of these ended a program without a line number, or was called good by check and ended the training; a sample
    whose video stands under another key was asked about a video that nobody saw."""
    good = {**QA, "id": "good"}
    file = write_lines(tmp_path / "x.jsonl", [good])
    file.write_text(f"{json.dumps(good)}\n\n{line}\n{json.dumps({**good, 'id': 'last'})}\n")
    with pytest.raises(ValueError) as error:
        load_samples([str(file)])
    assert str(error.value).startswith(f"{file}:3: {said}")
    assert check(str(file), tmp_path / "out", num_workers=0) == (2, 1)
    [bad] = map(json.loads, open(tmp_path / "out" / "bad.jsonl", encoding="utf-8"))
    assert bad["reason"].startswith(f"line 3: {said}")


def test_a_line_that_is_no_utf8_is_named(tmp_path):
    """`json.loads` alone says neither which file nor which line."""
    file = write_lines(tmp_path / "x.jsonl", [QA])
    file.write_bytes(file.read_bytes() + b"\n\xff\xfe\n")
    with pytest.raises(ValueError, match=f"{file}:3: not a JSON object"):
        load_samples([str(file)])


JSON_VALUES = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
                           lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3))


@given(st.sampled_from([GROUNDING, QA, GQA, TRACKING, LABELS, CAPTIONING]), st.sampled_from([*FIELDS, "video_path", "note"]),
       JSON_VALUES)
def test_any_value_in_any_field_is_judged_and_never_an_error(sample, field, value):
    """A validator that raises something else than it promises takes the line number with it."""
    problem = find_problem({**sample, field: value})
    assert problem is None or (isinstance(problem, str) and problem.isprintable())


@given(st.binary(max_size=60) | JSON_VALUES.map(lambda value: json.dumps(value).encode()))
def test_any_line_is_judged(tmp_path_factory, line):
    file = tmp_path_factory.mktemp("any") / "x.jsonl"
    file.write_bytes(line.replace(b"\n", b" ") + b"\n" + json.dumps(QA).encode())
    *others, last = judged_lines(file)
    assert last == (2, QA, None) and all(problem for _, _, problem in others)


def test_a_key_that_nobody_reads_is_named_once_with_the_one_it_resembles():
    """`video_start` for `start`: the whole video is shown, and the spans count from another second."""
    samples = [{**GROUNDING, "video_start": 5.0}, {**GROUNDING, "video_start": 6.0, "mood": "blue"}, {**QA, "category": "CW"}]
    assert unread_keys(samples) == ["unknown key 'video_start' in 2 samples is not read; is it meant for 'start'?",
                                    "unknown key 'mood' in 1 sample is not read"]
    assert unread_keys([{"\x1b[2J": 1}]) == ["unknown key '\\x1b[2J' in 1 sample is not read"]
    assert doctest.testmod(lib.samples).failed == 0


@given(st.text(st.characters(codec="utf-8"), max_size=30))
def test_any_entry_is_taken_apart_or_refused_by_name(entry):
    """An entry comes from the command line, where anything can be typed."""
    with pytest.raises(ValueError, match="no such file"):
        parse_entry(f"gone {entry}")


def test_a_share_of_more_than_everything_is_refused(tmp_path):
    """A slip of a finger (200 for 20) trained on everything."""
    file = write_lines(tmp_path / "x.jsonl", [QA])
    with pytest.raises(ValueError, match="':200%': a share is at most 100%"):
        load_samples([f"{file}:200%"])


def test_lines_end_at_newlines_only(tmp_path):
    """`str.splitlines` also breaks at U+2028, which annotators paste from web pages."""
    file = write_lines(tmp_path / "x.jsonl", [{**QA, "question": "one\u2028two"}])
    assert load_samples([str(file)])[0]["question"] == "one\u2028two"


def test_an_id_twice_in_a_file_is_an_error_and_in_two_files_is_prefixed(tmp_path):
    """Two samples of one id share random numbers, and predictions are matched to the wrong one."""
    one = write_lines(tmp_path / "one.jsonl", [QA, GQA])
    two = write_lines(tmp_path / "two.jsonl", [QA])
    other = write_lines(tmp_path / "sub" / "one.jsonl", [QA])
    assert [s["id"] for s in load_samples([str(one), str(two)])] == ["one/b", "c", "two/b"]
    assert [s["id"] for s in load_samples([str(one), str(other)])] == ["one#1/b", "c", "one#2/b"]
    with pytest.raises(ValueError, match=r"two.jsonl:2: field 'id': 'b' is also the id of line 1"):
        load_samples([str(write_lines(two, [QA, QA]))])


def test_annotations_are_not_repaired(tmp_path):
    """Swapping or clipping spans on loading hides from scoring, and from the reader, what the annotation says."""
    file = write_lines(tmp_path / "x.jsonl", [{**GROUNDING, "spans": [[38, 13]], "duration": 30}])
    assert load_samples([str(file)])[0]["spans"] == [[38, 13]]


def test_half_a_surrogate_pair_is_written(tmp_path):
    """In bad.jsonl, of all places: a text cut in the middle of an emoji is no reason to lose a night of decoding."""
    write_jsonl(tmp_path / "x.jsonl", [sample := {**QA, "question": "ü \ud83d \U0001f600"}])
    assert (tmp_path / "x.jsonl").read_bytes().decode("utf-8").count("\\ud83d") == 1
    assert json.loads((tmp_path / "x.jsonl").read_text(encoding="utf-8")) == sample


def test_lists_written_elsewhere_still_find_videos_that_lay_beside_the_source(tmp_path):
    """A selection written to another folder would look for its videos there."""
    clip_file = tmp_path / "clips" / "v.mp4"
    clip_file.parent.mkdir()
    clip_file.touch()
    sample = {**QA, "video": clip_file.name}
    source = write_lines(clip_file.parent / "x.jsonl", [sample])
    for folder in (clip_file.parent, tmp_path):
        write_jsonl(folder / "y.jsonl", [sample], source)
        assert load_samples([str(folder / "y.jsonl")])[0]["video"] == str(clip_file)
    write_jsonl(tmp_path / "y.jsonl", [{**QA, "video": "under_a_root.mp4"}], source)
    assert load_samples([str(tmp_path / "y.jsonl")], "/videos")[0]["video"] == "/videos/under_a_root.mp4"
