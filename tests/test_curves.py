"""README's figure: drawn from the committed files, and these from the logs of runs."""

import ast
import json
import math

import curves
import pytest
from conftest import ROOT


def test_the_committed_figure_is_drawn_from_the_committed_files(tmp_path):
    """A figure that was edited, or is older than the runs beside it, shows results that nobody has measured. Also: an id by
    chance or a date in the file would make every drawing another one."""
    curves.draw([curves.read_table(table) for table in curves.TABLES], tmp_path / "curves.svg")
    assert (tmp_path / "curves.svg").read_text() == curves.FIGURE.read_text(), "python tests/curves.py draws it again"


def test_a_run_becomes_a_file_with_a_row_for_each_step(whole_run, tmp_path):
    """Rewards beside another step's evaluation, or a warm start's value from after GRPO, would bend the curve unseen."""
    curves.write_table(tmp_path / "x.csv", curves.rows_of(whole_run))
    rows = curves.read_table(tmp_path / "x.csv")
    summary = json.loads((whole_run / "summary.json").read_text())
    lines = [json.loads(line) for line in (whole_run / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["phase"] == "grpo"]
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert rows[0] == pytest.approx({"step": 0, "mIoU": summary["after_sft"]["grounding/mIoU"],
                                     "best_blind": summary["baselines"]["best_constant_span"]["grounding/mIoU"]}, abs=1e-4)
    for row, line in zip(rows[1:], lines, strict=True):
        assert {name: row[name] for name in ("reward", "groups", "dead_groups")} == pytest.approx(
            {name: line[name] for name in ("reward", "groups", "dead_groups")}, abs=1e-4)
        assert row.get("mIoU") == pytest.approx(line["evaluation"]["grounding/mIoU"], abs=1e-4) if "evaluation" in line else True
    assert ["mIoU" in row for row in rows] == [True, False, True, False, True]
    assert rows[-1]["mIoU"] == pytest.approx(summary["after"]["grounding/mIoU"], abs=1e-4)


def test_the_last_step_has_the_final_evaluation(whole_run, tmp_path):
    """With steps that --eval_every does not divide, the curve would end before the result does."""
    lines = [json.loads(line) for line in (whole_run / "metrics.jsonl").read_text().splitlines()]
    (tmp_path / "metrics.jsonl").write_text("".join(
        json.dumps({name: value for name, value in line.items() if name != "evaluation"}) + "\n" for line in lines))
    summary = json.loads((whole_run / "summary.json").read_text())
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert curves.rows_of(tmp_path)[-1]["mIoU"] == summary["after"]["grounding/mIoU"]
    (tmp_path / "summary.json").write_text(json.dumps({**summary, "after": None}))
    with pytest.raises(SystemExit, match="summary.json: the figure needs a finished run"):
        curves.rows_of(tmp_path)


def test_the_mean_knows_no_future():
    """A centred mean would show a rise before it happens."""
    values = [0.0] * 15 + [1.0] * 15
    smoothed = curves.smooth(values)
    assert smoothed[14] == 0 and smoothed[15] == pytest.approx(1 / curves.WINDOW) and smoothed[-1] == 1


def test_the_committed_files_are_those_of_three_different_runs():
    tables = [curves.read_table(table) for table in curves.TABLES]
    assert len({str(rows) for rows in tables}) == 3
    for rows in tables:
        assert [row["step"] for row in rows] == list(range(len(rows))) and {"mIoU", "best_blind"} <= set(rows[0])
        assert "mIoU" in rows[-1] and all(math.isfinite(value) for row in rows for value in row.values())


def test_nothing_else_needs_the_library_that_draws():
    """It is no package of the project: training without it must go on."""
    for path in (*ROOT.glob("*.py"), *(ROOT / "lib").glob("*.py"), *(ROOT / "tools").glob("*.py"), *(ROOT / "tests").rglob("*.py")):
        imported = {alias.name if isinstance(node, ast.Import) else node.module or ""
                    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
                    if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names}
        drawing = {name for name in imported if name.startswith("matplotlib")}
        assert not drawing or path.name == "curves.py", path
    assert "matplotlib" not in (ROOT / "requirements.txt").read_text()
