"""The synthetic task is real files, honest labels, and nothing a blind model could score on."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer
from conftest import ALONE
from video_files import read_sample

import data
import eval
import rewards
import train
from lib import toy
from lib.captions import words_judge
from lib.geometry import QWEN2_5, QWEN3
from lib.samples import TASKS, load_samples
from model import VideoLM


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("toy")
    toy.write_dataset(out, train=6, eval=24, seed=3)
    return out


def test_the_files_load_and_every_video_decodes(folder):
    """A toy whose files were anything but ordinary would test nothing of the path that real data takes."""
    for name, clips in (("train", 6), ("eval", 24)):
        samples = load_samples([str(folder / f"{name}.jsonl")])
        assert len({s["video"] for s in samples}) == clips
        assert {s["task"] for s in samples} == set(TASKS)
        for sample in samples[:16]:
            clip = read_sample(sample)
            assert clip.frames.shape[0] == (8 if sample["task"] == "tracking" else 2 * toy.DURATION)


def test_the_screen_has_the_colour_that_the_labels_say(folder):
    """Labels against pixels, frame by frame, after H.264 and the sampler: an off-by-one second would cap every score."""
    for sample in load_samples([str(folder / "eval.jsonl")], tasks=["grounding"])[:12]:
        clip = read_sample(sample, data.VideoSettings(min_pixels=4 * 784))
        colour = torch.tensor(toy.COLOURS[sample["question"].split()[-1]], dtype=torch.float)
        middle = clip.frames.float().flatten(2).median(dim=2).values  # (T, 3): the square hides no more than a part
        (start, end), = sample["spans"]
        for second, seen in zip(clip.seconds.tolist(), middle):
            is_tinted = (seen - colour).norm() < 80
            assert bool(is_tinted) == (start <= second < end), (sample["id"], second)


def test_boxes_are_where_the_square_is(folder):
    """Tracking shows the eight annotated frames; the boxes must belong to those very frames."""
    for sample in load_samples([str(folder / "eval.jsonl")], tasks=["tracking"])[:8]:
        clip = read_sample(sample, data.VideoSettings(min_pixels=4 * 784))
        for frame, box in zip(clip.frames.float().mean(1), sample["boxes"]):
            ys, xs = np.nonzero(frame.numpy() > 200)
            found = [xs.min() / 56, ys.min() / 56, (xs.max() + 1) / 56, (ys.max() + 1) / 56]
            assert rewards.box_iou(found, box) > 0.7


def test_blind_answers_score_low():
    """If the whole video, a constant span or the most frequent letter scored, a rising curve would mean nothing."""
    rng = np.random.default_rng(0)
    samples = []
    for i in range(600):
        boxes = toy.draw_path(rng, toy.DURATION * toy.FPS)
        samples += toy.make_samples(rng, f"x-{i}", toy.draw_event(rng), boxes, bool(i % 2))
    baselines = eval.blind_baselines(samples)
    assert baselines["whole_video"]["grounding/mIoU"] < 0.35
    assert baselines["best_constant_span"]["grounding/mIoU"] < 0.42
    assert baselines["most_frequent_letter"]["qa/accuracy"] < 0.32
    assert baselines["most_frequent_letter"]["classification/accuracy"] < 0.55
    assert baselines["start_box_copied"]["tracking/AO"] < 0.6


def test_events_are_whole_seconds_anywhere_inside_the_clip():
    """An event that is cut by the clip's end has a label that no answer can match; a favourite place can be guessed."""
    rng = np.random.default_rng(1)
    starts = Counter()
    for _ in range(900):
        colour, start, end = toy.draw_event(rng)
        assert colour in toy.COLOURS and 0 <= start < end <= toy.DURATION and end - start in toy.EVENT_LENGTHS
        starts[start] += 1
    assert len(starts) == 9 and max(starts.values()) < 0.2 * 900


def test_warm_start_labels_are_late_and_answer_as_they_should(folder):
    """The warm start learns from `target`: it must be readable, full marks in format, and neither exact nor useless."""
    scores = []
    for sample in load_samples([str(folder / "train.jsonl")], tasks=["grounding", "gqa", "qa"]):
        score = rewards.score(sample, sample["target"])
        assert score.parts["format"] == 1.0
        if sample["task"] != "qa":
            scores.append(score.parts["temporal_iou"])
        if sample["task"] != "grounding":
            assert score.parts["accuracy"] == 1.0
    assert 0.2 < np.mean(scores) < 0.8 and min(scores) < 0.5
    rng = np.random.default_rng(0)
    spans = [toy.late_span(rng, 4, 7) for _ in range(300)]
    assert {s for s, _ in spans} == {4, 5, 6} and {e for _, e in spans} == {7, 8, 9}


def test_a_caption_of_one_clip_tells_no_event_of_another():
    """Events that the rules cannot tell apart ("turns red", "turns blue") would pay for a caption of any clip. And the
    other tasks' samples must not move when captions join them: no number is drawn for a caption."""
    told, without = set(), np.random.default_rng(0)
    for i in range(200):
        rng = np.random.default_rng([7, i])
        event, boxes = toy.draw_event(rng), toy.draw_path(rng, toy.DURATION * toy.FPS)
        without.bit_generator.state = rng.bit_generator.state
        *others, caption = toy.make_samples(rng, "x", event, boxes, False)
        assert [s["task"] for s in others] == ["grounding", "qa", "gqa", "tracking", "classification"]
        for _ in range(3):
            toy.late_span(without, *event[1:])
        assert rng.bit_generator.state == without.bit_generator.state
        told.add(tuple(caption["events"]))
    assert len(told) == 20  # four colours, five ways
    for events in told:
        text = data.reference_caption({"events": events})
        for event in {event for other in told for event in other}:
            assert words_judge(event, text) == (event in events)


def test_captions_do_not_change_the_tokenizer_of_a_run_without_them(tmp_path, monkeypatch):
    """Other texts give other merges, and with them another model: committed results could not be repeated."""
    monkeypatch.chdir(tmp_path)
    texts = []
    monkeypatch.setattr(toy, "write_model", lambda folder, of_model, seed, family: texts.append(of_model))
    for tasks in ([], ["--tasks", "grounding", "captioning"]):
        config = train.parse_config(["--toy_train", "2", "--toy_eval", "1", "--out", "run", *tasks])
        assert toy.prepare(config, ALONE) == ("run/initial", ["toy/seed0-2-1/train.jsonl"], ["toy/seed0-2-1/eval.jsonl"])
    without, with_captions = texts
    assert len(without) == 3 * 5 * 4 and not any("Describe" in text or "moves" in text for text in without)
    assert len(with_captions) == 3 * 6 * 4 and sum("Describe" in text for text in with_captions) == 9


def test_data_of_ones_own_start_from_a_model_that_knows_their_words(tmp_path, monkeypatch, capsys):
    """--train_data without --model was refused with a page of usage; it tries out data and rewards, and says so."""
    monkeypatch.chdir(tmp_path)
    sample = {"id": "a", "task": "captioning", "events": ["a zebra crosses"], "video": "a.mp4", "question": "What happens?"}
    Path("mine.jsonl").write_text(json.dumps(sample) + "\n")
    config = train.parse_config(["--train_data", "mine.jsonl", "--out", "run"])
    assert "captioning" in config.tasks  # all tasks of the data, not those of the synthetic run
    assert toy.prepare(config, ALONE) == ("run/initial", ["mine.jsonl"], [])
    assert "no --model: a tiny model with random weights" in capsys.readouterr().out
    assert not Path("toy").exists()
    tokenizer = AutoTokenizer.from_pretrained("run/initial")
    assert len(tokenizer(" zebra")["input_ids"]) == 1


@pytest.mark.parametrize("start, stop, words", [
    ((0.1, 0.5), (0.6, 0.3), "moves to the right"), ((0.6, 0.5), (0.1, 0.9), "moves to the left"),
    ((0.1, 0.1), (0.3, 0.6), "moves down"), ((0.3, 0.6), (0.1, 0.1), "moves up"),
    ((0.3, 0.3), (0.39, 0.21), "stays where it is"),
])
def test_the_way_of_the_square_in_words(start, stop, words):
    """Pictures count y downwards: a sign that is turned round teaches a model that down is up."""
    boxes = np.array([[*start, 1, 1], [0, 0, 1, 1], [*stop, 1, 1]], dtype=float)
    assert toy.motion(boxes) == words


def test_the_same_settings_give_the_same_bytes_and_are_not_written_twice(tmp_path):
    """A run must be repeatable, and the second run must not wait for the clips again."""
    for name in ("a", "b"):
        toy.write_dataset(tmp_path / name, train=2, eval=1, seed=5)
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*.*"))
    assert len(files) == 3 + 2 + 1
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)
    video = tmp_path / "a" / "videos" / "train-0000.mp4"
    before = video.stat().st_mtime_ns
    toy.write_dataset(tmp_path / "a", train=2, eval=1, seed=5)
    assert video.stat().st_mtime_ns == before
    toy.write_dataset(tmp_path / "a", train=2, eval=1, seed=6)
    assert video.stat().st_mtime_ns != before
    assert json.loads((tmp_path / "a" / "settings.json").read_text())["seed"] == 6


def test_the_tiny_model_is_a_genuine_qwen_with_its_special_tokens(tmp_path):
    """`--model` takes this folder exactly as it takes a published one: same class, same names, same proportions."""
    toy.write_model(tmp_path, ["which colour does the screen turn first?"] * 3, seed=1)
    model = VideoLM.load(str(tmp_path))
    assert model.geometry == QWEN2_5 and model.hf.config.model_type == "qwen2_5_vl"
    for name in toy.SPECIAL_TOKENS:
        assert len(model.tokenizer(name)["input_ids"]) == 1
    assert model.tokenizer.decode(model.tokenizer("déjà vu, 12.5 → 3\n")["input_ids"]) == "déjà vu, 12.5 → 3\n"
    assert len(model.tokenizer("1234")["input_ids"]) == 4  # every digit alone, as Qwen does
    section = model.hf.config.text_config.rope_parameters["mrope_section"]
    assert sum(section) == model.hf.config.text_config.hidden_size // model.hf.config.text_config.num_attention_heads // 2


def test_the_tiny_qwen3_is_a_genuine_one_that_can_read_its_clock(tmp_path):
    """The time of a pair of frames is three tokens, the middle one the digit that an answer has: what a tiny model looks for."""
    toy.write_model(tmp_path, ["which colour does the screen turn first?"] * 3, seed=1, family="qwen3")
    model = VideoLM.load(str(tmp_path))
    assert type(model.hf).__name__ == "Qwen3VLForConditionalGeneration" and model.geometry == QWEN3
    time, digit = (model.tokenizer(text)["input_ids"] for text in ("<3.2 seconds>", "3"))
    assert len(time) == 3 and time[1:2] == digit
    config = model.hf.config.text_config
    assert sum(config.rope_parameters["mrope_section"]) == config.head_dim // 2
    assert model.visual.deepstack_visual_indexes
    plain = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template([{"role": "user", "content": "hm?"}], tokenize=False)
    assert plain == "<|im_start|>user\nhm?<|im_end|>\n"
