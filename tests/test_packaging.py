"""pyproject.toml and the public workflow: the modules that are installed, one list of packages, and what is run in public."""

import tomllib

import pytest
from conftest import ROOT

yaml = pytest.importorskip("yaml")  # comes with transformers
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_what_is_installed_is_what_there_is():
    """A module that is left out is missing only where somebody has installed the code."""
    setuptools = PROJECT["tool"]["setuptools"]
    assert sorted(setuptools["py-modules"]) == sorted(path.stem for path in ROOT.glob("*.py"))
    assert setuptools["packages"] == ["lib", "tools"]
    assert all((ROOT / name / "__init__.py").is_file() for name in setuptools["packages"])


def test_there_is_one_list_of_packages():
    """Two lists differ after the first update."""
    assert PROJECT["project"]["dynamic"] == ["dependencies"] and "dependencies" not in PROJECT["project"]
    assert PROJECT["tool"]["setuptools"]["dynamic"] == {"dependencies": {"file": ["requirements.txt"]}}


def test_the_settings_of_the_tests_stay_in_pytest_ini():
    """pytest reads one file: a table here would be ignored beside pytest.ini, or hide it where that is gone."""
    assert "pytest" not in PROJECT["tool"] and (ROOT / "pytest.ini").is_file()


def test_the_public_workflow_runs_what_is_run_here():
    """Other commands there would be green when a clean clone is not."""
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert set(workflow[True]) == {"push", "pull_request"}  # YAML reads the key `on` as true
    (job,) = workflow["jobs"].values()
    assert job["runs-on"].startswith("ubuntu")
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    (version,) = (step["with"]["python-version"] for step in job["steps"] if "python-version" in step.get("with", {}))
    assert version == "3.11" and (ROOT / ".ci" / "run").stat().st_mode & 0o111
