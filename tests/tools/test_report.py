"""The page about a run: what it finds to worry about, what it shows, and that nothing in it can run or reach out."""

import json
import re
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import ALONE, ROOT

import train
from data import Clip, target_text
from lib import toy
from lib.run import Run
from tools import report

EVIL = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"><answer>3 to 7</answer>"
CONFIG = asdict(train.parse_config([]))
HEALTHY = {"phase": "grpo", "reward": 1.5, "temporal_iou": 0.6, "format": 0.95, "length": 30.0, "sampled": 960, "truncated": 0,
           "groups": 4, "dead_groups": 1, "unreadable": 0, "kl": 0.05, "grad_norm": 0.3, "logp_gap_mean": 1e-7, "logp_gap_max": 1e-5,
           "lr": 1e-4, "seconds": {"wait": 0.1, "sample": 1.0, "sync": 0.0, "score": 1.0, "step": 0.1}}


def log(count: int = 40, **changes) -> list[dict]:
    """Lines of metrics.jsonl; a change is a number, or a function of the step."""
    return [HEALTHY | {"step": step} | {name: change(step) if callable(change) else change for name, change in changes.items()}
            for step in range(1, count + 1)]


# --- what to worry about -----------------------------------------------------------------------------------------------


def test_a_healthy_run_is_nothing_to_worry_about():
    """Warnings that are always there are not read."""
    said = {"grounding": [(f"q{k}", f"{k} to {k + 2}") for k in range(20)]}
    evaluations = [(10, {"grounding/mIoU": 0.5}), (40, {"grounding/mIoU": 0.6})]
    lines = log(reward=lambda step: 1 + step / 100, kl=lambda step: step / 400)
    assert report.worries(CONFIG, lines, evaluations, said, []) == []
    assert report.worries(CONFIG, [], [], {}, []) == []


@pytest.mark.parametrize("changes, words", [
    ({"dead_groups": 4, "temporal_iou": 0.0, "format": 0.0}, "All groups are dead.*too hard"),
    ({"dead_groups": 4, "temporal_iou": 1.0, "format": 1.0}, "All groups are dead.*solved"),
    ({"truncated": 8}, "25% of the latest completions were truncated"),
    ({"unreadable": 1}, "20 questions of the last 20 steps were left out"),
    ({"temporal_iou": 0.02, "format": 1.0}, "Format without accuracy"),
    ({"kl": lambda step: 0.02 if step < 30 else 0.6}, "The KL runs away: 0.60"),
    ({"kl": 1.5}, "The KL runs away"),
    ({"logp_gap_mean": 0.1}, "no rounding: 1.0e-01"),
    ({"grad_norm": lambda step: None if step == 3 else 0.3}, "1 of 40 steps had no finite loss or gradient, the first of them step 3"),
])
def test_what_is_wrong_in_the_log_is_said(changes, words):
    """Each of them looks like training for hours."""
    (found,) = report.worries(CONFIG, log(**changes), [], {}, [])
    assert re.search(words, found)


def test_a_gap_of_bfloat16_is_rounding():
    gap = log(logp_gap_mean=1e-2)
    assert report.worries(CONFIG | {"model": "qwen"}, gap, [], {}, []) == []
    assert len(report.worries(CONFIG | {"model": "qwen", "device": "cpu"}, gap, [], {}, [])) == 1


def test_one_constant_answer_is_said_and_one_question_asked_often_is_none():
    constant = [(f"q{k}", "2 to 9") for k in range(19)] + [("q", "1 to 2")]
    (found,) = report.worries(CONFIG, log(), [], {"grounding": constant}, [])
    assert found.startswith("One constant answer: 95% of the latest grounding completions") and "2 to 9" in found
    assert report.worries(CONFIG, log(), [], {"grounding": [("q", "2 to 9")] * 20}, []) == []


def test_a_reward_that_rises_while_the_held_out_metric_falls_is_said():
    lines = log(reward=lambda step: 1 + step / 50)
    (found,) = report.worries(CONFIG, lines, [(10, {"grounding/mIoU": 0.6}), (40, {"grounding/mIoU": 0.5})], {}, [])
    assert "from step 10 to 40" in found and "0.600 to 0.500" in found
    falling = log(reward=lambda step: 2 - step / 50)  # both fall: another trouble
    assert report.worries(CONFIG, falling, [(10, {"grounding/mIoU": 0.6}), (40, {"grounding/mIoU": 0.5})], {}, []) == []


def test_a_result_that_needs_no_video_is_said():
    def row(kind, value, interval=None):
        return {"kind": kind, "title": kind, "metrics": {"qa/accuracy": value}, "intervals": {"qa/accuracy": interval} if interval else {}}
    blind = row("blind", 0.4)
    (found,) = report.worries(CONFIG, [], [], {}, [row("after", 0.45, [0.38, 0.5]), blind])
    assert "never looks at the video gets 0.400" in found
    assert report.worries(CONFIG, [], [], {}, [row("after", 0.45, [0.42, 0.5]), blind]) == []
    (found,) = report.worries(CONFIG, [], [], {}, [row("after_sft", 0.7), row("after", 0.5, [0.45, 0.55]), blind])
    assert "fell in GRPO, from 0.700 to 0.500" in found
    assert report.worries(CONFIG, [], [], {}, [row("after_sft", 0.7, [0.4, 0.9]), row("after", 0.5, [0.45, 0.55]), blind]) == []


def record(step: int, name: str, completion: str, reward: float, reason: str = "ok") -> dict:
    return {"step": step, "id": name, "completion": completion, "reward": reward, "reason": reason}


def test_why_groups_are_dead_is_told_apart():
    """Harder questions do not help where the reward is blind, and no reward helps where nothing was said."""
    dead = log(dead_groups=4, temporal_iou=0.0, format=0.0)
    blind = [record(1, f"q{k}", f"<answer>{n} to 9</answer>", 1.0) for k in range(4) for n in range(8)]
    assert "does not tell them apart" in report.worries(CONFIG, dead, [], {}, [], late=blind)[0]
    equal = [record(1, f"q{k}", "<answer>1 to 9</answer>", 0.0) for k in range(4) for _ in range(8)]
    assert "too hard" in report.worries(CONFIG, dead, [], {}, [], late=equal)[0]
    cut = log(dead_groups=4, temporal_iou=0.0, format=0.0, truncated=32)
    assert "were cut before their answer" in report.worries(CONFIG, cut, [], {}, [])[0]


def test_an_answer_that_is_cut_and_one_that_does_not_end_are_told_apart():
    """A higher limit cures the first, and makes the second dearer."""
    lines = log(truncated=20)
    for text, words in (("<think>0 grey1 gr", "raise it"), ("<answer>1 to 2</answer></answer></answer>", "The end token is not said"),
                        ("<answer>A</answer><glue>[(1, 2", "raise it"), ("<answer>A</answer><glue>[(1, 2)]</glue> A", "The end token")):
        (found,) = report.worries(CONFIG, lines, [], {}, [], late=[record(1, "q", text, 0.0, "truncated")] * 4)
        assert words in found and "62% of the latest completions were truncated at" in found
    late = [record(1, "q", "<answer>1 to 2</answer> and", 0.0, "truncated")] * 4
    (found,) = report.worries(CONFIG, log(truncated=4), [], {}, [], late=late)  # most completions end: it is no lost token
    assert "does not help; look at what stands behind the answer" in found and "end token" not in found


@pytest.mark.parametrize("norms, words", [
    ([0.3, 0.4, 0.3, None], "it is hardly --lr"),
    ([0.3, 0.4, 9.0, None], "had grown to 9, from 0.4: lower --lr"),
    ([None], "from the first step on"),
])
def test_what_came_before_the_first_nan_is_told(norms, words):
    """A run that explodes and a division by 0 end alike, and are cured otherwise."""
    lines = [HEALTHY | {"step": step, "grad_norm": norm} for step, norm in enumerate(norms, 1)]
    (found,) = report.worries(CONFIG, lines, [], {}, [])
    assert words in found and f"the first of them step {len(norms)}" in found
    sft = [{"phase": "sft", "step": 1, "loss": None, "grad_norm": 0.3}]
    assert "1 of 1 steps of the warm start" in report.worries(CONFIG, [], [], {}, [], sft=sft)[0]


def test_held_out_videos_that_cannot_be_read_are_a_ceiling():
    answers = [({"task": "qa"}, {"reasons": ["unreadable_video" if k < 3 else "ok"]}) for k in range(12)]
    (found,) = report.worries(CONFIG, log(), [], {}, [], held_out={"before": answers})
    assert "3 of 12 held-out questions" in found and "no model reaches more than 0.75" in found


def spans_said(say) -> dict:
    """Held-out answers; `say`: true span -> what is said."""
    samples = [{"task": "grounding", "spans": [[start, start + 2 + start % 3]]} for start in range(0, 40, 2)]
    return {"before": [(sample, {"reasons": ["ok"], "completions": ["<answer>{:.2f} to {:.2f}</answer>".format(*say(*sample["spans"][0]))]})
                       for sample in samples]}


@pytest.mark.parametrize("say, scale", [
    (lambda s, e: (s * 1.5, e * 1.5), "times 1.50"),
    (lambda s, e: (s * 0.5 + 1, e * 0.5 + 1), "times 0.50"),
    (lambda s, e: (s * 2 if s % 8 else 80 - s, e * 2 if s % 8 else 82 - s), None),  # too many that are just wrong
    (lambda s, e: (s + 1, e + 2), None),  # late, on the right scale
    (lambda s, e: (10 + s * 0.5, 10 + e * 0.5), None),  # drawn to the middle, as by a model that hardly sees
    (lambda s, e: (7.0, 9.0), None),  # a constant answer
])
def test_times_on_a_wrong_scale_are_said_and_other_errors_are_not_taken_for_it(say, scale):
    """Frames at another rate than their positions cost nothing but IoU, and GRPO learns to undo them."""
    found = report.worries(CONFIG, log(), [], {}, [], held_out=spans_said(say))
    assert [text.startswith("Times are on a wrong scale") for text in found] == [True] * bool(scale)
    assert not scale or scale in found[0]


# --- the page ----------------------------------------------------------------------------------------------------------

TASKS = ["grounding", "qa", "gqa", "tracking"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A run that was written by hand, with every kind of answer; its clips are real files."""
    base = tmp_path_factory.mktemp("report")
    toy.write_dataset(base / "toy" / "seed0-3-2", 3, 2, 0)
    out = base / "runs" / "x"
    out.mkdir(parents=True)
    config = CONFIG | {"tasks": TASKS, "toy_train": 3, "toy_eval": 2, "group_size": 2}
    (out / "config.json").write_text(json.dumps(config))
    train_samples, held_out, missing = report.samples_of(out, config)
    assert not missing
    write(out / "metrics.jsonl", [{"phase": "sft", "step": 1, "loss": 2.0}, *log(6)])
    records = []
    for step in range(1, 7):
        for sample in train_samples[:len(TASKS)]:
            good = target_text(sample, config["prompt"])
            for text, reason, reward in ((EVIL, "bad_format", 0.0), (good, "ok", 2.0)):
                records.append({"phase": "grpo", "step": step, "id": sample["id"], "completion": text, "reward": reward,
                                "parts": {"format": 1.0}, "reason": reason, "advantage": 1.0})
    write(out / "completions.jsonl", records)
    for name in ("before", "step000003", "after"):
        write(out / f"predictions.{name}.jsonl", [{"id": sample["id"], "task": sample["task"], "completions": [target_text(sample, config["prompt"])],
                                                   "rewards": [2.0], "parts": [{}], "reasons": ["ok"]} for sample in held_out])
    metrics = {"grounding/mIoU": 0.8, "qa/accuracy": 0.9, "n": len(held_out)}
    part = {"total": 4, "kept": 2, "bins": {"low_variance_good": 2, "high_variance_good": 2}, "min_std": 0.1, "min_mean": 0.1,
            "histogram": {"mean_edges": [0.0, 0.5, 1.0], "std_edges": [0.0, 0.375, 0.75], "counts": [[0, 1], [2, 1]]}}
    selected = {"report": {"tasks": {"grounding": part, "qa": {"total": 2, "kept": 1, "bins": {}, "right_of_k": {"1/2": 2}}}}}
    (out / "state.json").write_text(json.dumps({"before": metrics, "after": metrics, "selected": selected}))
    return out


def write(file: Path, lines: list[dict]) -> None:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def data_of(page: Path) -> dict:
    return json.loads(re.search(r'id="data">(.*?)</script>', page.read_text(), re.DOTALL)[1])


@pytest.fixture(scope="module")
def page(folder) -> Path:
    return report.write_report([folder], folder / "report.html")


def test_the_committed_page_is_one_of_this_format(page):
    """The page that people look at before they train shows what a run of theirs will; `python -m tools.report` writes it anew
    (docs/report.md)."""
    committed = ROOT / "docs" / "toy-report.html"
    data, fresh = data_of(committed), data_of(page)
    assert report.page_of(data) == committed.read_text(encoding="utf-8"), "scripts or style have changed since"
    assert committed.stat().st_size < 3e6 and data.keys() == fresh.keys()
    (run,), of_fresh = data["runs"], fresh["runs"][0]
    assert run.keys() == of_fresh.keys() and run["groups"][0].keys() == of_fresh["groups"][0].keys()
    assert len(run["groups"]) >= 100 and data["curves"] == fresh["curves"]



def test_the_page_is_one_file_that_asks_for_nothing(page):
    """A page that fetches a script is blank on a machine without network, and tells somebody that it was opened."""
    text = page.read_text()
    assert not re.search(r"<link|@import|<script[^>]* src=|fetch\(|XMLHttpRequest|(src|href)=[\"']?http", text)
    assert "default-src 'none'" in text and page.stat().st_size < report.LIMIT
    assert not re.findall(r"/\*[\w.]+\.(?:js|css)\*/|/\*data\*/", text)  # places left unfilled


def test_what_a_model_says_cannot_end_the_script_that_holds_it(page):
    """A completion is text from outside: written into the page as it is, it could run."""
    text = page.read_text()
    assert "document.title='owned'" in text and "<script>document.title='owned'" not in text and "<img" not in text
    assert data_of(page)["runs"][0]["groups"][0]["completions"][0]["text"] == EVIL


def test_groups_have_frames_truth_and_what_each_completion_marks(page):
    data = data_of(page)
    groups = {group["task"]: group for group in data["runs"][0]["groups"]}
    assert set(groups) == set(TASKS) and len(data["runs"][0]["groups"]) == 24
    assert groups["grounding"]["completions"][0]["spans"] == [[3, 7]] and len(groups["grounding"]["spans"]) == 1
    assert groups["gqa"]["completions"][0]["spans"] is None and len(groups["gqa"]["completions"][1]["spans"]) == 1
    assert len(groups["tracking"]["completions"][1]["boxes"]) == len(groups["tracking"]["boxes"]) == 8
    clip = data["clips"][groups["grounding"]["clip"]]
    assert clip["of"] == 24 and len(clip["times"]) == 16 and clip["src"].startswith("data:image/jpeg;base64,")
    assert groups["qa"]["clip"] == groups["grounding"]["clip"] == groups["gqa"]["clip"]  # one clip, embedded once
    assert data["clips"][groups["tracking"]["clip"]]["of"] == 8


def test_several_windows_are_marked_and_none_too(tmp_path):
    """A truth of no window has a row as well: what was named there stands below an empty one."""
    clips, settings = report.Clips(1, 0.0), report.VideoSettings()
    for spans in ([[1, 2], [5, 8]], []):
        sample = {"id": "m", "task": "moments", "question": "it falls", "video": "none.mp4", "duration": 10.0, "spans": spans}
        shown = report.question_of(sample, settings, clips)
        assert (shown["spans"], shown["length"]) == (spans, 10.0)
        assert shown["truth"] == ("<answer>[(1.00, 2.00), (5.00, 8.00)]</answer>" if spans else "<answer>[]</answer>")
        assert report.marks_of(sample, "<answer>[(1, 2), (3, 4)]</answer>") == {"spans": [(1, 2), (3, 4)]}
        assert report.marks_of(sample, "<answer>[]</answer>") == {"spans": []}
        assert report.marks_of(sample, "<answer>none</answer>") == {"spans": None}


def test_the_same_questions_are_shown_at_every_evaluation(page):
    watched = data_of(page)["runs"][0]["watched"]
    assert len(watched) == 2 * (len(TASKS) + 1)  # two of tracking
    assert [answer["title"] for answer in watched[0]["answers"]] == ["before", "step 3", "after"]


def test_results_have_intervals_over_videos_and_blind_answers_beside_them(page):
    rows = data_of(page)["runs"][0]["results"]
    assert [row["title"] for row in rows[:2]] == ["before", "after GRPO"] and rows[2]["title"].startswith("blind: ")
    low, high = rows[1]["intervals"]["grounding/mIoU"]
    assert 0 <= low <= high <= 1


def test_groups_are_spread_over_the_steps_and_a_question_may_come_twice_in_one(folder, tmp_path):
    """The first 200 of a long run are all of its beginning."""
    assert [group["step"] for group in data_of(report.write_report([folder], tmp_path / "a.html", 3))["runs"][0]["groups"]] == [1, 3, 5]
    record = json.loads((folder / "completions.jsonl").read_text().splitlines()[0])
    write(tmp_path / "completions.jsonl", [record] * 4)
    assert [len(group) for group in report.read_groups(tmp_path, 2)] == [2, 2]


def test_a_page_that_is_too_large_has_fewer_groups(folder, tmp_path, monkeypatch):
    size = len(report.write_report([folder], tmp_path / "all.html").read_text())
    monkeypatch.setattr(report, "LIMIT", size - 100)
    page = report.write_report([folder], tmp_path / "fewer.html")
    assert page.stat().st_size < size - 100 and 0 < len(data_of(page)["runs"][0]["groups"]) < 24


def test_two_hundred_clips_of_noise_fit():
    """Noise is what JPEG is worst at, and a real frame is larger than the toy's."""
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (64, 3, 252, 448), dtype=torch.uint8, generator=generator)
    clips = report.Clips(200, 0)
    strip = report.strip_of(Clip(frames, torch.arange(64) / 2, 2.0), clips.limit)
    assert len(strip["src"]) <= clips.limit and len(strip["times"]) == 16 and strip["shown"][-1] == 63


def test_a_run_that_goes_on_or_whose_clips_are_gone_has_a_page(folder, tmp_path):
    """The newest line may be half written, and a run is often looked at on another machine than its own."""
    shutil.copytree(folder, tmp_path / "elsewhere" / "runs" / "y")
    run = tmp_path / "elsewhere" / "runs" / "y"
    (run / "state.json").unlink()
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"phase": "grpo", "st')
    (found,) = data_of(report.write_report([run], run / "report.html"))["runs"]
    assert "no such file" in found["missing"] and found["steps"] == 6 and found["groups"][0]["clip"] is None
    with pytest.raises(ValueError, match="config.json"):
        report.write_report([tmp_path], tmp_path / "report.html")


def test_frames_stop_when_the_time_is_up(folder, tmp_path):
    """In training the GPUs wait for the page."""
    assert data_of(report.write_report([folder], tmp_path / "quick.html", seconds=0))["clips"] == []


def test_a_video_that_no_worker_could_read_is_not_tried_again(folder, tmp_path, monkeypatch):
    """Workers have a deadline, the page has none: a file on which a decoder hangs cost one question, and then the whole run."""
    shutil.copytree(folder, tmp_path / "run")
    lines = [json.loads(text) for text in (tmp_path / "run" / "predictions.after.jsonl").read_text().splitlines()]
    (tmp_path / "run" / "predictions.after.jsonl").write_text(
        "".join(json.dumps({**line, "problem": "v.mp4: no answer in 60 s"}) + "\n" for line in lines))
    (tmp_path / "run" / "completions.jsonl").unlink()
    monkeypatch.setattr(report, "read_video", lambda *_, **__: pytest.fail("read"))
    assert data_of(report.write_report([tmp_path / "run"], tmp_path / "page.html"))["clips"] == []


def test_long_runs_have_no_more_points_than_a_screen():
    columns = report.columns_of(report.with_shares(log(2500)))
    assert len(columns["step"]) <= report.MOST_POINTS and columns["step"][-1] == 2500 and columns["dead share"][0] == 0.25
    assert columns["sample s"][0] == 1.0 and columns["truncated share"][0] == 0


# --- in training -------------------------------------------------------------------------------------------------------


def test_a_page_that_cannot_be_written_is_one_line_of_warning(tmp_path, monkeypatch, capsys):
    """The last line of a run of days must not be a traceback."""
    def fail(*_, **__):
        raise KeyError("a bug\nin two lines")
    monkeypatch.setattr(report, "write_report", fail)
    train.write_page(Run(train.parse_config(["--out", str(tmp_path / "run")]), ALONE, None), 1)
    assert capsys.readouterr().out.count("\n") == 1


def test_an_evaluation_on_the_way_leaves_some_answers_of_each_task(tmp_path):
    """The file of the next evaluation takes the place of the whole one."""
    write(tmp_path / "predictions.on_the_way.jsonl", [{"id": k, "task": task} for k in range(20) for task in ("qa", "gqa")])
    train.keep_some(tmp_path, 25)
    kept = list(report.read_lines(tmp_path / "predictions.step000025.jsonl"))
    assert [line["id"] for line in kept if line["task"] == "gqa"] == list(range(train.KEPT_ANSWERS)) and len(kept) == 16


# --- in a browser ------------------------------------------------------------------------------------------------------

CHECKS = """<script>
const seen = {title: document.title, ready: document.body.dataset.ready, charts: document.querySelectorAll("canvas").length,
  images: document.querySelectorAll("img").length, all: at("count").textContent,
  wide: document.documentElement.scrollWidth - innerWidth};
at("task").value = "tracking"; at("filters").dispatchEvent(new Event("input"));
seen.tracking = at("count").textContent; seen.boxes = document.querySelectorAll("#groups-list .box").length;
at("task").value = ""; at("least").value = "1.5"; at("filters").dispatchEvent(new Event("input"));
seen.rich = at("count").textContent;
at("least").value = ""; at("sort").value = "task"; at("filters").dispatchEvent(new Event("input")); at("on").click();
seen.next = at("count").textContent; seen.bars = document.querySelectorAll(".bar").length;
document.body.dataset.seen = JSON.stringify(seen);
</script>"""


@pytest.mark.parametrize("runs", [1, 2])
def test_a_browser_opens_it_without_errors_and_the_filters_work(folder, tmp_path, runs):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("NO BROWSER: the page's scripts were not run; apt-get install chromium")
    file = report.write_report([folder] * runs, tmp_path / "page.html")
    file.write_text(file.read_text().replace("</body>", CHECKS + "</body>"))
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile", "--window-size=500,900",
               "--enable-logging=stderr", "--virtual-time-budget=2000", "--dump-dom", file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    seen = json.loads(re.search(r'data-seen="(.*?)"', done.stdout)[1].replace("&quot;", '"').replace("&amp;", "&"))
    names = ", ".join(["x"] * runs)
    assert (seen["title"], seen["ready"], seen["images"]) == (names, "yes", 0) and seen["charts"] >= 9
    assert seen["all"] == f"1 to 3 of {24 * runs}" and seen["tracking"] == f"1 to 3 of {6 * runs}"
    assert seen["rich"] == "no group is like this" and seen["next"] == f"4 to 6 of {24 * runs}"
    assert seen["boxes"] == 3 * 16 and seen["bars"] > 0 and seen["wide"] <= 0
