"""The script for a machine with a card is tried without one: there, every minute is paid for and nobody can look twice."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import gpu_check
import pytest
import torch
from conftest import ROOT

from model import VideoLM

SCRIPT = ROOT / "tests" / "gpu_run.sh"
# Tried by the test of the whole script: runs of train.py, the benchmark, and what the compiler takes long for.
SLOW = ("toy_plain", "toy_lora", "toy_shard", "toy_offload", "dry_run", "peers", "compiled_decoding", "default_run",
        "decode_3b", "decode_7b")
OF_SLOW = ("toy ", "compiled decoding", "decode 3b", "decode 7b")  # rows of those begin so
CARD_ONLY = {"decode 3b: kernels of a step", "decode 7b: kernels of a step", "decode step without a wait for the device"}


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> dict[str, dict]:
    """The rows of all sections that take no longer than a moment. A model that has no `compile_decoding` is given one."""
    out, had = tmp_path_factory.mktemp("gpu"), hasattr(VideoLM, "compile_decoding")
    if not had:
        VideoLM.compile_decoding = False
    try:
        code = gpu_check.main(["--device", "cpu", "--tiny", "--out", str(out),
                               *(name for name in gpu_check.SECTIONS if name not in SLOW)])
    finally:
        if not had:
            del VideoLM.compile_decoding
    rows = gpu_check.read_rows(out)
    assert code == 0, [row for name, row in rows.items() if name.startswith("FAILED")]
    return rows


@pytest.mark.parametrize("section", [name for name in gpu_check.SECTIONS if name not in SLOW])
def test_every_section_says_something_in_tiny_sizes(measured, section):
    """A section that ends at a wrong name costs its whole result where it cannot be mended."""
    rows = [row for row in measured.values() if row["section"] == section]
    assert len(rows) >= 2, "nothing but its seconds"
    assert not any(row["what"].startswith("FAILED") for row in rows)
    assert all(row["value"] == row["value"] for row in rows)  # no nan


def test_what_is_expected_is_what_is_measured(measured):
    """An expectation under another name than the row's would stand alone in the table, and hold whatever happens."""
    wanted = {name for name in {**gpu_check.ESTIMATES, **gpu_check.LIMITS} if not name.startswith(OF_SLOW)}
    assert wanted - set(measured) == {name for name in CARD_ONLY if not name.startswith(OF_SLOW)}
    assert all(gpu_check.expectation(row)[1] in ("yes", "") for row in measured.values())
    held = {name for name, row in measured.items() if gpu_check.expectation(row)[1] == "yes"}
    assert held == {name for name in gpu_check.LIMITS if not name.startswith(OF_SLOW)} - CARD_ONLY


def test_other_ways_compute_the_same(tmp_path):
    """A faster way that computes something else would be a reason to change the code for the worse."""
    check = gpu_check.Check("cpu", True, tmp_path)
    q, k, v = (x.float() for x in gpu_check.heads(check, 2, 30, 70))
    torch.testing.assert_close(gpu_check.explicit_mask(q, k, v, 0.1), gpu_check.lower_right(q, k, v, 0.1))
    hidden, weight = torch.randn(3, 64), torch.rand(64)
    torch.testing.assert_close(gpu_check.library_norm(hidden, weight, 1e-6), gpu_check.fused_norm(hidden, weight, 1e-6))
    logps, noise = torch.randn(500, 1300).log_softmax(-1), torch.rand(500, dtype=torch.float64)
    assert torch.equal(gpu_check.one_level(logps, noise), gpu_check.two_levels(logps, noise))


def test_ways_are_put_back(model):
    """Else the section behind would measure another code than the one that trains."""
    before = gpu_check.model_file.causal_attention
    with gpu_check.attention("explicit mask, no cuDNN"), gpu_check.norms_by(model.hf, gpu_check.fused_norm):
        assert gpu_check.model_file.causal_attention is gpu_check.explicit_mask
        assert "forward" in model.text.norm.__dict__
        torch.testing.assert_close(model.text.norm(torch.ones(1, 96)), model.text.norm.weight[None], rtol=1e-4, atol=0)
    assert gpu_check.model_file.causal_attention is before


# --- the table --------------------------------------------------------------------------------------------------------


def test_the_table_compares_and_forgives_a_killed_writer(tmp_path):
    rows = [{"section": "exact", "what": "float32, prompt shared: largest |log p - CPU's|", "value": 0.5, "unit": ""},
            {"section": "decode_3b", "what": "decode 3b, 8 rows: a step", "value": 99.0, "unit": "ms"},
            {"section": "decode_3b", "what": "decode 3b, 8 rows: a step", "value": 13.5, "unit": "ms"},
            {"section": "memory", "what": "memory of a step, 3b", "value": 70.0, "unit": "GB", "expected": 72.0,
             "limits": [64.8, 79.2]},
            {"section": "parts", "what": "part memory", "value": 0, "unit": "exit code"}]
    (tmp_path / "gpu_check.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"section": "mem')
    lines = {line.split("|")[0].strip(): [cell.strip() for cell in line.rsplit("|", 3)[1:]]
             for line in gpu_check.table(tmp_path).replace("|log p - CPU's|", "log p").splitlines() if line.count("|") > 2}
    assert lines["float32, prompt shared: largest log p"] == ["0.5", "0 to 0.001", "NO"]
    assert lines["decode 3b, 8 rows: a step"] == ["13.5 ms", "6.4 to 7.1 (ideal 2.1)", "x 2.00"]
    assert lines["memory of a step, 3b"] == ["70 GB", "72: 64.8 to 79.2", "yes"]
    assert lines["part memory"] == ["0 exit code", "0", "yes"]
    assert lines["decode 7b, 8 rows: a step"][0] == "not measured"
    assert gpu_check.main(["--out", str(tmp_path), "--table"]) == 1  # something that must hold does not


def test_a_failure_hides_nothing_behind_it(tmp_path, monkeypatch):
    def broken(check):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(gpu_check, "SECTIONS", {"broken": broken, "env": gpu_check.env})
    assert gpu_check.main(["--device", "cpu", "--tiny", "--out", str(tmp_path)]) == 1
    text = (tmp_path / "table.txt").read_text()
    assert "FAILED: section broken: RuntimeError: out of luck" in text and "machine" in text


# --- the shell script -------------------------------------------------------------------------------------------------


def test_the_limits_of_all_parts_add_up_to_less_than_20_minutes():
    """What is started with & and waited for together counts once."""
    steps = re.split(r"(?:^|& )wait$", SCRIPT.read_text(), flags=re.MULTILINE)
    limits = [[int(n) for n in re.findall(r"^(?:part|check) +(\d+) ", step, re.MULTILINE)] for step in steps]
    assert 0 < sum(max(step) for step in limits if step) < 1200
    named = set(re.findall(r"\w+", " ".join(re.findall(r"^check +\d+ \w+ (.*?) &", SCRIPT.read_text(), re.MULTILINE))))
    assert named == set(gpu_check.SECTIONS)  # no section is left out


@pytest.fixture
def bare_machine(tmp_path):
    """The script in a folder of its own, and a python that only writes down how it was called: (start, calls, out)."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "gpu_run.sh").write_text(SCRIPT.read_text())
    python = tmp_path / "python"
    python.write_text('#!/usr/bin/env bash\necho "$PYTHONPATH: $*" >>"$CALLS"\necho "said by $*"\n'
                      '[[ $* == *exact* ]] && exec sleep "${SLEEP:-0}"\nexit 0\n')
    python.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(python), "CALLS": str(tmp_path / "calls"), "OUT": str(tmp_path / "out"),
                   "PYTHONPATH": ""}

    def start(**more) -> subprocess.Popen:
        return subprocess.Popen(["bash", str(tmp_path / "tests" / "gpu_run.sh")], env={**environment, **more},
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    return start, tmp_path / "calls", tmp_path / "out"


def test_wheels_that_were_carried_are_searched_first(bare_machine, tmp_path):
    start, calls, out = bare_machine
    assert start().wait(timeout=60) == 0
    assert "pip" not in calls.read_text()
    (tmp_path / ".whl").mkdir()
    (tmp_path / ".whl" / "av-1-any.whl").touch()
    calls.unlink()
    assert start().wait(timeout=60) == 0
    pip, *others = calls.read_text().splitlines()
    folder = re.search(r"-m pip install .*--no-index .*--target (\S+/site) \.whl/av-1-any\.whl", pip)[1]
    assert others and all(line.startswith(f"{folder}: ") for line in others)
    assert not Path(folder).exists()  # and nothing of it stays


def test_a_killed_run_leaves_what_it_had(bare_machine):
    """Machines are taken away: what ended before is in all.log, and so is what a part had said until then."""
    start, _, out = bare_machine
    process = start(SLEEP="60")
    until = time.time() + 30
    while time.time() < until and not ((out / "all.log").exists() and (out / "all.log").read_text().count("==") == 8):
        time.sleep(0.05)
    ended = (out / "all.log").read_text()
    assert "== dry_run: exit code 0" in ended and "== exact" not in ended
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 143
    everything = (out / "all.log").read_text()
    assert "== exact: exit code 143" in everything and "said by tests/gpu_check.py --device cuda" in everything
    rows = gpu_check.read_rows(out)
    assert rows["part exact"]["value"] == 143 and rows["part dry_run"]["value"] == 0 and "part micro" not in rows


@pytest.mark.slow
def test_the_whole_script_runs_without_a_card(tmp_path):
    environment = {**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(["bash", str(SCRIPT), "--device", "cpu", "--tiny"], env=environment, capture_output=True,
                            text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    text = (tmp_path / "table.txt").read_text()
    assert text in result.stdout and "FAILED" not in text
    rows = gpu_check.read_rows(tmp_path)
    assert {row["section"] for row in rows.values()} == {"parts", *gpu_check.SECTIONS}
    missing = {**gpu_check.ESTIMATES, **gpu_check.LIMITS}.keys() - rows.keys() - CARD_ONLY
    assert all(name.startswith("compiled decoding") for name in missing)  # of a model that cannot be told to compile
