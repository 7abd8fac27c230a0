"""Models that are saved here load with the releases of transformers that others use, and say the same there.

OTHER_RELEASES names folders of `pip install --target FOLDER transformers==VERSION`, with a colon between them:

    OTHER_RELEASES=releases/4.57.6:releases/4.51.3 python -m pytest -m slow tests/test_elsewhere.py
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

RELEASES = [folder for folder in os.environ.get("OTHER_RELEASES", "").split(":") if folder]
SCRIPT = ROOT / "tests" / "elsewhere.py"


def call(*arguments, **environment: str) -> str:
    done = subprocess.run([sys.executable, SCRIPT, *arguments], env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    call("write", folder)
    return folder


@pytest.mark.slow
def test_they_load_here_with_the_plain_library(saved):
    assert call("read", saved).count("largest difference") >= 4


@pytest.mark.slow
@pytest.mark.skipif(not RELEASES, reason="OTHER_RELEASES names no folder of another release")
@pytest.mark.parametrize("release", RELEASES)
def test_they_load_elsewhere_and_say_the_same(saved, release):
    assert call("read", saved, PYTHONPATH=release).count("largest difference") >= 4
