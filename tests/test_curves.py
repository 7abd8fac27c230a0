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


def write_run(folder, evaluated: dict[int, float], after: float | None = 0.9):
    """What a run of four GRPO steps leaves, by the names of lib/run.py. `evaluated`: mIoU by step."""
    lines = [{"phase": "sft", "step": step, "loss": 1.0} for step in (1, 2)]
    for step in (1, 2, 3, 4):
        evaluation = {"evaluation": {"grounding/mIoU": evaluated[step]}} if step in evaluated else {}
        lines.append({"phase": "grpo", "step": step, "reward": step / 3, "groups": 16, "dead_groups": step, **evaluation})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    blind = {"whole_video": {"grounding/mIoU": 0.2}, "best_constant_span": {"grounding/mIoU": 0.3}, "start_box_copied": {"n": 0}}
    summary = {"after_sft": {"grounding/mIoU": 0.5}, "after": after and {"grounding/mIoU": after}, "baselines": blind}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def test_a_run_becomes_a_file_with_a_row_for_each_step(tmp_path):
    """Rewards beside another step's evaluation, or a warm start's value from after GRPO, would bend the curve unseen."""
    curves.write_table(tmp_path / "x.csv", curves.rows_of(write_run(tmp_path, {2: 0.7, 4: 0.8})))
    assert curves.read_table(tmp_path / "x.csv") == [
        {"step": 0, "mIoU": 0.5, "best_blind": 0.3},
        {"step": 1, "reward": 0.3333, "groups": 16, "dead_groups": 1},
        {"step": 2, "reward": 0.6667, "groups": 16, "dead_groups": 2, "mIoU": 0.7},
        {"step": 3, "reward": 1.0, "groups": 16, "dead_groups": 3},
        {"step": 4, "reward": 1.3333, "groups": 16, "dead_groups": 4, "mIoU": 0.8},
    ]


def test_the_last_step_has_the_final_evaluation(tmp_path):
    """With steps that --eval_every does not divide, the curve would end before the result does."""
    assert [row.get("mIoU") for row in curves.rows_of(write_run(tmp_path, {3: 0.7}))] == [0.5, None, None, 0.7, 0.9]
    with pytest.raises(SystemExit, match="summary.json: the figure needs a finished run"):
        curves.rows_of(write_run(tmp_path, {}, after=None))


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
