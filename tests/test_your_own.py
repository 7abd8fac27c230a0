"""docs/your-own.md is what it says: its samples load, its code runs, its messages are those of the programs.

The new task is put into a copy of the code, as a reader would, and nowhere but in the four dicts that the page names.
"""

import json
import re
import shutil
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pytest
from conftest import ROOT
from made_samples import ALL, says, write_lines

import data
import eval as evaluation
import rewards
from lib import memory, samples
from lib.distributed import Watch
from lib.run import BAD_STEPS, records_of
from tools.check import check

PAGE = (ROOT / "docs" / "your-own.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+) ?(.*?)\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)  # (language, title, text)
BY_TITLE = {title: text for _, title, text in BLOCKS if title}
LINES = [json.loads(text) for language, title, text in BLOCKS if (language, title) == ("json", "")]
COUNTING = json.loads(BY_TITLE["counting"])
DICTS = {"lib/samples.py": "TASKS", "data.py": "TEXTS", "rewards.py": "REWARDS", "eval.py": "REPORTS"}


# ---- the four dicts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place, entries", [("TEXTS of data.py (prompt and target)", data.TEXTS),
                                            ("REWARDS of rewards.py (how a completion is read and measured)", rewards.REWARDS),
                                            ("REPORTS of eval.py (metrics and blind answers)", evaluation.REPORTS)])
def test_every_task_has_an_entry_in_each_of_the_four_dicts(place, entries):
    missing, unknown = samples.TASKS.keys() - entries.keys(), entries.keys() - samples.TASKS.keys()
    assert not missing, f"add {', '.join(missing)} to {place}"
    assert not unknown, f"{place} knows {', '.join(unknown)}, which TASKS of lib/samples.py does not"


@pytest.mark.parametrize("entries, use", [
    (data.TEXTS, lambda sample: data.build_prompt(sample, "think")),
    (data.TEXTS, lambda sample: data.target_text(sample, "think")),
    (rewards.REWARDS, lambda sample: rewards.score(sample, "")),
    (evaluation.REPORTS, lambda sample: evaluation.sample_metrics(sample, "")),
    (evaluation.REPORTS, lambda sample: evaluation.blind_baselines([sample])),
])
@pytest.mark.parametrize("sample", ALL, ids=lambda sample: sample["task"])
def test_a_task_without_an_entry_is_an_error_that_says_where_it_is_missing(monkeypatch, entries, use, sample):
    """With a branch that takes the rest, a forgotten task is asked, paid or reported as another one."""
    monkeypatch.delitem(entries, sample["task"])
    with pytest.raises(KeyError, match=rf"task '{sample['task']}' has no entry in \w+ of \w+\.py .*docs/your-own.md"):
        use(sample)


def test_a_part_that_is_neither_discrete_nor_continuous_is_an_error(monkeypatch):
    """The log shows the parts that the entries name: another one would be paid and never seen."""
    monkeypatch.setitem(rewards.REWARDS, "qa", rewards.REWARDS["qa"]._replace(discrete=()))
    with pytest.raises(KeyError, match="task 'qa' measures accuracy: its entry in REWARDS of rewards.py"):
        rewards.score(ALL[1], "")


# ---- your own videos ------------------------------------------------------------------------------------------------


def test_there_is_a_line_of_each_task_and_all_of_them_load(tmp_path):
    file = write_lines(tmp_path / "own.jsonl", LINES)
    assert [sample["task"] for sample in samples.load_samples([str(file)])] == list(samples.TASKS)
    for sample in LINES:
        assert data.build_prompt(sample, "think")
        assert set(rewards.score(sample, data.target_text(sample, "think")).parts.values()) == {1.0}


def test_the_table_names_every_field_and_who_needs_it():
    rows = [row.split(" | ") for row in re.findall(r"^\| (`.*) \|$", PAGE, re.MULTILINE) if row.count(" | ") == 3]
    named = {field: tasks for fields, _, tasks, _ in rows for field in re.findall(r"`(\w+)`", fields)}
    assert named.keys() == samples.FIELDS.keys()
    for field, tasks in named.items():
        needing = [task for task, fields in samples.TASKS.items() if field in fields]
        needed_by = "all" if field in ("id", "task", "question") else ", ".join(needing)
        assert tasks.startswith(needed_by) and any(words in tasks for words in ("may be left out", "set by the program", "in place of")) == (not needing and tasks != "all")


def test_the_broken_line_is_reported_as_quoted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "own.jsonl", LINES + [json.loads(BY_TITLE["broken"])])
    assert check("own.jsonl", tmp_path / "checked", num_workers=0) == (0, 8)  # there are no such videos
    *_, bad = map(json.loads, open("checked/bad.jsonl"))
    assert bad["reason"] == BY_TITLE["reason"].strip()
    with pytest.raises(ValueError) as error:
        samples.load_samples(["own.jsonl"])
    assert f"error: {error.value}" == BY_TITLE["message"].strip()


def test_the_line_of_completions_is_one_that_a_run_writes():
    line = json.loads(BY_TITLE["completion"])
    sample = next(sample for sample in LINES if sample["id"] == line["id"])
    group = SimpleNamespace(prompt=SimpleNamespace(sample=sample), texts=[line["completion"]], advantages=[line["advantage"]],
                            scores=[rewards.score(sample, line["completion"])], reasons=["ok"])
    assert records_of(group, step=10) == [line]


# ---- your own reward ------------------------------------------------------------------------------------------------


def test_the_other_reward_takes_off_what_it_says():
    names = dict(vars(rewards))
    exec(BY_TITLE["rewards.py, a reward"], names)
    brief = partial(names["brief_score"], mix="sum", judge=rewards.words_judge)
    answer = "<answer>10 to 20</answer>"
    for length, total in ((100, 2.0), (1000, 2.0), (1500, 1.75), (2000, 1.5), (9000, 1.5)):
        thought = "<think>" + "x" * (length - len(answer) - 15) + "</think>"
        assert brief(LINES[0], thought + answer).total == pytest.approx(total)
    assert brief(LINES[0], thought + answer).parts == rewards.score(LINES[0], thought + answer).parts


def test_the_line_that_chooses_the_reward_is_in_train():
    before, after = BY_TITLE["train.py, as it is"], BY_TITLE["train.py, changed"]
    assert before in (ROOT / "train.py").read_text() and before.replace("score, mix", "brief_score, mix") == after


# ---- your own task --------------------------------------------------------------------------------------------------


def with_entry(source: str, name: str, code: str) -> str:
    """The source of a file with the page's code: functions above the dict, the entry at its end."""
    above, entry = re.fullmatch(r'(.*?)(    "counting": .*)', code, re.DOTALL).groups()
    before, rest = source.split(f"\n{name} = {{\n")
    inside, after = rest.split("\n}\n", 1)
    return f"{before}\n{above.rstrip()}\n\n\n{name} = {{\n{inside}\n{entry.rstrip()}\n}}\n{after}"


# What is run in the copy: (sample) on standard input, everything that depends on the task on standard output.
SCRIPT = """
import json, sys
import data, eval, rewards, train
from lib.samples import load_samples
from lib.selection import select
from lib.tables import print_table
from tools.ask import what_is_read

[sample], found = load_samples(["dog.jsonl"]), {}
found["prompts"] = [data.build_prompt(sample, style)[-1]["content"] for style in data.STYLES]
found["target"] = data.target_text(sample, "think")
texts = json.load(sys.stdin)
found["scores"] = [rewards.score(sample, text) for text in texts]
found["read"] = [what_is_read(sample, text) for text in texts]
found["metrics"] = eval.compute_metrics([sample] * len(texts), texts)
found["blind"] = eval.blind_baselines([sample, {**sample, "count": 2}, {**sample, "count": 3}])
parts = [score.parts for score in found["scores"]]
found["bins"] = select([sample], {sample["id"]: {"parts": parts, "reasons": [""]}})[1]["tasks"]["counting"]["bins"]
found["tasks"] = train.parse_config(["--model", "m", "--train_data", "d"]).tasks
print(json.dumps(found))
print_table(eval.METRICS, {"model": found["metrics"], **found["blind"]})
"""
SAID = {  # completion -> its reward, reason, and what is read
    "<think>I see three jumps.</think><answer>3</answer>": (2, "ok", "3"),
    says("3 times, so 3."): (2, "ok", "3"),
    says("4"): (1, "wrong_count", "4"),
    says("3 or 4"): (1, "bad_count", "nothing: the answer is not one whole number"),
    says("three"): (1, "bad_count", "nothing: the answer is not one whole number"),
    says("3.5"): (1, "bad_count", "nothing: the answer is not one whole number"),
    "3": (0, "no_answer_tag", "nothing: there is no closed <answer> ... </answer>"),
}


@pytest.fixture(scope="module")
def counted(tmp_path_factory) -> tuple[dict, str]:
    """What a copy of the code says of the new task, once its four entries are in it; and the table that it prints."""
    folder = tmp_path_factory.mktemp("copy")
    for name in ("lib", "tools"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    for file, name in DICTS.items():
        path = folder / file
        path.write_text(with_entry(path.read_text(encoding="utf-8"), name, BY_TITLE[f"{file} {name}"]), encoding="utf-8")
    write_lines(folder / "dog.jsonl", [COUNTING])
    result = subprocess.run([sys.executable, "-c", SCRIPT], cwd=folder, input=json.dumps(list(SAID)), text=True,
                            capture_output=True, timeout=300)
    assert result.returncode == 0, result.stderr
    found, table = result.stdout.split("\n", 1)
    return json.loads(found), table


def test_four_entries_are_all_that_a_task_needs(counted):
    found, table = counted
    think, plain, temporal_r1 = found["prompts"]
    question = 'Count how often this happens in the video: "The dog jumps over the fence".'
    assert think[0]["text"] == f"{question}\n\n{data.THINK}\n\nThen, p" + plain[0]["text"].split("\n\nP")[1]
    assert plain[0]["text"].startswith(f"{question}\n\nProvide how often it happens")
    assert temporal_r1 == [think[1], think[0]] and think[1]["type"] == "video"
    assert found["target"] == "<think></think><answer>3</answer>"
    assert found["tasks"][-1] == "counting"
    assert "counting/accuracy" in table and "counting/off_by_one" in table
    assert found["bins"]["mixed"] == 1  # a discrete task: right or wrong


def test_the_new_task_is_scored_and_measured(counted):
    found, _ = counted
    for (text, (total, reason, read)), score, said in zip(SAID.items(), found["scores"], found["read"]):
        parts = {"accuracy": float(total == 2), "format": float(total > 0)}
        assert (score, said) == ([total, parts, reason], read), text
    assert found["metrics"] == pytest.approx(
        {"counting/accuracy": 2 / 7, "counting/off_by_one": 3 / 7, "parse_failure": 4 / 7, "n": 7})
    blind = {"counting/accuracy": 2 / 3, "counting/off_by_one": 1.0, "parse_failure": 0.0, "n": 3}
    assert found["blind"].pop("most_frequent_letter") == pytest.approx(blind)
    assert set(map(str, found["blind"].values())) == {"{'n': 0}"}


def test_the_page_quotes_the_error_of_a_missing_entry():
    with pytest.raises(KeyError) as error:
        data.build_prompt(COUNTING, "think")
    assert BY_TITLE["missing"].strip() == f"KeyError: {error.value}"


# ---- when it goes wrong ---------------------------------------------------------------------------------------------


def test_the_cures_of_a_full_memory_are_those_of_the_message():
    for doing, remedy in memory.REMEDIES.items():
        [row] = [row for row in PAGE.splitlines() if row.startswith("| `") and f"in {doing} …" in row]
        assert {flag for flag in re.findall(r"--\w+", remedy) if flag != "--batch"} == set(re.findall(r"--\w+", row))


def test_symptoms_are_quoted_as_they_are_logged():
    watch = Watch.__new__(Watch)
    watch.rank, watch.phase, watch.seconds = 0, "grpo step 12: sync", 3600.0
    code = "".join((ROOT / file).read_text() for file in ("lib/run.py", "lib/questions.py", "train.py"))
    symptoms = [row.split(" | ")[0] for row in PAGE.split("## When it goes wrong")[1].splitlines() if row.startswith("| ")]
    quoted = [text.removesuffix("…").strip() for row in symptoms for text in re.findall(r"`([^`]+)`", row)]
    for text in quoted:
        if " " not in text:
            log = (ROOT / "docs" / "log.md").read_text()
            assert f"`{text}`" in log or text in ("logp_gap_mean", *rewards.UNREADABLE), text
        elif text.startswith("rank"):
            assert watch.complaint().startswith(text)
        elif "steps in a row" in text:
            assert text == f"{BAD_STEPS} steps in a row without a finite loss and gradient"
        elif not text.startswith(("out of memory", ", in")) and "in the optimiser" not in text and "in scoring" not in text:
            assert text in code, text
