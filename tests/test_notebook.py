"""docs/toy.ipynb is what tests/notebook.py writes, and it runs."""

import json
import re
import shutil
import subprocess

import pytest
from conftest import ROOT

import notebook


def test_the_committed_notebook_is_the_generated_one():
    """A notebook that is edited by hand, or left behind by README, shows commands that are gone."""
    assert json.loads(notebook.NOTEBOOK.read_text(encoding="utf-8")) == notebook.notebook(), "python tests/notebook.py writes it"


def test_its_code_is_python_with_commands_that_exist():
    """Every line that is no shell or package command compiles, and every program that is called is there."""
    for cell in notebook.notebook()["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "code":
            compile(re.sub(r"^[!%].*$", "pass", text, flags=re.MULTILINE), cell["id"], "exec")
            for program in re.findall(r"^!(?:torchrun|python) (?:-m )?(\S+)", text, re.MULTILINE):
                assert (ROOT / (program if program.endswith(".py") else program.replace(".", "/") + ".py")).exists(), program


@pytest.mark.slow
def test_it_runs_from_its_first_cell_to_its_last(tmp_path):
    """Five minutes of it are the default run. In a copy of what is committed: outputs of one's own must not help."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / file)
    book = nbformat.reads(json.dumps(notebook.notebook()), as_version=4)
    nbclient.NotebookClient(book, timeout=3600, resources={"metadata": {"path": str(tmp_path / "docs")}}).execute()
    said = "".join(output.get("text", "") for cell in book.cells if cell.cell_type == "code" for output in cell.outputs)
    assert "grounding/mIoU" in said and "advantage" in said and "second" in said
    assert sum(1 for cell in book.cells if cell.cell_type == "code" for output in cell.outputs
               if "image/png" in output.get("data", {})) == 2
