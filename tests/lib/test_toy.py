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
from lib.captions import as_caption, words_judge
from lib.geometry import QWEN2_5, QWEN3
from lib.samples import TASKS, load_samples
from model import VideoLM


# As train.py shows the clips to the tiny model.
SEEN = data.VideoSettings(min_pixels=train.Config.min_pixels, total_pixels=train.Config.total_pixels)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("toy")
    toy.write_dataset(out, train=6, eval=24, seed=3)
    return out


@pytest.fixture(scope="module")
def scenes():
    return [toy.draw_scene(np.random.default_rng([1, i])) for i in range(600)]


@pytest.fixture(scope="module")
def samples(scenes):
    """Of every task about each of 600 clips, without the clips."""
    made = [toy.make_samples(np.random.default_rng([2, i]), f"x-{i}", scene) for i, scene in enumerate(scenes)]
    return [sample for of_clip in made for sample in of_clip]


def of_task(samples: list[dict], task: str) -> list[dict]:
    return [sample for sample in samples if sample["task"] == task]


def test_the_files_load_and_every_video_decodes(folder):
    """A toy whose files were anything but ordinary would test nothing of the path that real data takes."""
    for name, clips in (("train", 6), ("eval", 24)):
        samples = load_samples([str(folder / f"{name}.jsonl")])
        assert len({s["video"] for s in samples}) == clips
        assert {s["task"] for s in samples} == set(TASKS)
        for sample in samples[:16]:
            clip = read_sample(sample, SEEN)
            assert clip.frames.shape == (8 if sample["task"] == "tracking" else 2 * toy.DURATION, 3, 28, 28)


def test_the_screen_has_the_colour_that_the_labels_say(folder):
    """Labels against pixels, frame by frame, after H.264 and the sampler: an off-by-one second would cap every score."""
    by_colour = 0
    for sample in load_samples([str(folder / "eval.jsonl")], tasks=["grounding"]):
        name = sample["question"].split()[-1]
        if name not in toy.COLOURS:
            continue
        colour = torch.tensor(toy.COLOURS[name], dtype=torch.float)
        clip = read_sample(sample, SEEN)
        middle = clip.frames.float().flatten(2).median(dim=2).values  # (T, 3): the squares hide no more than a part
        (start, end), = sample["spans"]
        for second, seen in zip(clip.seconds.tolist(), middle):
            tint, wanted = seen - seen.mean(), colour - colour.mean()
            is_tinted = tint.norm() > 30 and torch.cosine_similarity(tint, wanted, dim=0) > 0.9
            assert bool(is_tinted) == (start <= second < end), (sample["id"], second)
        by_colour += 1
    assert by_colour >= 5


def test_boxes_are_where_the_square_is(folder):
    """Tracking shows the eight annotated frames; the boxes must belong to those very frames, and to the square that is asked
    for."""
    for sample in load_samples([str(folder / "eval.jsonl")], tasks=["tracking"])[:12]:
        clip = read_sample(sample, data.VideoSettings(min_pixels=4 * 784))
        for frame, box in zip(clip.frames.numpy(), sample["boxes"]):  # (3, 56, 56)
            inside = frame.min(0) > 150 if sample["question"] == "white square" else frame.max(0) < 30
            inside &= np.roll(inside, 4, axis=0) | np.roll(inside, -4, axis=0)  # no stripe, unless it touches the square
            ys, xs = np.nonzero(inside)
            found = [xs.min() / 56, ys.min() / 56, (xs.max() + 1) / 56, (ys.max() + 1) / 56]
            assert rewards.box_iou(found, box) > 0.6


def test_one_half_of_every_clip_has_stripes(folder):
    """The label is about what is left of them when the model sees the clip at a quarter of its pixels."""
    for sample in load_samples([str(folder / "eval.jsonl")], tasks=["classification"])[:12]:
        rows = read_sample(sample, SEEN).frames.float().mean(dim=(1, 3))  # (T, 28)
        contrast = (rows.unflatten(1, (7, 2, 2)).mean(-1).diff(dim=-1).mean(dim=(1, 2))).unflatten(0, (2, -1)).mean(1)  # (2,)
        asked = 0 if "first half" in sample["question"] else 1
        assert (contrast[asked] > contrast[1 - asked]) == (sample["answer"] == "low quality")
        assert contrast.max() > 15 > abs(contrast.min())


def test_blind_answers_score_low(samples):
    """If the whole video, a constant span or the most frequent letter scored, a rising curve would mean nothing."""
    baselines = eval.blind_baselines(samples)
    assert baselines["whole_video"]["grounding/mIoU"] < 0.3
    assert baselines["best_constant_span"]["grounding/mIoU"] < 0.32
    assert baselines["most_frequent_letter"]["qa/accuracy"] < 0.32
    assert baselines["most_frequent_letter"]["classification/accuracy"] < 0.55
    assert baselines["start_box_copied"]["tracking/AO@2-7"] < 0.2
    assert baselines["best_constant_caption"]["captioning/recall"] < 0.35


def test_every_clip_holds_two_answers_to_what_could_be_asked(scenes, samples):
    """With one event in a clip the question was never read: the thought named the colour of the video, whatever was asked."""
    for events, squares, _ in scenes:
        assert events[0].colour != events[1].colour and rewards.temporal_iou(events[0][1:], events[1][1:]) == 0
        assert all(rewards.box_iou(*boxes) == 0 for boxes in zip(*(square.boxes.tolist() for square in squares.values())))
    for task in TASKS:
        asked = Counter(sample["question"] for sample in of_task(samples, task))
        assert len(asked) >= 2 and max(asked.values()) < 0.6 * sum(asked.values()), asked
    for number in range(0, len(scenes), 10):  # the one event, and the other
        scene = scenes[number]
        spans = {tuple(toy.ask_when(np.random.default_rng(i), scene.events)["spans"][0]) for i in range(20)}
        labels = {toy.ask_how_good(half, scene.bad_half)["answer"] for half in range(2)}
        letters = {toy.ask_which(np.random.default_rng(i), scene.events)[0]["answer"] for i in range(20)}
        assert len(spans) == len(labels) == len(letters) == 2


def test_events_are_whole_seconds_anywhere_inside_the_clip(scenes):
    """An event that is cut by the clip's end has a label that no answer can match; a favourite place can be guessed."""
    starts = Counter()
    for (first, second), _, _ in scenes:
        assert 0 <= first.start < first.end < second.start < second.end <= toy.DURATION
        for event in (first, second):
            assert event.colour in toy.COLOURS and event.end - event.start in toy.EVENT_LENGTHS
            starts[event.start] += 1
    assert len(starts) == 11 and max(starts.values()) < 0.2 * 2 * len(scenes)


def test_no_box_says_where_the_square_goes(scenes):
    """Squares that moved straight on were tracked by a model that saw a black video: from an edge there is one way only."""
    second = Counter()
    for _, squares, _ in scenes:
        for size, boxes in squares.values():
            assert boxes.min() >= 0 and boxes.max() <= 9 and set(np.unique(boxes[:, 2:] - boxes[:, :2])) == {toy.SIDES[size]}
            shown = np.round(np.linspace(0, len(boxes) - 1, 8)).astype(int)
            places = [tuple(boxes[k, :2]) for k in shown]
            jumps = [k for k in range(7) if places[k] != places[k + 1]]
            assert len(jumps) == 2 and jumps[0] < 3 <= jumps[1] and len(set(places)) == 3
            if places[0] == (0, 0):
                second[places[3]] += 1
    assert len(second) == 3 and max(second.values()) < 0.45 * sum(second.values())


def test_warm_start_labels_are_late_and_answer_as_they_should(samples, scenes):
    """The warm start learns from `target`: it must be readable, full marks in format, and neither exact nor useless."""
    worth = {task: [] for task in TASKS}
    for sample in samples:
        parts = rewards.score(sample, sample["target"]).parts
        assert parts["format"] == 1.0 and parts.get("accuracy", 1.0) == 1.0 and parts.get("event_precision", 1.0) == 1.0, sample
        worth[sample["task"]].append(rewards.task_score(parts))
    assert 0.4 < np.mean(worth["grounding"]) < 0.7 and min(worth["grounding"]) < 0.3
    assert 0.8 < np.mean(worth["tracking"]) < 0.92 and max(worth["tracking"]) == 1
    assert np.mean(worth["captioning"]) == pytest.approx(0.75 + 0.25 * toy.TELLS_ALL, abs=0.02)
    late = [toy.late_events(np.random.default_rng(i), [toy.Event("red", 1, 4), toy.Event("blue", 8, 11)]) for i in range(300)]
    assert {event.start for event, _ in late} == {1, 2, 3} and {event.end for event, _ in late} == {4, 5, 6}
    assert {event.end for _, event in late} == {11, 12}
    assert all(first.end <= second.start for scene in scenes for first, second in [toy.late_events(np.random.default_rng(0), scene.events)])


def test_a_caption_of_one_clip_tells_no_event_of_another(samples):
    """Events that the rules cannot tell apart ("turns red", "turns blue") would pay for a caption of any clip."""
    told = {tuple(sample["events"]) for sample in of_task(samples, "captioning")}
    assert len(told) == 4 * 3 + 2 * 2 * 2  # two colours in their order; two squares, two sizes, two rows
    for events in told:
        for event in {event for other in told for event in other}:
            assert words_judge(event, as_caption(list(events))) == (event in events)


def test_the_tokenizer_learns_the_words_of_the_tasks_that_are_trained(tmp_path, monkeypatch):
    """Other texts give other merges, and with them another model: a run of three tasks must not change with a fourth."""
    monkeypatch.chdir(tmp_path)
    texts = []
    monkeypatch.setattr(toy, "write_model", lambda folder, of_model, seed, family: texts.append(of_model))
    for tasks in ([], ["--tasks", "grounding", "captioning"]):
        config = train.parse_config(["--toy_train", "2", "--toy_eval", "1", "--out", "run", *tasks])
        assert toy.prepare(config, ALONE) == ("run/initial", ["toy/seed0-2-1/train.jsonl"], ["toy/seed0-2-1/eval.jsonl"])
    default, with_captions = texts
    assert len(default) == 3 * 3 * 4 and not any("Describe" in text or "Track" in text for text in default)
    assert len(with_captions) == 3 * (1 + 3) * 4 and sum("Describe" in text for text in with_captions) == 27


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
