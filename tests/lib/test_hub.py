"""The card says what the run was, and a push that fails costs nothing."""

import dataclasses
import shlex
from collections import Counter
from unittest.mock import create_autospec

import pytest
from huggingface_hub import HfApi

import train
from lib import hub

REAL = ["--model", "Qwen/Qwen2.5-VL-3B-Instruct", "--train_data", "a.jsonl@my videos:50%", "b.jsonl", "--out", "runs/x"]
COUNTS = {"train": Counter(grounding=12, qa=3), "eval": Counter(grounding=4)}
RESULTS = {"before": {"grounding/mIoU": 0.25, "n": 4}, "after_sft": None, "after": {"grounding/mIoU": 0.5, "n": 4},
           "selected": {"ids": ["a", "b"]}, "best": {"step": 7, "score": 0.6, "metrics": {"grounding/mIoU": 0.625, "n": 4}}}


def card(arguments=REAL, results=RESULTS, processes=1, name="final", counts=COUNTS) -> str:
    return hub.card(train.parse_config(arguments), results, counts, processes, name)


def command_in(text: str) -> list[str]:
    return shlex.split(text.split("```bash\n")[1].split("\n```")[0])


# --- the card ---------------------------------------------------------------------------------------------------------


def test_the_card_has_data_settings_results_and_the_command():
    text = card(processes=8)
    assert text.startswith("---\nbase_model: Qwen/Qwen2.5-VL-3B-Instruct\nlibrary_name: transformers\n")
    assert "`a.jsonl@my videos:50%`, `b.jsonl` (12 grounding, 3 qa)" in text and "selected: 2" in text
    assert "learning rate 1e-06, KL weight 0.04" in text and "8 processes" in text
    assert "| | before | after GRPO |\n|---|---|---|\n| grounding/mIoU | 0.250 | 0.500 |\n| n | 4 | 4 |\n" in text
    assert command_in(text)[:3] == ["torchrun", "--nproc_per_node=8", "train.py"]
    assert "| | before | GRPO step 7 |\n|---|---|---|\n| grounding/mIoU | 0.250 | 0.625 |" in card(name="best")


@pytest.mark.parametrize("arguments", [
    REAL, [], ["--sft_steps", "3", "--no-freeze_vision", "--tasks", "qa", "gqa", "--seed", "4"],
    [*REAL, "--lora_rank", "8", "--lr", "2e-5", "--keep_dead_groups", "--no-gradient_checkpointing", "--steps", "-3"],
])
def test_the_command_repeats_the_run(arguments):
    """The line that was typed last may be `--resume` alone."""
    command = command_in(card(arguments))
    assert "--out" not in command and "--lr 1e-06" not in " ".join(command)  # neither places nor defaults
    config = train.parse_config(arguments)
    assert train.parse_config(command[2:]) == dataclasses.replace(config, out="runs/run" if config.model else "runs/toy")


def test_only_a_hub_id_is_named_as_the_base_model(tmp_path):
    """The hub refuses a card whose base model is a path, and with it the upload."""
    assert "base_model" not in card([]) and "random weights on synthetic clips" in card([]) and "licence" not in card([])
    for model in (str(tmp_path), "runs/x/final"):
        text = card(["--model", model, *REAL[2:]])
        assert "base_model" not in text and f"`{model}`" in text and "licence" in text


def test_a_run_that_was_not_evaluated_has_a_card_too():
    text = card(results={"before": None, "seconds": {}}, counts={"train": Counter(qa=1), "eval": Counter()})
    assert "Not evaluated." in text and "results: none" in text


# --- the hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def api(monkeypatch):
    """Takes the arguments that the real client takes, and no others."""
    fake = create_autospec(HfApi, instance=True)
    fake.create_repo.return_value.repo_id = "me/model"
    monkeypatch.setattr(hub, "HfApi", lambda: fake)
    return fake


def test_a_folder_is_pushed_to_a_private_repository(api, tmp_path, capsys):
    """A public one would show a model, and the names of its data, that nobody has decided to show."""
    assert hub.push(tmp_path / "final", "model")
    api.create_repo.assert_called_once_with("model", private=True, exist_ok=True)
    (call,) = api.upload_folder.call_args_list
    assert call.kwargs["repo_id"] == "me/model" and call.kwargs["folder_path"] == tmp_path / "final"
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize("error", [OSError("no route\nto host"), RuntimeError(""), ValueError("403")])
def test_a_push_that_fails_is_a_line_of_warning(api, tmp_path, capsys, error):
    """The run is over and its model is on the disk: no exit status of failure for a network that is down."""
    api.upload_folder.side_effect = error
    assert hub.push(tmp_path / "final", "me/model") is False
    out = capsys.readouterr().out
    assert out.startswith("warning: ") and "hf upload me/model" in out and out.count("\n") == 1


def test_nothing_is_pushed_unless_asked_for(monkeypatch):
    pushed = []
    monkeypatch.setattr(hub, "push", lambda *arguments: pushed.append(arguments))
    monkeypatch.setattr(hub, "warn_without_token", lambda: None)
    monkeypatch.setattr(train, "carry_out", lambda config, world: None)
    train.main(["--device", "cpu"])
    assert not pushed
    train.main(["--device", "cpu", "--out", "runs/y", "--push_to_hub", "me/y"])
    assert pushed == [(train.Path("runs/y/final"), "me/y")]


def test_a_name_that_the_hub_would_refuse_is_refused_at_the_start(capsys):
    """And not after the hours of training."""
    with pytest.raises(SystemExit):
        train.parse_config(["--push_to_hub", "https://hub/me/model"])
    assert "--push_to_hub" in capsys.readouterr().err
    assert train.parse_config(["--push_to_hub", "me/model"]).push_to_hub == "me/model"
