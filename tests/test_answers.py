"""Every question once, whatever is killed; and probes that spoil the video and nothing else."""

import doctest
import json
import os
import random

import pytest
import torch

import answers
import rewards
from answers import (Asking, answer_all, append_lines, black, claim, complete, load_prompts, one_frame, probe_samples,
                     read_partial, sampling_seed, shuffled, what_decides, what_is_read, with_style)
from data import Clip, PromptTooLong, VideoSettings, prepare
from lib import distributed as scale
from lib import toy
from lib.loader import VideoLoader
from lib.samples import load_samples

ALONE = scale.World(0, 1, torch.device("cpu"))
SETTINGS = VideoSettings(min_pixels=3136)
ASKING = Asking("think", max_new_tokens=6, num_samples=2, temperature=1.0, batch=2)


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """Questions about three real clips, two for each."""
    folder = tmp_path_factory.mktemp("clips")
    toy.write_dataset(folder, train=1, eval=3, seed=0)
    return with_style(load_samples([str(folder / "eval.jsonl")], tasks=["qa", "tracking"]), "think")


@pytest.fixture
def loader():
    with VideoLoader(SETTINGS, num_workers=0) as loader:
        yield loader


def random_clip(T, seed=0):
    generator = torch.Generator().manual_seed(seed)
    frames = torch.randint(0, 256, (T, 3, 56, 56), generator=generator, dtype=torch.uint8)
    return Clip(frames, torch.arange(T) / 2.0, 2.0)


def line(name, said="no"):
    return {"id": name, "task": "qa", "completions": [said], "rewards": [0.0], "parts": [{}], "reasons": ["ok"]}


def test_the_examples_in_the_docstrings_are_true():
    results = doctest.testmod(answers)
    assert results.failed == 0 and results.attempted >= 2


# ---- every question once --------------------------------------------------------------------------------------------


def test_what_is_written_down_is_not_asked_again(model, loader, samples, tmp_path):
    """Resuming that asks everything anew is none; one that returns the answers in another order scores them against
    other truths. Without a model, any question that is asked raises."""
    first = answer_all(model, loader, samples, ALONE, ASKING, "", tmp_path / "partial")
    assert [p["id"] for p in first] == [s["id"] for s in samples]
    assert answer_all(None, loader, samples, ALONE, ASKING, "", tmp_path / "partial") == first
    assert answer_all(None, loader, samples[::-1], ALONE, ASKING, "", tmp_path / "partial") == first[::-1]
    with pytest.raises(AttributeError):
        answer_all(None, loader, samples, ALONE, ASKING, "", tmp_path / "elsewhere")


def test_half_of_the_answers_and_a_torn_line_lead_to_the_same_result(model, loader, samples, tmp_path):
    """The kill comes at any byte. What was answered stays as it was (marked here), the torn answer is given anew, and
    the new lines do not run into the torn one, so that the next resume reads them too."""
    whole = answer_all(model, loader, samples, ALONE, ASKING, "")
    folder = tmp_path / "partial"
    folder.mkdir()
    marked = [{**p, "completions": ["as it was"] * 2} for p in whole]
    append_lines(folder / "rank0.jsonl", marked[:1])
    append_lines(folder / "rank1.jsonl", marked[2:4])
    with open(folder / "rank0.jsonl", "a") as file:
        file.write("\n" + json.dumps(marked[4])[:-7])
    expected = [marked[i] if i in (0, 2, 3) else whole[i] for i in range(len(whole))]
    assert answer_all(model, loader, samples, ALONE, ASKING, "", folder) == expected
    assert answer_all(None, loader, samples, ALONE, ASKING, "", folder) == expected


def test_no_beginning_of_a_line_is_taken_for_an_answer(tmp_path):
    text = json.dumps(line("a", "ä }"))
    for cut in range(len(text)):
        (tmp_path / "rank0.jsonl").write_text("\n" + text[:cut])
        assert read_partial(ALONE, tmp_path, [{"id": "a"}]) == {}
    append_lines(tmp_path / "rank0.jsonl", [line("a"), line("stranger")])
    assert read_partial(ALONE, tmp_path, [{"id": "a"}]) == {"a": line("a")}


def decided(samples=({"id": "a"},), model="m", judge="", **changed):
    asking = Asking("think", 64, 1000, 2, 1.0, "sum", 0, changed.pop("batch", 8))
    record = what_decides(model, judge, asking, VideoSettings(), list(samples))
    return json.loads(json.dumps({**record, **changed}))


def test_answers_given_otherwise_are_refused_by_name_and_value(tmp_path):
    """Half a file of K = 2 and half of K = 4, or of two models, is a number about nothing."""
    claim(ALONE, tmp_path / "new", decided())
    claim(ALONE, tmp_path / "new", decided(batch=3))  # how many are asked at once decides nothing
    for changed in ({"model": "n"}, {"num_samples": 4}, {"temperature": 0.5}, {"fps": 1.0}, {"judge": "j"}, {"seed": 1},
                    {"max_prompt_tokens": None}, {"prompt": "answer"}, {"samples": ({"id": "b"},)}):
        (name,) = changed
        now, before = decided(**changed)[name], decided()[name]
        with pytest.raises(ValueError) as error:
            claim(ALONE, tmp_path / "new", decided(**changed))
        assert f"{name} {before!r}, not {now!r}" in str(error.value) and "--overwrite" in str(error.value)


@pytest.mark.parametrize("name, value", [
    ("style", "answer"), ("max_new_tokens", 65), ("max_prompt_tokens", 9), ("num_samples", 3), ("temperature", 0.5),
    ("mix", "temporal_r1"), ("seed", 7)])
def test_whatever_decides_an_answer_is_in_the_record(name, value):
    """A setting that is forgotten there is one that may change in the middle of a file."""
    asking = dict(style="think", max_new_tokens=64, max_prompt_tokens=10, num_samples=2, temperature=1.0, mix="sum",
                  seed=0)
    records = [what_decides("m", "", Asking(**a), VideoSettings(), []) for a in (asking, asking | {name: value})]
    assert records[0] != records[1]
    for field in vars(VideoSettings()):
        other = VideoSettings(**{**vars(VideoSettings()), field: 1})
        assert what_decides("m", "", Asking(**asking), other, []) != records[0]


def test_a_model_that_was_trained_anew_under_its_name_is_another(tmp_path):
    """runs/toy/final is another model after the next run."""
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"1")
    os.utime(weights, (1000, 1000))
    before = answers.weights_of(str(tmp_path))
    os.utime(weights, (2000, 2000))
    assert before and answers.weights_of(str(tmp_path)) != before
    assert answers.weights_of("Qwen/on-the-hub") == ""


def test_a_prompt_that_is_too_long_costs_its_own_sample(model, loader, samples):
    """One long question used to end an evaluation of thousands; in training it still says that a setting is wrong."""
    long = {**samples[0], "id": "long", "question": samples[0]["question"] * 400}
    limit = 1200
    prompts, _ = load_prompts(model, loader, samples, "think", limit)
    assert max(len(prompt.ids) for prompt in prompts) < limit
    asking = Asking("think", 6, limit, num_samples=2, temperature=1.0, batch=3)
    predictions = answer_all(model, loader, [samples[0], long, samples[1]], ALONE, asking, "")
    failed = predictions.pop(1)
    assert failed["reasons"] == ["prompt_too_long"] * 2 and failed["rewards"] == [0.0] * 2
    assert failed["completions"] == ["", ""] and f"more than {limit}" in failed["problem"]
    assert failed["parts"] == [{"accuracy": 0.0, "format": 0.0}] * 2
    assert predictions == answer_all(model, loader, samples[:2], ALONE, asking, "")
    with pytest.raises(PromptTooLong, match="more than 1200"):
        load_prompts(model, loader, [long], "think", limit)


# ---- probes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [shuffled, one_frame, black])
def test_a_probe_changes_pixels_and_nothing_else(change, model):
    """Were the prompt one token shorter, or its seconds others, the drop would measure that."""
    sample = {"id": "a", "task": "qa", "question": "?", "options": ["x", "y"], "video": "a.mp4"}
    clip = random_clip(6)
    before = clip.frames.clone()
    spoilt = change(sample, clip)
    assert torch.equal(clip.frames, before)  # clips are shared by the loader
    assert not torch.equal(spoilt.frames, before)
    assert spoilt.frames.shape == before.shape and spoilt.frames.dtype == torch.uint8
    assert torch.equal(spoilt.seconds, clip.seconds) and spoilt.sample_fps == clip.sample_fps
    one, other = (prepare(sample, c, model.tokenizer) for c in (clip, spoilt))
    assert torch.equal(one.ids, other.ids) and torch.equal(one.positions, other.positions) and one.grid == other.grid


@pytest.mark.parametrize("T", [2, 3, 8])
def test_shuffled_frames_are_the_same_frames_and_never_in_their_order(T):
    """A shuffle of two frames leaves them alone half of the time, and would halve the drop."""
    clip = random_clip(T)
    for name in range(50):
        frames = shuffled({"id": f"{name}"}, clip).frames
        assert not torch.equal(frames, clip.frames)
        assert sorted(frame.sum().item() for frame in frames) == sorted(frame.sum().item() for frame in clip.frames)


def test_a_shuffle_belongs_to_the_question():
    """Not to the rank or to the order of the questions: a resumed probe is the same probe."""
    clip = random_clip(8)
    one = shuffled({"id": "a"}, clip).frames
    random.seed(1)
    assert torch.equal(shuffled({"id": "a"}, clip).frames, one)
    assert not torch.equal(shuffled({"id": "b"}, clip).frames, one)
    assert torch.equal(shuffled({"id": "a"}, random_clip(1)).frames, random_clip(1).frames)  # nothing to shuffle


def test_one_frame_is_the_middle_one_and_black_is_black():
    clip = random_clip(5)
    assert torch.equal(one_frame({}, clip).frames, clip.frames[2].expand(5, -1, -1, -1))
    assert black({}, clip).frames.count_nonzero() == 0


def about(name, video, **extra):
    sample = {"id": name, "task": "grounding", "spans": [[1, 2]], "duration": 9.0, **extra}
    return sample | ({"video": video} if video else {})


def test_another_video_is_the_next_that_is_another():
    """Two questions about one clip in a row must not be shown their own clip; the truth stays the question's."""
    samples = [about("a", "1.mp4", start=3.0, end=8.0), about("b", "1.mp4", frames=[0, 1]), about("c", None),
               about("d", "2.mp4"), about("e", "broken.mp4"), about("f", "3.mp4", fps=10.0, end=4.0)]
    predictions = [{} for _ in samples]
    predictions[4] = {"problem": "cannot be read"}
    shown = {s["id"]: s for s in probe_samples("another_video", samples, predictions)}
    assert {name: s["video"] for name, s in shown.items()} == {
        "a": "2.mp4", "b": "2.mp4", "d": "3.mp4", "f": "1.mp4"}
    assert shown["a"] == about("a", "2.mp4") and shown["b"] == about("b", "2.mp4")
    assert shown["d"] == about("d", "3.mp4", fps=10.0, end=4.0)
    assert shown["f"] == about("f", "1.mp4", start=3.0, end=8.0)
    assert [s["id"] for s in probe_samples("black", samples, predictions)] == ["a", "b", "d", "f"]
    assert probe_samples("another_video", samples[:2], predictions[:2]) == []


def test_the_change_reaches_the_model(model, loader, samples):
    """A probe that is computed and not shown has no drop, which reads as 'never looks at the video'."""
    def patches(change):
        prompts, _ = load_prompts(model, loader, samples[:1], "think", None, change)
        return prompts[0].patches

    intact, dark = patches(None), patches(black)
    assert not torch.equal(intact, dark) and dark.std(dim=0).max() == 0
    asked = []
    look = lambda sample, clip: asked.append(sample["id"]) or clip  # noqa: E731
    answer_all(model, loader, samples, ALONE, ASKING, "", change=look)
    assert asked == [sample["id"] for sample in samples]


# ---- one question ---------------------------------------------------------------------------------------------------


def test_one_question_gets_the_completions_that_a_data_set_would(model, loader, samples):
    """Asked alone, without a truth, a model must say what it says in an evaluation."""
    for asking in (ASKING, Asking("think", 6)):
        expected = answer_all(model, loader, samples, ALONE, asking, "")
        for sample, prediction in zip(samples, expected):
            prompt = prepare(sample, loader.load(sample), model.tokenizer, tokens_per_second=model.tokens_per_second)
            said = complete(model, prompt, asking)
            assert [text for text, _ in said] == prediction["completions"]
            assert [end for _, end in said] == [reason != "truncated" for reason in prediction["reasons"]]


CHOICE = {"options": ["red", "green light", "blue"]}
BOXES = [[0.1, 0.2, 0.3, round(0.4 + k / 100, 2)] for k in range(8)]


@pytest.mark.parametrize("task, completion, words", [
    ("grounding", "<answer>3 to 6.5</answer>", "3.00 s to 6.50 s"),
    ("grounding", '<answer>{"start_time": "3", "end_time": "6"}</answer>', "3.00 s to 6.00 s"),
    ("grounding", "<answer>6 to 3</answer>", "nothing: an interval ends before it starts"),
    ("grounding", "3 to 6", "nothing: there is no closed <answer> ... </answer>"),
    ("qa", "<answer>b</answer>", "(B) green light"),
    ("qa", "<answer>A or C</answer>", "nothing: the answer names two letters"),
    ("gqa", "<answer>C</answer><glue>[(1, 2), (4, 5.5)]</glue>",
     "(C) blue, seen in 1.00 s to 2.00 s and 4.00 s to 5.50 s"),
    ("gqa", "<answer>C</answer><glue>[]</glue>", "(C) blue, seen in no part of the video"),
    ("gqa", "<answer>C</answer>", "(C) blue, seen in nothing: there is no closed <glue> ... </glue>"),
    ("classification", "<answer> Green light\n</answer>", "Green light"),
    ("classification", "<answer>pink</answer>", "'pink', which is none of the options"),
    ("captioning", "<answer> A dog barks. </answer>", "A dog barks."),
    ("captioning", "<answer> </answer>", "nothing: the answer is empty"),
    ("tracking", "<answer>[1, 2]</answer>", "nothing: the answer is no list of 8 lists of 4 numbers"),
])
def test_what_is_read_in_words(task, completion, words):
    """What a newcomer sees first must be what scoring would see."""
    assert what_is_read({"task": task, **CHOICE}, completion) == words


def test_boxes_are_read_with_the_seconds_of_their_frames():
    said = what_is_read({"task": "tracking"}, f"<answer>{BOXES}</answer>", [k / 2 for k in range(8)])
    assert len(said.splitlines()) == 8
    assert said.splitlines()[3].split("s") == ["  1.50 ", "  [0.1, 0.2, 0.3, 0.43]"]


def test_every_reason_has_its_words():
    assert set(answers.WHY_UNREADABLE) == rewards.UNREADABLE


def test_noise_is_a_function_of_seed_step_and_question():
    seeds = {sampling_seed(seed, step, name) for seed in (0, 1) for step in (-1, 0, 10) for name in ("a", "b", "0 a")}
    assert len(seeds) == 18 and sampling_seed(0, -1, "a") == sampling_seed(0, -1, "a")
