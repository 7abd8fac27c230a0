"""A data set answered, killed and asked again; and probes that spoil the video and nothing else."""

import hashlib
import json
import random
import subprocess
import sys
import time

import pytest
import torch
from conftest import ALONE, ASKING, ROOT
from made_samples import grounding, qa, says
from processes import read, run_ranks, start_ranks

import eval
from data import Clip, prepare
from eval import METRICS, answer_all, values_of
from lib import kernels, toy
from lib.captions import words_judge
from lib.questions import load_prompts
from model import VideoLM, decoder_layer
from rewards import score
from tools import ask, evaluate
from tools.evaluate import black, one_frame, probe_samples, run, shuffled


def arguments(clips, model_folder, out, *more):
    return ["--model", str(model_folder), "--data", str(clips / "eval.jsonl"), "--out", str(out),
            "--max_new_tokens", "6", "--min_pixels", "3136", "--tasks", "qa", "tracking", "--device", "cpu",
            "--num_workers", "0", *more]


def read_lines(file):
    return [json.loads(line) for line in open(file)]


@pytest.fixture(scope="module")
def answered(model_folder, tmp_path_factory):
    """Two processes, three completions each; one of the five videos is broken."""
    folder = tmp_path_factory.mktemp("answered")
    toy.write_dataset(folder, train=1, eval=5, seed=0)
    (folder / "videos" / "eval-0003.mp4").write_bytes(b"no video")
    run_ranks(folder / "log", 2, run, arguments(folder, model_folder, folder / "out", "--num_samples", "3", "--batch", "2"))
    return folder, read(folder / "log", 0)


def test_every_sample_is_answered_once_whatever_the_number_of_processes(answered):
    """A sampler that pads the last batch, as usual in distributed evaluation, counts some samples twice."""
    folder, _ = answered
    predictions = [json.loads(line) for line in open(folder / "out" / "predictions.jsonl")]
    wanted = [s["id"] for s in map(json.loads, open(folder / "eval.jsonl")) if s["task"] in ("qa", "tracking")]
    assert [p["id"] for p in predictions] == wanted and len(wanted) == 15
    for p in predictions:
        assert {len(p[name]) for name in ("completions", "rewards", "parts", "reasons")} == {3}
        assert set(p["parts"][0]) == ({"accuracy", "format"} if p["task"] == "qa" else {"box_iou", "format"})


def test_an_unreadable_video_counts_zero_and_is_named(answered):
    """Samples that raise and are dropped from the denominator make a broken data set look good."""
    folder, printed = answered
    predictions = {p["id"]: p for p in map(json.loads, open(folder / "out" / "predictions.jsonl"))}
    broken = predictions["eval-0003-qa"]
    assert broken["reasons"] == ["unreadable_video"] * 3 and broken["rewards"] == [0.0] * 3
    assert "eval-0003.mp4" in broken["problem"] and "eval-0003.mp4" in printed
    metrics = json.loads((folder / "out" / "metrics.json").read_text())
    assert metrics["n"] == 15 and metrics["parse_failure"] >= 0.2
    assert "start_box_copied" in metrics["baselines"] and metrics["config"]["num_samples"] == 3


def test_one_process_gives_the_same_completions(answered, model_folder):
    """Noise belongs to the question: neither the batch nor the rank may decide what is sampled."""
    folder, _ = answered
    by_two = [line["completions"] for line in read_lines(folder / "out" / "predictions.jsonl")]
    run(arguments(folder, model_folder, folder / "alone", "--num_samples", "3", "--batch", "7"))
    assert [line["completions"] for line in read_lines(folder / "alone" / "predictions.jsonl")] == by_two


@pytest.mark.slow
def test_torchrun_starts_eval_py(answered, model_folder):
    """As a user starts it, with processes that decode. The processes of the other tests are forks."""
    folder, _ = answered
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(ROOT / "eval.py"),
               *arguments(folder, model_folder, folder / "torchrun", "--num_samples", "3", "--num_workers", "1")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-3000:]
    assert read_lines(folder / "torchrun" / "predictions.jsonl") == read_lines(folder / "out" / "predictions.jsonl")


# ---- for which kind of question --------------------------------------------------------------------------------------


def accuracies(*values):
    return [{"qa/accuracy": float(value), "parse_failure": 0.0} for value in values]


def test_categories_counted_by_hand():
    """Video-MME: the macro mean weighs the lengths alike, the mean over samples the questions."""
    samples = [*[qa("A", category="short")] * 2, qa("B", category="short"), qa("A", category="long"), qa("A"),
               grounding([1, 2])]
    completions = [says("A"), says("B"), says("A"), says("B"), says("B"), says("1 to 2")]
    values = values_of(samples, [{"completions": [c]} for c in completions])
    tables = evaluate.by_category(samples, values)
    assert list(tables) == ["qa"] and list(tables["qa"]) == ["short", "long", "macro mean"]
    # A blind answer is always A, which is right in two of the three short ones.
    assert tables["qa"]["short"] == pytest.approx({"qa/accuracy": 1 / 3, "parse_failure": 0, "n": 3, "blind": 2 / 3})
    assert tables["qa"]["long"] == {"qa/accuracy": 0, "parse_failure": 0, "n": 1, "blind": 1}
    assert tables["qa"]["macro mean"] == pytest.approx({"qa/accuracy": 1 / 6, "parse_failure": 0, "n": 4, "blind": 5 / 6})


@pytest.mark.parametrize("order", [1, -1])
def test_a_metric_that_some_categories_lack_is_averaged_over_the_others(order):
    """Moments with a category in which every event happens: after hours of answering, no metrics.json but a KeyError; with
    that category first in the file, a macro mean without the metric."""
    moments = {**grounding([1, 2]), "task": "moments"}
    samples = [moments | {"category": "sport"}, moments | {"category": "sport", "spans": []},
               moments | {"category": "home", "spans": []}, moments | {"category": "music"}]
    completions = [says("[(1, 2)]"), says("[(1, 2)]"), says("[]"), says("[(1, 2)]")]
    values = values_of(samples, [{"completions": [c]} for c in completions])
    table = evaluate.by_category(samples[::order], values[::order])["moments"]
    assert {name: row.get("moments/Acc@absent") for name, row in table.items()} == {
        "sport": 0, "home": 1, "music": None, "macro mean": 1 / 2}
    assert table["macro mean"]["moments/mIoU"] == pytest.approx((1 / 2 + 1 + 1) / 3) and table["macro mean"]["n"] == 4


def test_next_qa_is_summed_up_by_the_first_letter_and_tp_is_tn():
    """NExT-QA's own table has C, T and D, and no row for the few questions about what came before."""
    types = ["CW", "CH", "TN", "TP", "TP", "TC", "DL"]
    samples = [qa("A", category=name) for name in types]
    right = [1, 0, 1, 1, 0, 0, 1]
    table = evaluate.by_category(samples, accuracies(*right))["qa"]
    assert {name: (row["qa/accuracy"], row["n"]) for name, row in table.items()} == {
        "CW": (1, 1), "CH": (0, 1), "TN": (pytest.approx(2 / 3), 3), "TC": (0, 1), "DL": (1, 1),
        "Acc@C": (0.5, 2), "Acc@T": (0.5, 4), "Acc@D": (1, 1),
        "macro mean": (pytest.approx((1 + 0 + 2 / 3 + 0 + 1) / 5), 7)}
    other = evaluate.by_category([qa("A", category="TP"), qa("A", category="counting")], accuracies(1, 0))["qa"]
    assert list(other) == ["TP", "counting", "macro mean"]


def test_a_probe_is_compared_on_its_own_samples():
    """Text-only questions cannot lose their video: with them in the mean the drop would be too small. And the same
    draws on both sides: two runs that agree in every sample differ by 0, surely."""
    samples = [qa("A", id=name, video=name) for name in "abc"] + [qa("A", id="text")]
    values = accuracies(1, 1, 0, 1)
    result = evaluate.compare(samples, values, samples[:3], [
        {"completions": [says(letter)], "reasons": ["ok"]} for letter in "ABA"], words_judge)
    assert result["n"] == {"qa": 3} and result["intact"]["qa/accuracy"] == result["score"]["qa/accuracy"] == 2 / 3
    assert result["drop"]["qa/accuracy"] == 0 and result["drop_intervals"]["qa/accuracy"][0] < 0
    same = evaluate.compare(samples, values, samples[:2], [{"completions": [says("A")], "reasons": ["ok"]}] * 2,
                              words_judge)
    assert same["drop_intervals"]["qa/accuracy"] == [0, 0]
    worse = evaluate.compare(samples, values, samples[:2], [
        {"completions": [says(letter)], "reasons": ["ok"]} for letter in "AB"], words_judge)
    assert worse["drop"]["qa/accuracy"] == 0.5 and worse["drop_intervals"]["qa/accuracy"] == [0, 1]  # lost is positive
    none = evaluate.compare(samples, values, [], [], words_judge)
    assert none["drop"] == {} and none["score"] == {"n": 0}


# ---- a data set, killed and asked again ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def probed(clips, model_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("probed") / "out"
    run(arguments(clips, model_folder, out, "--probe"))
    return out


def test_metrics_json_says_what_it_is_about(probed, clips):
    """A number without data, versions and settings cannot be compared with next year's."""
    metrics = json.loads((probed / "metrics.json").read_text())
    assert metrics["n"] == 12 and set(metrics["intervals"]) == {name for name in METRICS if name in metrics}
    file = clips / "eval.jsonl"
    assert metrics["data"] == {str(file): hashlib.sha256(file.read_bytes()).hexdigest()}
    assert {"python", "torch", "transformers"} <= set(metrics["versions"])
    assert metrics["config"]["max_new_tokens"] == 6 and metrics["config"]["prompt"] == "think"
    assert set(metrics["categories"]) == {"qa", "tracking"}
    assert sum(metrics["reasons"].values()) == 12
    assert not list(probed.glob("partial*"))


def test_probes_are_answers_to_the_same_questions_about_spoilt_videos(probed, clips):
    metrics = json.loads((probed / "metrics.json").read_text())
    intact = read_lines(probed / "predictions.jsonl")
    assert list(metrics["probes"]) == ["shuffled", "one_frame", "black", "another_video", "another_question"]
    for probe, result in metrics["probes"].items():
        lines = read_lines(probed / f"predictions.{probe}.jsonl")
        assert [line["id"] for line in lines] == [line["id"] for line in intact]
        assert [line["completions"] for line in lines] != [line["completions"] for line in intact], probe
        assert result["n"] == {"qa": 4, "tracking": 8}
        for name, drop in result["drop"].items():
            assert drop == pytest.approx(metrics[name] - result["score"][name])
            assert result["drop_intervals"][name][0] <= drop + 1e-9


def test_complete_answers_are_not_asked_for_again(probed, clips, model_folder, monkeypatch, capsys):
    """Metrics may be computed anew where no GPU is; and other settings do not pass as these."""
    before = (probed / "metrics.json").read_text()
    (probed / "metrics.json").unlink()
    monkeypatch.setattr(evaluate.VideoLM, "load", lambda *_: pytest.fail("the model is not needed"))
    run(arguments(clips, model_folder, probed, "--probe", "--benchmark", "got10k"))
    printed = capsys.readouterr().out
    assert "is complete" in printed and "blind: start box copied" in printed and "macro mean" in printed
    after = json.loads((probed / "metrics.json").read_text())
    assert {**after, "config": 0} == {**json.loads(before), "config": 0}
    with pytest.raises(ValueError, match=r"max_new_tokens 6, not 7.*--overwrite"):
        run(arguments(clips, model_folder, probed, "--max_new_tokens", "7"))
    with pytest.raises(ValueError, match="samples '12 with sha256"):
        run(arguments(clips, model_folder, probed, "--tasks", "qa"))
    assert len(read_lines(probed / "predictions.jsonl")) == 12


def test_overwrite_asks_again_and_touches_no_other_file(clips, model_folder, tmp_path):
    (tmp_path / "predictions.jsonl").write_text("")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="no settings.json"):
        run(arguments(clips, model_folder, tmp_path))
    (tmp_path / "predictions.black.jsonl").write_text("old")
    run(arguments(clips, model_folder, tmp_path, "--overwrite"))
    assert len(read_lines(tmp_path / "predictions.jsonl")) == 12 and (tmp_path / "notes.txt").read_text() == "mine"
    assert not (tmp_path / "predictions.black.jsonl").exists()
    lines = (tmp_path / "predictions.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "predictions.jsonl").write_text("".join(lines[:-1]))
    with pytest.raises(ValueError, match="its 11 answers are not those of the 12 samples"):
        run(arguments(clips, model_folder, tmp_path))


def run_slowly(arguments, append=eval.append_lines):
    """In a process of its own: there is time to kill it between two batches."""
    eval.append_lines = lambda *answers: (append(*answers), time.sleep(1))
    run(arguments)


def test_a_killed_evaluation_goes_on_with_another_number_of_processes(clips, model_folder, probed, tmp_path, monkeypatch):
    """Two processes are killed as soon as an answer is on disk; one process finishes with the answers of a run that was
    never interrupted. Hours of inference lost at the last question are the commonest loss of all."""
    out = tmp_path / "out"
    ranks = start_ranks(tmp_path / "log", 2, run_slowly, arguments(clips, model_folder, out, "--batch", "1"))
    while any(rank.is_alive() for rank in ranks) and not any(file.stat().st_size for file in out.glob("partial/*")):
        time.sleep(0.01)
    for process in ranks:
        process.kill()
        process.join()
    answered = [line for file in out.glob("partial/rank*.jsonl") for line in file.read_text().split("\n") if line]
    batches, generate = [], VideoLM.generate
    monkeypatch.setattr(VideoLM, "generate", lambda model, embeds, *rest, **named:
                        batches.append(len(embeds)) or generate(model, embeds, *rest, **named))
    run(arguments(clips, model_folder, out))
    assert 0 < len(answered) < 12 and sum(batches) == 12 - len(answered)
    assert read_lines(out / "predictions.jsonl") == read_lines(probed / "predictions.jsonl")
    assert not (out / "partial").exists()


def test_running_out_of_memory_names_the_samples_and_costs_no_answer(clips, model_folder, probed, tmp_path, monkeypatch):
    """The longest video of a benchmark comes late: a traceback there used to say nothing of it, nor whether the hours
    before were lost. Here the second of six batches fails; the same command asks the other five and not the first."""
    batches, generate = [], VideoLM.generate

    def fail_once(model, embeds, *rest, **named):
        batches.append(len(embeds))
        if len(batches) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return generate(model, embeds, *rest, **named)

    monkeypatch.setattr(VideoLM, "generate", fail_once)
    again = arguments(clips, model_folder, tmp_path / "out", "--batch", "2")
    with pytest.raises(SystemExit) as end:
        run(again)
    third = read_lines(probed / "predictions.jsonl")[2]["id"]
    assert f"{third} (prompt of " in end.value.code and "1 completions each of up to 6 tokens" in end.value.code
    assert "--batch" in end.value.code and "the same command" in end.value.code
    assert not (tmp_path / "out" / "predictions.jsonl").exists()
    run(again)
    assert batches == [2] * 7
    assert read_lines(tmp_path / "out" / "predictions.jsonl") == read_lines(probed / "predictions.jsonl")


def test_a_data_set_is_asked_with_a_compiled_layer_on_request(clips, model_folder, probed, tmp_path, monkeypatch):
    """A flag that is accepted and forgotten is believed to make it faster. It does not decide what is answered, so a file
    may be finished with it that was begun without."""
    asked = []
    monkeypatch.setattr(kernels, "compiled", lambda layer: asked.append(layer) or layer)
    run(arguments(clips, model_folder, tmp_path, "--compile"))
    assert set(asked) == {decoder_layer}
    assert read_lines(tmp_path / "predictions.jsonl") == read_lines(probed / "predictions.jsonl")
    asked.clear()
    run(arguments(clips, model_folder, tmp_path, "--overwrite"))
    assert not asked


def test_prompts_that_are_too_long_are_counted_and_named(clips, model_folder, tmp_path, capsys):
    run(arguments(clips, model_folder, tmp_path, "--max_prompt_tokens", "10", "--probe"))
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["reasons"] == {"prompt_too_long": 12} and metrics["parse_failure"] == 1
    assert all(result["n"] == {} for result in metrics["probes"].values())
    assert "prompt_too_long: eval-0000-qa: sample eval-0000-qa: the prompt has" in capsys.readouterr().out


# ---- flags -----------------------------------------------------------------------------------------------------------


ONE = ["--model", "m", "--video", "a.mp4", "--question", "who?"]
MANY = ["--model", "m", "--data", "a.jsonl", "--out", "o"]


@pytest.mark.parametrize("flags, complaint", [
    (["--model", "m"], "give --data and --out"),
    (MANY[:4], "give --data and --out"),
    ([*MANY, "--task", "qa"], "--task needs --video"),
    ([*MANY, "--num_samples", "8", "--temperature", "0"], "is one answer 8 times"),
    ([*MANY, "--probe", "--num_samples", "8"], "--probe compares greedy answers"),
    ([*MANY, "--probe", "--temperature", "1"], "--probe compares greedy answers"),
    (ONE[:4], "--video needs a question"),
    (["who?", *ONE], "two questions, 'who?' and --question 'who?'"),
    ([*MANY, "who?"], "--question needs --video"),
    ([*ONE, "--html", "a.mp4"], "--html a.mp4 is no name of a page"),
    ([*ONE, "--task", "qa"], "--task qa needs --options"),
    ([*ONE, "--task", "grounding", "--options", "a"], "--task grounding has no --options"),
    ([*ONE, "--task", "tracking"], "--task tracking needs --box"),
    ([*ONE, "--task", "tracking", "--box", "0.5", "0", "0.2", "1"], "is no box"),
    ([*ONE, "--task", "tracking", "--box", "0.1", "0.2", "0.3", "0.2"], "is no box"),
    ([*ONE[:-1], " ", "--task", "grounding"], "'question' is ' '"),
    ([*ONE, "--task", "grounding", "--out", "o"], "--out is for a data set"),
    ([*ONE, "--task", "grounding", "--probe"], "--probe is for a data set"),
])
def test_flags_that_do_not_fit_are_named(flags, complaint, capsys):
    """A flag that is ignored without a word is a wrong number later."""
    with pytest.raises(SystemExit):
        evaluate.parse_arguments(flags)
    assert complaint in capsys.readouterr().err


def test_flags_that_fit_are_accepted():
    assert evaluate.parse_arguments([*MANY, "--probe", "--temperature", "0"]).probe
    args = evaluate.parse_arguments([*ONE, "--task", "qa", "--options", "a", "b"])
    assert ask.question_of(args)["options"] == ["a", "b"] and args.min_pixels == 16 * 784


@pytest.mark.parametrize("flags, task", [
    ([], "grounding"), (["--options", "a", "b"], "qa"), (["--box", "0.1", "0.2", "0.3", "0.4"], "tracking"),
    (["--options", "a", "b", "--task", "gqa"], "gqa"),
])
def test_a_question_alone_is_enough(flags, task):
    """Whoever asks for the first time knows neither the tasks nor their names."""
    args = evaluate.parse_arguments(["when?", *ONE[:4], *flags])
    assert (args.question, args.task) == ("when?", task)


# ---- probes ----------------------------------------------------------------------------------------------------------


def random_clip(T, seed=0):
    generator = torch.Generator().manual_seed(seed)
    frames = torch.randint(0, 256, (T, 3, 56, 56), generator=generator, dtype=torch.uint8)
    return Clip(frames, torch.arange(T) / 2.0, 2.0)


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
    answer_all(model, loader, samples, ALONE, ASKING, score, "", change=look)
    assert asked == [sample["id"] for sample in samples]


# ---- a second look ---------------------------------------------------------------------------------------------------


def test_one_look_is_what_it_was(clips, model_folder, probed, tmp_path):
    """Answers of last week go on this week, and nothing in them says that there is another way."""
    run(arguments(clips, model_folder, tmp_path / "out", "--looks", "1"))
    for file in ("predictions.jsonl", "settings.json"):
        assert (tmp_path / "out" / file).read_bytes() == (probed / file).read_bytes()
    assert "looks" not in (probed / "settings.json").read_text()
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert not {"looks/fell_back", "first_look"} & set(metrics)


def test_two_looks_are_measured_beside_the_first_and_counted(clips, model_folder, tmp_path, monkeypatch, capsys):
    """A second look that falls back in most samples is one look under another name."""
    out, windows = tmp_path / "out", iter([None, [[2, 4]], [[0, 3]], [[5, 9]]])
    monkeypatch.setattr(eval, "windows_of", lambda *_: next(windows))
    asked = arguments(clips, model_folder, out, "--tasks", "qa", "--looks", "2", "--density", "3")
    run(asked)
    metrics, lines = json.loads((out / "metrics.json").read_text()), read_lines(out / "predictions.jsonl")
    assert metrics["looks/fell_back"] == 1 and metrics["first_look"]["n"] == 4 and "qa/accuracy" in metrics["first_look"]
    assert [line["first"]["windows"] for line in lines] == [None, [[2, 4]], [[0, 3]], [[5, 9]]]
    printed = capsys.readouterr().out
    assert "1 of 4 first answers named no window" in printed and "first look" in printed and not (out / "partial").exists()
    run(asked)  # complete: no window is read again
    for other in ((), ("--looks", "2", "--density", "4")):
        with pytest.raises(ValueError, match="holds answers with (looks 2, not None|density 3.0, not 4.0)"):
            run(arguments(clips, model_folder, out, "--tasks", "qa", *other))


def test_two_looks_are_refused_where_no_answer_names_windows(clips, model_folder, tmp_path, capsys):
    with pytest.raises(ValueError, match="--looks 2: answers to tracking name no part"):
        run(arguments(clips, model_folder, tmp_path, "--looks", "2"))
    for more in (("--num_samples", "2"), ("--video", "x.mp4")):
        with pytest.raises(SystemExit):
            run(arguments(clips, model_folder, tmp_path, "--looks", "2", *more))
        assert "--looks 2 is for a data set and one answer a question" in capsys.readouterr().err
