"""Files of samples: what is wrong with them is said by file, line, field and value."""

import random

import pytest
from made_samples import CAPTIONING, GQA, GROUNDING, LABELS, QA, TRACKING, write_lines

from lib.samples import load_samples, write_jsonl


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
    ({**QA, "task": "captioning"}, ["'events'", "missing", "sentences"]),
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


@pytest.mark.parametrize("line", ['{"id": "x", ', "\xff\xfe"])
def test_a_line_that_is_no_json_is_named(tmp_path, line):
    """`json.loads` alone says neither which file nor which line."""
    file = write_lines(tmp_path / "x.jsonl", [QA])
    file.write_bytes(file.read_bytes() + b"\n" + line.encode("latin-1") + b"\n")
    with pytest.raises(ValueError, match=f"{file}:3: not a JSON object"):
        load_samples([str(file)])


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


def test_half_a_surrogate_pair_is_written_and_read_again(tmp_path):
    """A text cut in the middle of an emoji, after a night of decoding: no reason to lose the night."""
    write_jsonl(tmp_path / "x.jsonl", [sample := {**QA, "question": "ü \ud83d \U0001f600"}])
    assert (tmp_path / "x.jsonl").read_bytes().decode("utf-8").count("\\ud83d") == 1
    assert load_samples([str(tmp_path / "x.jsonl")])[0]["question"] == sample["question"]


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
