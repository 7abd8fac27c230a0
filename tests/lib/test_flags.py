"""Flags from a dataclass: what is left out, given, saved and asked for with --help."""

import json
from dataclasses import asdict, dataclass, fields, replace
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

import train
from lib.flags import fill, flag, given_flags, help_of, make_parser, range_problem, settings_of_the_run
from tools import data_commands, evaluate, plan

first, second = (partial(flag, group=title) for title in ("what it is", "where it is"))


@dataclass
class Settings:
    name: str = first("toy", "of the thing", with_model="real", choices=("toy", "real"))
    parts: list[str] = first(("a", "b"), "of it; 100% of them", with_model=("a", "b", "c"), choices=("a", "b", "c"))
    size: int = first(4, "of each part", with_model=0)
    is_round: bool = first(False, "no corners", with_model=True)
    rate: float | None = first(None, "by default as before", kind=float)
    out: str = second("runs/toy", "folder", with_model="runs/run")
    overwrite: bool = second(False, "delete what is there")


def parse(*arguments: str) -> dict:
    return given_flags(make_parser(Settings, "A test."), list(arguments))


def test_help_has_a_group_for_each_title_and_a_line_for_each_flag(capsys):
    """A flag without help, or a per cent sign that argparse takes for a format, which crashes --help and only --help."""
    with pytest.raises(SystemExit) as end:
        parse("--help")
    assert end.value.code == 0
    text = capsys.readouterr().out
    what, where = text.index("what it is:"), text.index("where it is:")
    assert what < text.index("  --name") < text.index("  --rate") < where < text.index("  --out") < text.index("  --overwrite")
    assert "no corners (default: False; with --model: True)" in " ".join(text.split())
    assert "100% of them (default: a b; with --model: a b c)" in " ".join(text.split())
    assert "by default as before\n" in text  # None is no default to print


def test_a_flag_that_is_left_out_takes_its_default():
    """And with a model another one, also where that is 0, False or empty."""
    assert parse() == {}
    assert asdict(fill(Settings, {})) == {"name": "toy", "parts": ["a", "b"], "size": 4, "is_round": False, "rate": None,
                                          "out": "runs/toy", "overwrite": False}
    given = parse("--parts", "c", "--rate", "0.5")
    with_model = fill(Settings, given, with_model=True)
    assert (with_model.name, with_model.size, with_model.is_round, with_model.out) == ("real", 0, True, "runs/run")
    assert (with_model.parts, with_model.rate) == (["c"], 0.5)


def test_a_field_that_is_no_flag_keeps_its_default():
    """`make_parser` passes over it; filling in must not end in a KeyError."""
    @dataclass
    class Mixed:
        name: str = first("toy", "of the thing", with_model="real")
        known: int = 3

    assert fill(Mixed, {}, with_model=True) == Mixed("real", 3)


def test_defaults_are_not_shared():
    """A list that one settings object changes must not be the default of the next."""
    fill(Settings, {}).parts.append("x")
    assert fill(Settings, {}).parts == ["a", "b"]


@pytest.mark.parametrize("arguments, complaint", [
    (["--nam", "toy"], "unrecognized"), (["--name", "other"], "invalid choice"), (["--parts", "a", "d"], "invalid choice"),
    (["--size", "4.5"], "invalid int"), (["--is_round", "False"], "unrecognized")])
def test_what_is_no_flag_or_no_value_is_refused(arguments, complaint, capsys):
    """An abbreviation that works today is another flag's tomorrow; "--is_round False" would be true."""
    with pytest.raises(SystemExit):
        parse(*arguments)
    text = capsys.readouterr().err
    assert complaint in text and len(text.splitlines()) == 1  # not forty lines of usage in front


def test_switches_go_both_ways():
    assert parse("--is_round") == {"is_round": True} and parse("--no-is_round") == {"is_round": False}


# --- ranges of numbers -------------------------------------------------------------------------------------------------

EVAL = ["--model", "m", "--data", "a.jsonl", "--out", "o"]
PROGRAMS = {"train": (train.parse_config, []), "eval": (evaluate.parse_arguments, EVAL), "plan": (plan.parse_arguments, []),
            "check": (data_commands.parse_arguments, ["check", "x.jsonl"]),
            "select": (data_commands.parse_arguments, ["select", "p.jsonl", "--data", "x.jsonl", "--out", "y.jsonl"]),
            "toy": (data_commands.parse_arguments, ["toy", "--out", "o"])}


@pytest.mark.parametrize("program, name, value, wanted", [
    ("train", "beta", "nan", "a number from 0 to 100"), ("train", "beta", "inf", "a number from 0 to 100"),
    ("train", "lr", "nan", "a number from 0 to 1"), ("train", "lr", "-1e-6", "a number from 0 to 1"),
    ("train", "steps", "-999999999", "a whole number from -1000 to 10000000"),
    ("train", "steps", "1e3", "a whole number from"), ("train", "steps", "nan", "a whole number from"),
    ("train", "lora_rank", "100000", "a whole number from 0 to 1024"), ("train", "fps", "0", "a number from 0.01 to 1000"),
    ("train", "clip_low", "2", "a number from 0 to 1"), ("train", "num_workers", "-1", "a whole number from 0 to 256"),
    ("train", "temperature", "0", "a number from 0.01 to 100"), ("train", "questions", "0", "a whole number from 1"),
    ("train", "group_size", "0", "a whole number from 1"), ("train", "save_every", "0", "a whole number from 1"),
    ("train", "wait_minutes", "0", "a number from 0.01"), ("train", "lora_alpha", "0", "a number from 0.01"),
    ("train", "frame_cache_gb", "0", "a number from 0.01"), ("train", "seed", "9" * 5000, "a whole number from 0"),
    ("train", "max_frames", "1", "a whole number from 2"), ("train", "min_pixels", "-5", "a whole number from 784"),
    ("eval", "fps", "0", "a number from 0.01"), ("eval", "temperature", "nan", "a number from 0 to 100"),
    ("eval", "temperature", "-1", "a number from 0 to 100"), ("eval", "num_samples", "0", "a whole number from 1"),
    ("eval", "num_workers", "-1", "a whole number from 0"), ("eval", "batch", "0", "a whole number from 1"),
    ("plan", "gpus", "0", "a whole number from 1"), ("plan", "epochs", "nan", "a number from 0.001"),
    ("check", "num_workers", "-1", "a whole number from 0"), ("check", "deadline", "nan", "a number from 0.1"),
    ("check", "target_fps", "inf", "a number from 0.01"), ("check", "max_frames", "0", "a whole number from 2"),
    ("select", "min_std", "nan", "a number from 0 to 1"), ("select", "std_quantile", "2", "a number from 0 to 1"),
    ("select", "since", "-1", "a whole number from 0"), ("toy", "train", "0", "a whole number from 1"),
    ("toy", "seed", "-1", "a whole number from 0"),
])
def test_a_number_out_of_range_is_refused_with_flag_value_and_range(program, name, value, wanted, capsys):
    """`--beta nan` trained; `--num_workers -1` died in a thread pool."""
    parse, arguments = PROGRAMS[program]
    with pytest.raises(SystemExit):
        parse([*arguments, f"--{name}", value])
    text = capsys.readouterr().err.splitlines()[-1]
    assert f"--{name}: {value[:40]} is not {wanted}" in text


@pytest.mark.parametrize("cls", [train.Config, evaluate.Flags, plan.Job])
def test_every_number_has_a_range_that_its_help_tells_and_its_defaults_keep(cls):
    for f in fields(cls):
        if f.metadata and f.metadata["kind"] in (int, float):
            low, high = f.metadata["within"]
            assert f"{low:.10g} to {high:.10g}" in help_of(f), f.name
            assert all(low <= value <= high for value in (f.default, f.metadata["with_model"]) if value is not None), f.name


@given(st.floats() | st.integers() | st.text())
def test_settings_from_a_file_are_held_to_the_same_ranges(value):
    """asked.json beside a model, or config.json of a resumed run, may hold anything."""
    problem = range_problem(replace(train.Config(), beta=value))
    assert (problem is None) == (not isinstance(value, str) and 0 <= value <= 100)
    assert problem is None or problem.startswith(f"--beta is {value}; it must be a number from 0 to 100")


# --- a resumed run ----------------------------------------------------------------------------------------------------


def resumed(given: dict) -> dict:
    return settings_of_the_run(Settings, given, ("name", "parts"), make_parser(Settings, "A test."))


def test_a_resumed_run_keeps_what_it_had(tmp_path):
    """Flags that are left out would take the defaults of another run; and the flag that began it would delete it now."""
    saved = asdict(fill(Settings, {"size": 9, "out": str(tmp_path), "overwrite": True, "name": "real"}))
    (tmp_path / "config.json").write_text(json.dumps(saved))
    kept = resumed({"out": str(tmp_path), "is_round": True, "name": "real"})
    assert "overwrite" not in kept and (kept["size"], kept["name"], kept["is_round"]) == (9, "real", True)
    assert fill(Settings, kept).overwrite is False


def test_what_makes_it_another_run_is_refused(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(asdict(fill(Settings, {}))))
    with pytest.raises(SystemExit):
        resumed({"out": str(tmp_path), "parts": ["a"]})
    assert "this run has --parts ['a', 'b'], not ['a']; name another --out" in capsys.readouterr().err


def test_a_setting_that_the_saved_run_does_not_know_takes_its_default(tmp_path):
    """A run of an earlier version has fewer settings, or other ones beside."""
    (tmp_path / "config.json").write_text(json.dumps({"size": 9, "gone": 1}))
    assert resumed({"out": str(tmp_path)}) == {"size": 9, "out": str(tmp_path)}


def test_a_folder_without_a_run_has_nothing_to_keep(tmp_path, monkeypatch):
    """With --resume from the start, a command can be given again as it is; without --out it is the default folder's."""
    monkeypatch.chdir(tmp_path)
    assert resumed({"size": 3}) == {"size": 3}
    (tmp_path / "runs" / "toy").mkdir(parents=True)
    (tmp_path / "runs" / "toy" / "config.json").write_text(json.dumps({"size": 9}))
    assert resumed({}) == {"size": 9}
