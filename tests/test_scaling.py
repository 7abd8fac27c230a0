"""docs/scaling.md and docs/slurm.sh: the script runs, and the figures of the recipes are those of tools.plan."""

import os
import re
import shlex
import signal
import subprocess
import time

import pytest
from conftest import ROOT

import train
from tools import plan

PAGE = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
SCRIPT = ROOT / "docs" / "slurm.sh"
# (GB of a card, hours, the plan's command, the training command)
RECIPES = re.findall(r"<!-- plan -->(\d+) GB of (?:the|each) card, ([\d.]+) hours\.\n\n```bash\n(.*)\n(.*)\n```", PAGE)


# --- Slurm ------------------------------------------------------------------------------------------------------------


def test_the_page_quotes_the_script_and_bash_can_read_it():
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    assert f"```sh\n{SCRIPT.read_text()}```" in PAGE


@pytest.fixture
def cluster(tmp_path):
    """A folder with stand-ins: `srun` writes down what it was asked and works until it is told to stop, or for no time."""
    (tmp_path / "bin").mkdir()
    srun = f'echo "$@" > {tmp_path}/srun\ntrap "echo stopped >> {tmp_path}/log; exit 143" TERM\n'
    srun += 'for i in $(seq ${SECONDS_OF_WORK:-0}0); do sleep 0.1; done\nexit ${STATUS:-0}\n'
    scontrol = f'if [ $1 = show ]; then echo node7; echo node8; else echo "$@" >> {tmp_path}/log; fi\n'
    for name, text in (("srun", srun), ("scontrol", scontrol)):
        (tmp_path / "bin" / name).write_text("#!/usr/bin/env bash\n" + text)
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def submit(cluster, **more: str) -> subprocess.Popen:
    environment = {**os.environ, "PATH": f"{cluster / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "node[7-8]",
                   "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "42", "SLURM_CPUS_PER_TASK": "64", **more}
    return subprocess.Popen(["bash", SCRIPT], cwd=cluster, env=environment)


def test_the_script_starts_a_run_that_train_accepts_and_the_next_time_goes_on(cluster, monkeypatch):
    """A flag that does not exist, or a run that is refused because its folder holds one, after days in a queue."""
    assert submit(cluster).wait(30) == 0
    first = (cluster / "srun").read_text().split()
    assert first[:3] == ["torchrun", "--nnodes=2", "--nproc_per_node=8"] and "--rdzv_endpoint=node7:29500" in first
    config = train.parse_config(first[first.index("train.py") + 1:])
    assert config.model and not config.resume and not (cluster / "log").exists()
    assert f"up to `--save_every` (50 with `--model`, {config.save_every} here)" in PAGE
    assert train.Config.__dataclass_fields__["save_every"].metadata["with_model"] == 50
    (cluster / config.out).mkdir(parents=True)
    (cluster / config.out / "config.json").write_text("{}")
    assert submit(cluster).wait(30) == 0
    assert (cluster / "srun").read_text().split() == [*first, "--resume"]


def test_a_signal_stops_the_run_and_queues_the_job_again(cluster):
    """The other order, or a script that ends without a word to Slurm, is a run that nobody continues."""
    job = submit(cluster, SECONDS_OF_WORK="60")
    deadline = time.time() + 30
    while not (cluster / "srun").exists() and time.time() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)  # until the script waits
    job.send_signal(signal.SIGTERM)
    assert job.wait(30) == 0
    assert (cluster / "log").read_text().splitlines() == ["stopped", "requeue 42"]


def test_an_error_is_not_queued_again(cluster):
    """It would fail again, all night."""
    assert submit(cluster, STATUS="3").wait(30) == 3
    assert not (cluster / "log").exists()


# --- a recipe for each card -------------------------------------------------------------------------------------------


def test_there_is_a_recipe_for_each_card():
    jobs = [plan.parse_arguments(shlex.split(command)[3:]) for _, _, command, _ in RECIPES]
    assert [(job.gpus, job.card_gb) for job in jobs] == [(1, 24), (1, 48), (1, 80), (8, 80)]


@pytest.mark.parametrize("gigabytes, hours, planned, trained", RECIPES)
def test_the_figures_of_a_recipe_are_those_of_its_plan(gigabytes, hours, planned, trained):
    """Somebody rents a card by these numbers: the plan has to say them, and to be one of the command below it."""
    job = plan.parse_arguments(shlex.split(planned)[3:])
    model = plan.count(plan.load_shape(job.model))
    assert plan.verdict(model, job) == f"fits a card of {job.card_gb:g} GB (needs {gigabytes})"
    assert f"{plan.hours(model, job):.1f}" == hours
    command, arguments = trained.split(" train.py ")
    config = train.parse_config(shlex.split(arguments))
    assert command == ("torchrun" if job.gpus == 1 else f"torchrun --nproc_per_node={job.gpus}")
    assert f"-{job.model.upper()}-" in config.model and (config.shard, config.steps) == ("auto", train.FULL_PASS)
    shared = ("lora_rank", "questions", "group_size", "total_pixels", "min_pixels", "max_frames", "fps", "max_new_tokens",
              "beta", "offload")
    assert {name: getattr(config, name) for name in shared} == {name: getattr(job, name) for name in shared}


def test_what_is_said_to_make_room_does():
    _, _, planned, _ = RECIPES[2]
    job = plan.parse_arguments(shlex.split(planned)[3:])
    model = plan.count(plan.load_shape(job.model))
    for change in (["--freeze_vision"], ["--total_pixels", str(job.total_pixels // 2)]):
        changed = plan.parse_arguments(shlex.split(planned)[3:] + change)
        assert plan.needed(model, changed) < plan.needed(model, job) - 1e9
