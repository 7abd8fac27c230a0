"""The folder of a run: nothing in it is lost, written twice, or taken for what it is not; and what is logged of a step."""

import contextlib
import dataclasses
import json
import math
import os
import re
import resource
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ALONE, ROOT, copy_start
from processes import run_ranks, start_ranks
from small_runs import CLIPS, SMALL, STARTED, assert_equal_runs, lines, weights

import train
from data import PromptTooLong
from lib import lora
from lib.checkpoints import names_in, newest_checkpoint
from lib.distributed import World, start, stop
from lib.questions import Questions
from lib.run import BAD_STEPS, Clock, Run, cut_log, describe, log_line, logp_gaps, means_of_sums, records_of, warn_of_gap
from model import VideoLM
from rewards import Score


def new_run(out: Path, *arguments: str) -> Run:
    return Run(train.parse_config(["--out", str(out), *arguments]), ALONE, loader=None)


# --- the words of docs/log.md -----------------------------------------------------------------------------------------


def test_the_page_about_the_log_has_every_name_of_a_real_one(whole_run):
    """A number in the log that no page explains, or a page about numbers that are gone."""
    page = (ROOT / "docs" / "log.md").read_text(encoding="utf-8")
    of_steps, of_completions = (part.split("\n## ")[0] for part in page.split(".jsonl\n\n")[1:])
    columns = [row.split(" | ")[0] for row in of_steps.splitlines() if row.startswith("| `")]
    named = {name for column in columns for name in re.findall(r"`(\w+)`", column)}
    log = lines(whole_run / "metrics.jsonl")
    logged = {name for line in log for name in line}
    assert named - {"box_iou", "event_recall", "event_precision"} == logged  # parts of tasks that this run does not have
    assert all(f"`{phase}`" in of_steps for line in log for phase in (line["phase"], *line.get("seconds", ())))
    said = set(re.findall(r"`(\w+)`", of_completions)) - {"ok"}
    assert said == {name for record in lines(whole_run / "completions.jsonl") for name in record}


def test_the_line_of_the_page_is_one_of_a_run(whole_run):
    """Words of the screen that changed since the page was written."""
    page = (ROOT / "docs" / "log.md").read_text(encoding="utf-8")
    (quoted,) = re.findall(r"^step \d.*$", page, re.MULTILINE)
    printed = log_line(lines(whole_run / "metrics.jsonl")[-1], 4)
    number = r"-?\d+(\.\d+)?(e-?\d+)?"
    assert re.sub(number, "#", quoted) == re.sub(number, "#", printed)


# --- the folder -------------------------------------------------------------------------------------------------------


def test_a_folder_that_holds_a_run_is_not_overwritten(whole_run, monkeypatch):
    """A second start with the same --out must not cost the first one's result."""
    before = {file: file.read_bytes() for file in whole_run.glob("*.json*")}
    monkeypatch.chdir(whole_run.parent)
    with pytest.raises(SystemExit, match="--overwrite"):
        train.main([*SMALL, *CLIPS, "--out", "run"])
    assert {file: file.read_bytes() for file in whole_run.glob("*.json*")} == before and len(before) > 5


def test_a_name_without_a_run_is_not_resumed(tmp_path):
    """A mistyped --out was a new run from step 0, and hours went by before anybody saw it. A run that has not saved yet is one."""
    with pytest.raises(SystemExit, match="ron holds no run"):
        new_run(tmp_path / "ron", "--resume")
    assert not (tmp_path / "ron").exists()
    with contextlib.closing(new_run(tmp_path / "run").lock):
        pass
    assert new_run(tmp_path / "run", "--resume").position() == ("", 0)


def hold_for_ever(out: Path) -> None:
    world = start("cpu")
    run = Run(train.parse_config(["--out", str(out)]), world, loader=None)
    (out / f"ready{world.rank}").touch()
    if world.is_first:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)
    run.lock.close()


def test_two_runs_do_not_write_into_one_folder(tmp_path):
    """After `kill -9` of torchrun its ranks go on, and the run that is started in their place writes the same logs and
    checkpoints. One rank that is left is enough; when it has ended the folder is free, without a file to delete."""
    out = tmp_path / "run"
    first, second = start_ranks(tmp_path / "log", 2, hold_for_ever, out)
    first.join(60)
    while not (out / "ready1").exists():
        time.sleep(0.01)
    for flags in (["--resume"], ["--overwrite"]):
        with pytest.raises(SystemExit, match=f"run is in use by a run .*rank 1: process {second.pid} on .* since 2"):
            new_run(out, *flags)
    assert (out / "ready0").exists()  # --overwrite has deleted nothing
    second.kill()
    second.join()
    new_run(out, "--resume")


@pytest.mark.parametrize("name, content", [("config.json", "{\"seed\": 0, \"mod"), ("config.json", ""), ("state.json", "[]"),
                                           ("state.json", "\0" * 30), ("metrics.jsonl", "{}\n\0\0\0\0\n"),
                                           ("completions.jsonl", "{\"phase\": \"grp\n")])
def test_a_torn_file_is_named(tmp_path, name, content):
    """`Expecting value: line 1 column 1 (char 0)` says neither which file nor what to do."""
    out = tmp_path / "run"
    new_run(out).lock.close()
    (out / name).write_text(content)
    with pytest.raises(ValueError, match=f"run/{name}( line 1)? is damaged .*: (put back a copy|delete it)"):
        new_run(out, "--resume")


def test_a_torn_checkpoint_is_passed_over(model, tmp_path, capsys):
    """A machine that went down, or a copy that was cut off: the run goes on from the one before, and says so."""
    out, questions = tmp_path / "run", Questions([{"id": "a"}], 0, ALONE)
    run = new_run(out)
    optimizer = train.make_optimizer(run.config, model, 1e-3)
    for step in (1, 2):
        run.save("sft", step, model, optimizer, step)
    run.lock.close()
    with open(next((out / "checkpoint-0-sft-000002").glob("*.distcp")), "r+b") as file:
        file.truncate(1000)
    again = new_run(out, "--resume")
    assert again.restore("sft", model, optimizer, questions) == 1 and questions.cursor == 1
    assert re.search(r"damaged: .*000002/__0_0.distcp has 1000 bytes of \d+\. Going on from .*000001", capsys.readouterr().out)


def begin(out: Path, train_ids: str, held_out_ids: str, *arguments: str) -> None:
    run = new_run(out, *arguments)
    with contextlib.closing(run.lock):
        run.begin(*([{"id": i, "task": "qa"} for i in ids] for ids in (train_ids, held_out_ids)))


def test_a_resumed_run_has_the_questions_that_it_was_begun_with(tmp_path):
    """Another --eval_data gave a table whose columns are about different questions, or a KeyError after the last step; fewer
    training questions another order. Nor may the settings that are refused stay behind in config.json."""
    begin(tmp_path / "run", "ab", "c")
    before = (tmp_path / "run" / "config.json").read_text()
    for train_ids, held_out_ids, flag in (("ab", "d", "--eval_data"), ("a", "c", "--train_data"), ("ba", "c", "--train_data")):
        with pytest.raises(SystemExit, match=f"begun with . other questions in {flag}"):
            begin(tmp_path / "run", train_ids, held_out_ids, "--resume", "--lr", "0.5")
        assert (tmp_path / "run" / "config.json").read_text() == before
    begin(tmp_path / "run", "ab", "c", "--resume", "--lr", "0.5")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["lr"] == 0.5


def test_a_resumed_run_that_is_complete_says_so(tmp_path, capsys):
    """It repeated its last bar and its table, as if it had done something."""
    run = new_run(tmp_path / "run")
    for done, told in ((3, True), (2, False)):
        run.restore = lambda *_, first=done: first
        next(run.steps("grpo", 3, None, SimpleNamespace(state={}), SimpleNamespace(cursor=0)), None)
        assert ("all 3 grpo steps were done before" in capsys.readouterr().out) == told


def test_a_run_without_held_out_questions_may_get_some(tmp_path):
    begin(tmp_path / "run", "a", "")
    begin(tmp_path / "run", "a", "c", "--resume")
    with pytest.raises(SystemExit, match="--eval_data"):
        begin(tmp_path / "run", "a", "", "--resume")


def test_overwriting_deletes_runs_only(tmp_path):
    """`--out . --overwrite` in a folder of other things must not delete them."""
    (tmp_path / "thesis.tex").write_text("years of work")
    assert (new_run(tmp_path, "--overwrite").out / "thesis.tex").exists()
    (tmp_path / "old.txt").touch()  # now it is a run's
    new_run(tmp_path, "--overwrite")
    assert [file.name for file in tmp_path.glob("*.txt")] == []


def test_lines_behind_the_checkpoint_are_written_again_and_not_twice(tmp_path):
    """A kill between two checkpoints leaves lines of steps that are about to be repeated, and half a line at the end."""
    file = tmp_path / "metrics.jsonl"
    records = [{"phase": p, "step": s} for p, s in (("sft", 1), ("sft", 2), ("grpo", 1), ("grpo", 2), ("grpo", 3))]
    file.write_text("".join(json.dumps(r) + "\n" for r in records) + '{"phase": "gr')
    cut_log(file, ("grpo", 2))
    assert lines(file) == records[:4]
    cut_log(file, ("sft", 1))
    assert lines(file) == records[:1]
    cut_log(file, None)  # a run that begins
    assert lines(file) == []


# --- TensorBoard ------------------------------------------------------------------------------------------------------


def open_tensorboard(run: Path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    return accumulator.EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})


def seen_in(events) -> dict[str, list[tuple[int, float]]]:
    """{tag: [(step, value)]}, as TensorBoard reads the files."""
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Reload().Tags()["scalars"]}


def grpo_line(step: int, **more) -> dict:
    return {"phase": "grpo", "step": step, "reward": step / 8, "grad_norm": math.nan if step == 2 else 0.5,
            "seconds": {"wait": 0.25, "score": float(step)}, **more}


def test_tensorboard_shows_the_numbers_of_the_log(tmp_path):
    """A curve under another name than in the log, or a step of the warm start among those of GRPO, is read wrongly."""
    pytest.importorskip("tensorboard")
    with new_run(tmp_path / "run", "--tensorboard") as run:
        run.log({"phase": "sft", "step": 1, "loss": 2.5, "lr": 1e-3})
        for step in (1, 2, 3):
            run.log(grpo_line(step, **({"evaluation": {"grounding/mIoU": 0.75, "n": 4}} if step == 3 else {})))
        assert seen_in(open_tensorboard(run.out))["grpo/reward"] == [(1, 0.125), (2, 0.25), (3, 0.375)]  # not only at the end
    seen = seen_in(open_tensorboard(run.out))
    assert set(seen) == {"sft/loss", "sft/lr", "grpo/reward", "grpo/grad_norm", "grpo/seconds/wait", "grpo/seconds/score",
                         "grpo/evaluation/grounding/mIoU", "grpo/evaluation/n"}
    assert seen["sft/loss"] == [(1, 2.5)] and seen["grpo/evaluation/grounding/mIoU"] == [(3, 0.75)]
    assert seen["grpo/grad_norm"] == [(1, 0.5), (3, 0.5)]  # a step without a finite gradient is a gap


def test_tensorboard_has_each_step_of_a_resumed_run_once(tmp_path, monkeypatch):
    """The steps behind the checkpoint are done again: shown twice, the curve goes back and forth. And a run that asks for
    TensorBoard late has its whole curve."""
    pytest.importorskip("tensorboard")
    monkeypatch.setattr(Run, "position", lambda run: ("grpo", 2))  # what was done behind step 2 had not been saved
    always_open = open_tensorboard(tmp_path / "run")
    for flags, last in ([], 3), (["--resume", "--tensorboard"], 4), (["--resume"], 5):
        with new_run(tmp_path / "run", *flags) as run:
            run.begin([], [])
            for step in range(3 if flags else 1, last + 1):
                run.log(grpo_line(step))
        if flags:
            for events in (open_tensorboard(run.out), always_open):
                assert [step for step, _ in seen_in(events)["grpo/reward"]] == list(range(1, last + 1))


def test_only_the_first_rank_writes_for_tensorboard(tmp_path):
    """Two processes of a machine that write into one folder draw each point twice."""
    config = train.parse_config(["--out", str(tmp_path), "--tensorboard"])
    with Run(config, World(1, 1, torch.device("cpu")), loader=None) as run:
        run.log(grpo_line(1))
    assert run.board is None and not (tmp_path / "tensorboard").exists()


def test_tensorboard_that_is_not_installed_is_said_before_anything_begins(tmp_path, monkeypatch, capsys):
    """In the first step, after the model has been loaded and the old run deleted, it is too late."""
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(SystemExit):
        train.main(["--out", str(tmp_path / "run"), "--tensorboard"])
    assert "pip install tensorboard" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_full_disk_does_not_cost_the_best_model_so_far(tmp_path, model):
    """Written in place, best/ would be half the new weights when the disk is full, and none of the old ones."""
    run = new_run(tmp_path / "run")
    run.save_model(model, "best")
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, unlimited[1]))
    try:
        with pytest.raises(Exception):
            run.save_model(model, "best")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    saved = weights(tmp_path / "run" / "best")
    assert all(torch.equal(saved[name], weight) for name, weight in model.hf.state_dict().items())
    run.save_model(model, "best")  # there is room again; the leftovers are no obstacle
    assert sorted(path.name for path in (tmp_path / "run").iterdir() if path.is_dir()) == ["best"]


def test_the_warm_start_keeps_all_bits_and_what_is_for_others_half(model, tmp_path):
    """GRPO is held to warm_start/ and a resumed run goes on from it: rounded, it would be another run."""
    run = new_run(tmp_path / "run", "--save_dtype", "bfloat16")
    for name in ("warm_start", "final"):
        run.save_model(model, name)
    exact, rounded = weights(run.out / "warm_start"), weights(run.out / "final")
    for name, weight in model.hf.state_dict().items():
        assert torch.equal(exact[name], weight) and torch.equal(rounded[name], weight.bfloat16().float())
    assert (run.out / "final" / "model.safetensors").stat().st_size < 0.52 * (
        run.out / "warm_start" / "model.safetensors").stat().st_size
    assert all("## Results" in (run.out / name / "README.md").read_text() for name in ("warm_start", "final"))
    assert not (run.out / "final" / "adapter").exists()


@pytest.mark.parametrize("stages, base", [(("--sft_steps", "0"), "start"), ((), "warm_start"), (("--steps", "0"), "start")])
def test_an_adapter_names_the_weights_that_it_belongs_to(model, tmp_path, stages, base):
    """The warm start is folded into the weights, so GRPO's adapter belongs to other weights than the warm start's; beside
    the wrong ones both load, and say nonsense. Without GRPO the warm start's is the adapter of final/."""
    run = new_run(tmp_path / "run", "--lora_rank", "2", *stages)
    model.source = "start"
    lora.add_adapters(model.hf, 2, 32.0, lora.TARGETS, 0)
    if run.config.sft_steps:
        learned = lora.adapter_state(model.hf)
        run.save_model(model, "warm_start", learned)
        settings = json.loads((run.out / "warm_start" / "adapter" / "adapter_config.json").read_text())
        assert settings["base_model_name_or_path"] == "start"
    run.save_model(model, "final")
    settings = json.loads((run.out / "final" / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == (base if base == "start" else str(run.out / base))
    assert (run.out / "final" / "adapter" / "adapter_model.safetensors").exists()


def test_a_checkpoint_of_another_kind_of_run_is_refused(model, tmp_path):
    """Names that do not fit must not be skipped in silence: adapters that stay as they were drawn would be trained on."""
    run, questions = new_run(tmp_path / "run", "--freeze_vision"), Questions([{"id": "a"}], 0, ALONE)
    optimizer = train.make_optimizer(run.config, model, 1e-3)
    run.save("sft", 1, model, optimizer, 0)
    run.checkpoint = newest_checkpoint(run.out)
    saved = names_in(run.checkpoint)
    assert any("lm_head" in name or "embed_tokens" in name for name in saved)
    assert not any("visual" in name for name in saved)  # frozen: not saved
    assert run.restore("sft", model, optimizer, questions) == 1
    everything = dataclasses.replace(run.config, freeze_vision=False)
    with pytest.raises(ValueError, match="visual"):  # as it is now, its vision tower would be lost at the next save
        run.restore("sft", model, train.make_optimizer(everything, model, 1e-3), questions)
    lora.add_adapters(model.hf, 4, 8.0, lora.TARGETS, 0)
    with pytest.raises(ValueError, match="lora_A"):
        run.restore("sft", model, train.make_optimizer(run.config, model, 1e-3), questions)


def test_a_resumed_run_goes_on_where_it_stood_and_keeps_two_checkpoints(model, tmp_path):
    """The step, the place in the stream and the seconds; a checkpoint of the other phase is not this phase's."""
    samples = [{"id": str(i)} for i in range(7)]
    run, questions = new_run(tmp_path / "run", "--save_every", "2"), Questions(samples, 0, ALONE)
    optimizer = train.make_optimizer(run.config, model, 1e-3)
    for step in run.steps("sft", 7, model, optimizer, questions):
        questions.take(3)
        run.seconds["sft"] = 10.0 * (step + 1)
        if step == 6:
            break  # killed in step 7
    run.lock.close()
    assert sorted(path.name for path in run.out.glob("checkpoint-*")) == ["checkpoint-0-sft-000004", "checkpoint-0-sft-000006"]
    again, stream = new_run(tmp_path / "run", "--resume"), Questions(samples, 0, ALONE)
    assert again.position() == ("sft", 6)
    assert again.restore("grpo", model, optimizer, stream) == 0 and stream.cursor == 0
    assert list(again.steps("sft", 7, model, optimizer, stream)) == [6]
    assert stream.cursor == 18 and again.seconds["sft"] == 60.0


# --- out of memory ----------------------------------------------------------------------------------------------------

FOUR_STEPS = [*STARTED, "--sft_steps", "0", "--save_every", "100"]


@pytest.fixture(scope="module")
def unbroken(whole_run, tmp_path_factory) -> Path:
    """A run of four steps that needs no more memory than there is; beside it its model and data."""
    folder = copy_start(whole_run, tmp_path_factory.mktemp("memory"))
    with contextlib.chdir(folder):
        train.main([*FOUR_STEPS, "--out", "unbroken"])
    return folder / "unbroken"


@pytest.mark.parametrize("fails_in", ["sampling", "scoring", "the optimiser's step"])
def test_running_out_of_memory_costs_no_finished_step(unbroken, started, monkeypatch, fails_in):
    """Hours of training between two checkpoints, gone with the longest prompt of the data: what the steps before it have
    learned is saved, and the run that goes on from there is the run that never failed."""
    monkeypatch.chdir(started)

    def too_much_in(call, nth):
        calls = []

        def counted(*args, **named):
            calls.append(call)
            if len(calls) == nth:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return call(*args, **named)
        return counted

    target, name = {"sampling": (VideoLM, "generate"), "scoring": (VideoLM, "logprobs_packed"),
                    "the optimiser's step": (torch.optim.AdamW, "step")}[fails_in]
    with monkeypatch.context() as patched:
        patched.setattr(target, name, too_much_in(getattr(target, name), {"scoring": 5}.get(fails_in, 3)))
        with pytest.raises(SystemExit) as caught:
            train.main([*FOUR_STEPS, "--out", "broken"])
    text = str(caught.value)
    step = re.search(f"out of memory in grpo step (\\d), in {fails_in}", text)  # steps without a live group call nothing
    assert step and int(step[1]) in (3, 4) and "--resume" in text
    assert (started / "broken" / f"checkpoint-1-grpo-{int(step[1]) - 1:06d}").exists()
    train.main([*FOUR_STEPS, "--out", "broken", "--resume"])
    assert_equal_runs(unbroken, started / "broken")


def test_a_prompt_that_is_too_long_costs_no_finished_step(unbroken, started, monkeypatch):
    """Up to --save_every steps were lost with one long question, and the next run lost them again."""
    monkeypatch.chdir(started)
    asked, calls = train.rollout, []

    def too_long_in_step_3(*args, **named):
        calls.append(args)
        if len(calls) == 3:
            raise PromptTooLong("sample a: the prompt has 9 tokens, more than 8")
        return asked(*args, **named)

    with monkeypatch.context() as patched:
        patched.setattr(train, "rollout", too_long_in_step_3)
        with pytest.raises(SystemExit, match="more than 8\nthe state behind step 2 (has been|is) saved: --resume"):
            train.main([*FOUR_STEPS, "--out", "long"])
    train.main([*FOUR_STEPS, "--out", "long", "--resume"])
    assert_equal_runs(unbroken, started / "long")


# --- what is logged of a step -----------------------------------------------------------------------------------------


def test_only_steps_in_a_row_without_a_finite_gradient_end_a_run(tmp_path, capsys):
    """In bfloat16 a step that overflows comes and goes; one count over the whole run would end every long one."""
    run, saved = new_run(tmp_path / "run"), []
    run.begun = SimpleNamespace(phase="sft", model=None, optimizer=None, questions=SimpleNamespace(cursor=30))
    run.save = lambda *what: saved.append(what)

    def step(norm):
        run.check_gradient({"phase": "sft", "step": 9, "grad_norm": norm, "loss": 0.1}, ["a", "b"])

    for norm in [None] * (BAD_STEPS - 1) + [0.5] + [None] * (BAD_STEPS - 1):
        step(norm)
    with pytest.raises(SystemExit, match=r"sft step 9: 5 steps in a row .*\['a', 'b'\]"):
        step(None)
    assert saved == [("sft", 9, None, None, 30)]
    assert capsys.readouterr().out.count("questions: ['a', 'b']") == 9  # each of these steps names its own


def group(name: str, rewards: list[float], gap: float | None = None, lengths=(2, 3)):
    """As much of a grpo.Group as is logged. `gap`: how far each token's scored log-probability is from its sampled one."""
    mask = torch.arange(3) < torch.tensor(lengths)[:, None]  # (G, C)
    sampled = torch.full((2, 3), -1.0)
    junk = torch.where(mask, 0.0, math.nan)  # what stands behind the end token
    return SimpleNamespace(prompt=SimpleNamespace(sample={"id": name}), mask=mask, num_tokens=int(mask.sum()),
                           texts=["x", "y"], scores=[Score(r, {"accuracy": r}, "ok") for r in rewards],
                           reasons=["ok", "truncated"], advantages=torch.tensor([1.0, -1.0]), sampled_logps=sampled,
                           old_logps=None if gap is None else sampled + gap + junk, is_live=len(set(rewards)) > 1)


def test_a_gap_of_log_probabilities_is_that_of_chosen_tokens():
    """Padding behind the end token has been scored too, as anything; and a group without spread has not been scored."""
    gaps = logp_gaps(ALONE, [group("a", [1, 0], 0.25), group("b", [1, 0], -0.5, lengths=(1, 1)), group("c", [1, 1])])
    assert gaps["logp_gap_mean"] == pytest.approx((5 * 0.25 + 2 * 0.5) / 7) and gaps["logp_gap_max"] == 0.5
    assert logp_gaps(ALONE, []) == {"logp_gap_mean": 0.0, "logp_gap_max": 0.0}


def test_a_step_is_described_by_all_that_was_sampled():
    """Groups that --resample has replaced were sampled and scored too; what remains dead is counted among what is kept."""
    sampled = SimpleNamespace(groups=[group("a", [1, 0]), group("b", [1, 1])], replaced=[group("c", [0, 0])], unreadable=1,
                              resampled=1)
    line = describe(ALONE, sampled)
    assert line == {"reward": pytest.approx(3 / 6), "accuracy": pytest.approx(3 / 6), "length": 2.5, "sampled": 15,
                    "truncated": 3, "groups": 2, "dead_groups": 1, "unreadable": 1, "resampled": 1}
    first, second = records_of(sampled.groups[0], 4)
    assert first == {"phase": "grpo", "step": 4, "id": "a", "completion": "x", "reward": 1, "parts": {"accuracy": 1},
                     "reason": "ok", "advantage": 1.0} and second["reason"] == "truncated"


def test_a_step_without_a_single_question_is_a_line_too():
    """All videos of a step unreadable: a division by zero would end the run that was to survive them."""
    line = describe(ALONE, SimpleNamespace(groups=[], replaced=[], unreadable=3, resampled=0))
    assert line["reward"] == line["length"] == line["groups"] == 0 and line["unreadable"] == 3
    assert means_of_sums(ALONE, Counter()) == {"loss": 0, "kl": 0, "clip_fraction": 0, "ratio": 0}


def log_of_two_ranks(out: Path) -> None:
    """One rank has two groups, the other nothing at all."""
    world = start("cpu", wait_minutes=1)
    groups = [group("a", [1, 0], 0.25), group("b", [1, 1])] if world.is_first else []
    sums = Counter(loss=0.5, tokens=10, kl_sum=2.0, ratio_sum=10.0, clipped_tokens=1, entropy_sum=5.0) if groups else Counter()
    line = {**describe(world, SimpleNamespace(groups=groups, replaced=[], unreadable=1, resampled=0)),
            **means_of_sums(world, sums), **logp_gaps(world, groups)}
    (out / f"rank{world.rank}.json").write_text(json.dumps(line))
    stop(world)


def test_ranks_log_the_same_although_one_has_nothing(tmp_path):
    """A rank without groups makes the same calls as the others, or all wait; and its empty sums do not halve the means."""
    run_ranks(tmp_path, 2, log_of_two_ranks, tmp_path)
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first == second and first["entropy"] == 0.5 and first["kl"] == 0.2 and first["logp_gap_mean"] == 0.25
    assert first["reward"] == 0.75 and first["groups"] == 2 and first["unreadable"] == 2


def test_steps_without_any_reward_are_said_once(capsys):
    """All groups dead and no reward from the start: the bar moves for days and nothing is learned."""
    run = object.__new__(Run)
    run.hopeless_steps = 0
    for reward in (0.0, 0.0, 0.25, 0.0, 0.0):
        run.warn_if_hopeless({"reward": reward, "groups": 8})
    assert "warning" not in capsys.readouterr().out
    for _ in range(4):
        run.warn_if_hopeless({"reward": 0.0, "groups": 8})
    text = capsys.readouterr().out
    assert text.count("warning") == 1 and "--max_new_tokens" in text and "--sft_steps" in text and "completions.jsonl" in text


def test_the_alarm_of_a_gap_has_a_limit_for_each_device(capsys):
    """The rounding of bfloat16 is no alarm on a GPU, and would be one on a CPU."""
    for device, gap, warns in (("cpu", 5e-5, False), ("cpu", 1e-3, True), ("cuda", 1e-3, False), ("cuda", 0.1, True)):
        warn_of_gap({"logp_gap_mean": gap}, torch.device(device))
        assert ("position, mask or temperature" in capsys.readouterr().out) == warns


def test_a_clock_gives_each_second_to_one_phase(monkeypatch):
    """A phase that is named twice adds up, what lies behind `stop` is nobody's, and the watch hears of each phase."""
    now, named = [100.0], []
    monkeypatch.setattr("lib.run.time", SimpleNamespace(time=lambda: now[0]))
    world = World(0, 1, torch.device("cpu"), SimpleNamespace(enter=named.append))
    clock = Clock(world, "grpo step 3")
    for phase, seconds in (("wait", 1.0), ("sample", 2.0), ("wait", 3.0)):
        clock(phase)
        now[0] += seconds
    clock.stop()
    now[0] += 50
    clock.stop()
    assert clock.rounded() == {"wait": 4.0, "sample": 2.0} and clock.share("wait") == pytest.approx(4 / 6, abs=1e-4)
    assert named == ["grpo step 3", "grpo step 3: wait", "grpo step 3: sample", "grpo step 3: wait"]
