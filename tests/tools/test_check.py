"""Files that decode without complaint and yet show the wrong thing, or too little: `check` must name them."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from video_files import pictures, write_folder, write_video

from data import VideoSettings, read_video, video_arguments
from lib.samples import load_samples
from tools.check import check, inspect_video
from tools.data_commands import parse_arguments, run_command

SETTINGS = VideoSettings(min_pixels=784)


def problem(video, **fields):
    sample = {"id": "x", "task": "qa", "video": str(video), **fields}
    return inspect_video(str(video), duration=sample.get("duration"), **video_arguments(sample, SETTINGS))


def test_ordinary_files_and_folders_are_good(tmp_path):
    """A check that cries wolf is switched off."""
    file = write_video(tmp_path / "good.mp4", pictures(40))
    assert problem(file) is None and problem(file, duration=4.4) is None and problem(file, start=1, end=3) is None
    assert problem(file, task="tracking") is None
    assert problem(write_folder(tmp_path / "frames", pictures(6)), fps=10, duration=60) is None


def test_a_shortened_file_is_named(tmp_path):
    """A truncated .mkv opens, and silently is shorter: half of the events it is asked about are not in it."""
    frames = np.random.default_rng(0).integers(0, 256, (40, 48, 64, 3), dtype=np.uint8)
    file = write_video(tmp_path / "cut.mkv", frames, options={"crf": "20", "g": "4"})
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert problem(file) is None  # nobody can tell
    assert "truncated: it holds" in problem(file, duration=4.0)


def test_files_that_are_read_as_they_are_shown_are_good(tmp_path):
    """A variable rate, an open GOP: named by a check of decord's frames, they would be thrown away for nothing."""
    times = [0.1 * k for k in range(20)] + [2 + 0.5 * k for k in range(20)]
    assert problem(write_video(tmp_path / "v.mp4", pictures(40), times=times)) is None
    frames = np.stack([np.full((64, 64, 3), 37 * k % 256, np.uint8) for k in range(120)])
    options = {"x264-params": "keyint=24:min-keyint=24:scenecut=0:bframes=3:b-adapt=0:open-gop=1"}
    assert problem(write_video(tmp_path / "open.mp4", frames, options=options)) is None
    twice = [k // 2 / 5 for k in range(40)]  # can be read by decoding all of it only
    assert problem(write_video(tmp_path / "twice.mkv", pictures(40), times=twice, options={"bf": "0"})) is None


@pytest.mark.parametrize("reader", ["decord", "earlier"])
def test_a_frame_that_another_way_shows_otherwise_is_named_in_long_files_too(tmp_path, monkeypatch, reader):
    """Beyond 6,000 frames nothing used to be compared: 406 of 406 frames were wrong in a file that was called good."""
    file = write_video(tmp_path / "v.mp4", pictures(40))
    monkeypatch.setattr("tools.check.CHEAP_FRAMES", 20)
    real = read_video

    def other(path, **arguments):
        clip = real(path, **arguments)
        if arguments.get("reader") == reader:
            clip.frames[-1] = 255 - clip.frames[-1]
        return clip

    monkeypatch.setattr("tools.check.read_video", other)
    last = 39 if reader == "earlier" else 17
    assert f"frame {last} is another picture when it is read in another way ({reader})" in problem(file)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_good_and_bad_samples_are_written_apart_in_order(tmp_path, num_workers):
    """Every sample must be in exactly one of the two files, as it was written, or a data set shrinks unseen."""
    write_video(tmp_path / "good.mp4", pictures(20))
    (tmp_path / "bad.mp4").write_text("no video")
    samples = [{"id": str(k), "task": "qa", "question": "?", "options": ["a"], "answer": "A", **more} for k, more in
               enumerate([{"video": "bad.mp4"}, {"video": "good.mp4", "odd": "ü"}, {}, {"video": "absent.mp4"},
                          {"video": "good.mp4"}, {"video": "good.mp4", "duration": 90}])]
    file = tmp_path / "x.jsonl"
    file.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    assert check(str(file), tmp_path, settings=SETTINGS, num_workers=num_workers) == (3, 3)
    good, bad = ([json.loads(line) for line in open(tmp_path / f"{name}.jsonl")] for name in ("good", "bad"))
    assert good == [samples[1], samples[2], samples[4]]
    assert [{key: sample[key] for key in sample if key != "reason"} for sample in bad] == [
        samples[0], samples[3], samples[5]]
    for word, sample in zip(("not a video", "no such file", "truncated"), bad):
        assert word in sample["reason"]


def test_the_commonest_reasons_and_late_spans_are_said(tmp_path, capsys):
    """Ten lines of one mistake in a file that nobody opens; and seconds that are frames: such spans end after their video."""
    write_video(tmp_path / "v.mp4", pictures(40))
    line = {"task": "grounding", "video": "v.mp4", "question": "it moves", "duration": 4.0}
    lines = [{**line, "id": "a", "spans": [[1, 3]]}, {**line, "id": "b", "spans": [[10, 90]]},
             *({**line, "id": name, "video": "none.mp4", "spans": [[1, 3]]} for name in "cd")]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    assert check(str(tmp_path / "own.jsonl"), tmp_path / "out", settings=SETTINGS, num_workers=0) == (2, 2)
    said = capsys.readouterr().out
    assert "2 bad: no such file" in said and "1 good ones have spans that end after their video (b): are they in seconds?" in said


def test_the_exit_status_says_whether_all_are_good(tmp_path, capsys):
    """A script that checks before it trains looks at the status, not at the text."""
    (tmp_path / "videos").mkdir()
    for name in ("1", "2"):
        write_video(tmp_path / "videos" / f"{name}.mp4", pictures(8))
    line = {"id": "a", "task": "qa", "question": "?", "options": ["a"], "answer": "A"}
    file = tmp_path / "x.jsonl"

    command = ["check", str(file), "--video_root", str(tmp_path / "videos"), "--out", str(tmp_path / "out"),
               "--num_workers", "0"]

    def write(*samples):
        file.write_text("".join(json.dumps({**line, **sample}) + "\n" for sample in samples))

    write({"video": "1.mp4"}, {"id": "b", "video": "2.mp4"})
    assert run_command(parse_arguments(command)) == 0 and "2 good samples" in capsys.readouterr().out
    assert load_samples([f"{tmp_path / 'out' / 'good.jsonl'}@/videos"])[0]["video"] == "/videos/1.mp4"
    write({"video": "1.mp4"}, {"id": "b", "video": "3.mp4"})
    script = [sys.executable, str(ROOT / "data.py")]
    done = subprocess.run(script + command, capture_output=True, text=True)
    assert done.returncode == 1 and "1 bad" in done.stdout
    write({"task": "vqa"}, {"id": "b", "video": "2.mp4"})
    capsys.readouterr()
    assert run_command(parse_arguments(command)) == 1 and "1 good samples" in capsys.readouterr().out
    write()
    with pytest.raises(ValueError, match="x.jsonl: no sample"):
        run_command(parse_arguments(command))


def test_a_file_that_hangs_is_bad_and_delays_nobody_else(tmp_path):
    """One such file of 12,000, and the check of a night has found nothing by the morning."""
    write_video(tmp_path / "good.mp4", pictures(8))
    os.mkfifo(tmp_path / "hangs.mp4")  # a pipe into which nobody writes
    line = {"task": "qa", "question": "?", "options": ["a"], "answer": "A"}
    samples = [{**line, "id": str(k), "video": name} for k, name in enumerate(["hangs.mp4", "good.mp4", "hangs.mp4"])]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    assert check(str(tmp_path / "x.jsonl"), tmp_path, settings=SETTINGS, num_workers=1, deadline=1.0) == (1, 2)
    bad = [json.loads(line) for line in open(tmp_path / "bad.jsonl")]
    assert bad == [{**samples[0], "reason": "no answer in 1 s"}, {**samples[2], "reason": "no answer in 1 s"}]


def test_lines_that_training_refuses_are_set_apart_and_the_rest_loads(tmp_path):
    """One empty annotation of 100,000 makes a file that cannot be loaded: which line? And the next?"""
    write_video(tmp_path / "v.mp4", pictures(8))
    good = {"id": "a", "task": "qa", "question": "?", "options": ["a"], "answer": "A", "video": "v.mp4"}
    gone = {**good, "id": "gone", "video": "gone.mp4"}
    lines = [json.dumps(good), json.dumps({**good, "id": "b", "question": " "}), "", '{"id": "torn", "ta', "[1, 2]",
             json.dumps(gone), json.dumps({**good, "note": "again"}), '{"id": "x", "task": "\xff"}',
             json.dumps({**good, "id": "huge"}).replace("}", ', "duration": 1' + "0" * 400 + "}"),
             json.dumps({**good, "id": "b"}), "[" * 100_000]
    file = tmp_path / "x.jsonl"
    file.write_bytes("\n".join(lines).encode("latin-1"))
    with pytest.raises(ValueError, match="x.jsonl:2: field 'question'"):
        load_samples([str(file)])
    assert check(str(file), tmp_path, settings=SETTINGS, num_workers=0) == (2, 8)
    assert [sample["id"] for sample in load_samples([str(tmp_path / "good.jsonl")])] == ["a", "b"]
    bad = [json.loads(line) for line in open(tmp_path / "bad.jsonl", encoding="utf-8")]
    starts = ["line 2: field 'question' is ' '", "line 4: not a JSON object", "line 5: [1, 2] is not a JSON object",
              "no such file; check the path, and --video_root where there is one", "line 7: field 'id': 'a' is also the id of line 1",
              "line 8: not a JSON object", "line 9: field 'duration' is 1000", "line 11: not a JSON object"]
    assert all(sample["reason"].startswith(start) for start, sample in zip(starts, bad, strict=True))
    assert bad[0].items() >= {"id": "b", "question": " "}.items() and bad[1]["text"] == '{"id": "torn", "ta'
    assert bad[2]["text"] == "[1, 2]" and bad[4]["note"] == "again"


def test_a_part_of_a_file_is_checked_under_its_own_root(tmp_path):
    """The entry that is checked is the entry that training is given: the same videos and the same part."""
    (tmp_path / "own").mkdir()
    write_video(tmp_path / "own" / "v.mp4", pictures(8))
    line = {"task": "qa", "question": "?", "options": ["a"], "answer": "A", "video": "v.mp4"}
    samples = [{**line, "id": f"{k:02d}"} for k in range(20)]
    file = tmp_path / "x.jsonl"
    file.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    for take in (":3", ":25%", ""):
        entry = f"{file}@{tmp_path / 'own'}{take}"
        wanted = [sample["id"] for sample in load_samples([entry])]
        counts = check(entry, tmp_path / "out", video_root="/nowhere", settings=SETTINGS, num_workers=0)
        assert counts == (len(wanted), 0)
        assert [json.loads(line)["id"] for line in open(tmp_path / "out" / "good.jsonl")] == wanted


def test_the_data_is_not_overwritten_with_the_result(tmp_path):
    """Checking good.jsonl a second time, in its own folder, would leave nothing of what failed the first time."""
    for name in ("good.jsonl", "bad.jsonl"):
        (tmp_path / name).write_text('{"id": "a", "task": "qa", "question": "?", "options": ["a"], "answer": "A"}\n')
        with pytest.raises(ValueError, match=f"{name} would be overwritten with the result; give --out another folder"):
            check(str(tmp_path / name), tmp_path / ".", num_workers=0)


def test_a_picture_that_cannot_be_shown_is_named_among_those_of_its_line(tmp_path):
    """Of four pictures, which one is it?"""
    from PIL import Image

    Image.new("RGB", (40, 40)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"<html>")
    sample = {"id": "a", "task": "qa", "question": "?", "options": ["x", "y"], "answer": "A", "image": "good.png"}
    lines = [sample, {**sample, "id": "b", "image": ["good.png", "bad.png"]}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert check(str(tmp_path / "x.jsonl"), tmp_path / "out", num_workers=0) == (1, 1)
    [bad] = map(json.loads, open(tmp_path / "out" / "bad.jsonl"))
    [good] = map(json.loads, open(tmp_path / "out" / "good.jsonl"))
    assert bad["reason"].startswith(f"{tmp_path / 'bad.png'}: not a picture") and good["image"] == str(tmp_path / "good.png")
