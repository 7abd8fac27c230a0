"""docs/recipes.md and the files in docs/recipes/: they run from the downloads to the figures, carry the published settings,
and what the page says is what they do."""

import dataclasses
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

import data
import rewards
import train
from eval import sample_metrics
from lib import published
from lib.readers import find_video
from lib.samples import load_samples, read_jsonl, write_jsonl
from tools import check, convert, data_commands, evaluate, plan

FOLDER = ROOT / "docs" / "recipes"
RECIPES = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
PLANS = re.findall(r"^python -m tools.plan.*$", RECIPES, re.MULTILINE)
OWN = {"fiber1k": "FIBER-1k", "dream1k": "Dream-1k"}  # the reader's own: there is no converter


def dry_run(name: str) -> list[str]:
    """The commands of a recipe, in the order in which it runs them."""
    done = subprocess.run(["bash", FOLDER / name, "--dry_run"], capture_output=True, text=True, check=True, timeout=60)
    assert not done.stderr
    return [line.strip() for line in done.stdout.splitlines()]


LINES = {path.name: dry_run(path.name) for path in sorted(FOLDER.glob("*.sh")) if path.name != "common.sh"}
COMMANDS = list(dict.fromkeys([line for lines in LINES.values() for line in lines if re.search(r"\.py ", line)] + PLANS))

# PAPERS' hyper-parameters, by the names of the flags. VideoChat-R1: its trainer and TRL 0.15.1's defaults.
SEEN = {"fps": 2.0, "max_frames": 768, "total_pixels": 3584 * 28 * 28, "min_pixels": 16 * 28 * 28}
ADAMW = {"weight_decay": 0.0, "warmup_steps": 0, "gradient_checkpointing": True, "freeze_vision": False}
VIDEOCHAT_R1 = {
    **SEEN, **ADAMW, "questions": 8, "group_size": 8, "lr": 1e-6, "lr_schedule": "linear", "beta": 0.04,
    "entropy_bonus": 0.0, "loss_norm": "sequence", "adv_scale": "group", "inner_steps": 1, "temperature": 1.0,
    "max_new_tokens": 1024, "reward": "sum", "keep_dead_groups": True, "resample": 0, "sft_steps": 0, "select_k": 0,
}
VIDEOCHAT_R1_SFT = {**SEEN, **ADAMW, "sft_questions": 8, "sft_lr": 2e-5, "steps": 0, "prompt": "answer", "select_k": 0}
# Temporal-R1: its example script, its configuration and verl's code.
TEMPORAL_R1 = {
    **ADAMW, "questions": 16, "group_size": 8, "lr": 1e-6, "lr_schedule": "constant", "weight_decay": 0.01,
    "beta": 0.01,
    "entropy_bonus": 1e-3, "loss_norm": "token", "adv_scale": "group", "inner_steps": 1, "clip_low": 0.2,
    "clip_high": 0.2, "temperature": 1.0, "max_new_tokens": 2048, "max_prompt_tokens": 4096, "fps": 2.0,
    "total_pixels": 2048 * 28 * 28, "min_pixels": 3136, "reward": "temporal_r1", "prompt": "temporal_r1",
    "keep_dead_groups": True, "sft_steps": 0, "select_k": 0,
}


def load_step0():
    """docs/recipes is no package: it holds one program beside the files that call it."""
    spec = importlib.util.spec_from_file_location("step0", FOLDER / "step0.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


step0 = load_step0()


def script_of(command: str) -> str:
    return re.search(r"([\w/]+\.py|tools\.\w+)", command)[1]


def arguments_of(command: str) -> list[str]:
    return shlex.split(command.split(script_of(command), 1)[1])


def trained() -> dict[str, train.Config]:
    """The training commands by the name of their run."""
    configs = [train.parse_config(arguments_of(c)) for c in COMMANDS if script_of(c) == "train.py"]
    return {config.out.removeprefix("runs/"): config for config in configs}


# --- the commands -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_one_the_programs_accept(command):
    """A recipe with a flag that does not exist is found here, and not by whoever has waited for eight cards."""
    script, arguments = script_of(command), arguments_of(command)
    if script == "train.py":
        config = train.parse_config(arguments)
        assert config.model and config.out.startswith("runs/")
        assert "--nproc_per_node=8" in command
    elif script == "eval.py":
        args = evaluate.parse_arguments(arguments)
        assert args.model and str(args.out).startswith("runs/")
    elif script == "tools.plan":
        assert plan.parse_arguments(arguments)
    elif script == "data.py":
        parsed = data_commands.parse_arguments(arguments)
        if parsed.command == "convert":
            splits = convert.FORMATS[parsed.name][1]
            assert parsed.split is None or parsed.split in splits
    else:
        assert script == "docs/recipes/step0.py"


def test_the_page_links_every_recipe():
    assert set(re.findall(r"\(recipes/(\w+\.\w+)\)", RECIPES)) == {path.name for path in FOLDER.iterdir() if path.is_file()}
    assert "train.py" not in re.sub(r"<!-- table.*?\n\n", "", RECIPES, flags=re.DOTALL)  # commands stand in the files alone


# --- step by step through a tree of the official names ----------------------------------------------------------------

GOT_BOXES = [[0.1, 0.1, 0.3, 0.3]] * 8
QUALITY = {"video": "0012.mp4", "answer": "low quality",
           "instruction": "How good is it? Choice one answer from ['low quality', 'high quality']."}
NEXT_ROW = "4010069381,369,640,480,{},1,CW,a,b,c,d,e"
NEXT_HEAD = "video_id,frame_count,width,height,question,answer,qid,type,a0,a1,a2,a3,a4\n"
MAP = {"4010069381": "1101/4010069381"}
GSUB = {"4010069381": {"duration": 30, "location": {"1": [[2.0, 5.5]]}, "fps": 29.9}}
VIDEO_MME = {"videoID": "fFjv93ACGo8", "question": "What?", "options": ["A. x", "B. y"], "answer": "B"}
VIDEO_MME = [VIDEO_MME | {"question_id": name, "duration": name} for name in ("short", "medium", "long")]
MVBENCH = [{"video": "K9UXS.mp4", "question": "?", "candidates": ["x", "y"], "answer": "y", "start": 1.0, "end": 5.0}]
PERCEPTION = {"video_1234": {"metadata": {"frame_rate": 30.0, "num_frames": 300}, "mc_question": [
    {"id": 0, "question": "What?", "options": ["x", "y", "z"], "answer_id": 2, "area": "memory"}]}}
REXTIME = {"qid": "anet_val92", "query": "it falls", "duration": 100.5, "vid": "v_ZMTi498qnPc", "relevant_windows": [[5, 8]],
           "ans": "A"}
ANET = {"v_uqiMw7tQ1Cc": {"duration": 55.15, "timestamps": [[0.28, 55.15]], "sentences": [" A lift."]}}
DOWNLOADS = {  # the names of the published files, with a record or two each
    "charades_sta/charades_sta_train.txt":
        "AO8RW 0.0 6.9##a person reads.\nAO8RW 1.0 3.0##a person sits.\nIOL8Q 20.9 12.0##x.\n",
    "charades_sta/charades_sta_test.txt": "3MSZA 24.3 30.4##person turn a light on.\n",
    "charades_sta/Charades_v1_train.csv": "id,subject,length\nAO8RW,x,33.67\nIOL8Q,x,30.1\n",
    "charades_sta/Charades_v1_test.csv": "id,subject,length\n3MSZA,x,30.96\n",
    "activitynet/val_2.json": ANET,
    "Annotations/Got/got_train.json": [{"path": "GOT-10k/train/GOT-10k_Train_000001", "object": "cat", "gt": GOT_BOXES}],
    "Annotations/Got/got_val.json": [{"path": "/disk/GOT-10k/val/GOT-10k_Val_000001", "object": "cat", "gt": GOT_BOXES}],
    "Annotations/VideoEval/Quality_Access/annotations/Quality_Access_100shot.json": [QUALITY],
    "Annotations/VideoEval/Quality_Access/annotations/Quality_Access_test.json": [QUALITY],
    "nextgqa/val.csv": NEXT_HEAD + NEXT_ROW.format("why?,b"), "nextgqa/test.csv": NEXT_HEAD + NEXT_ROW.format("why?,b"),
    "nextgqa/gsub_val.json": GSUB, "nextgqa/gsub_test.json": GSUB, "nextgqa/map_vid_vidorID.json": MAP,
    "nextqa/train.csv": NEXT_HEAD.replace("video_id", "video") + NEXT_ROW.format("why?,1"),
    "nextqa/map_vid_vidorID.json": MAP,
    "videomme/videomme.jsonl": "".join(json.dumps(row) + "\n" for row in VIDEO_MME),
    "MVBench/json/action_sequence.json": MVBENCH, "perception_test/mc_question_valid.json": PERCEPTION,
    "perception_test/cut_frame_mapping_valid.json": {"video_1234": 150}, "rextime/rextime_val.jsonl": json.dumps(REXTIME),
    "data/fiber1k.jsonl": "", "data/dream1k.jsonl": "",
}
FILMS = ["videos/Charades_v1_480/AO8RW.mp4", "videos/Charades_v1_480/IOL8Q.mp4", "videos/Charades_v1_480/3MSZA.mp4",
         "videos/ActivityNet/v_uqiMw7tQ1Cc.mkv", "videos/NExTVideo/1101/4010069381.mp4", "videos/DIVIDE-MaxWell/0012.mp4",
         "videos/Video-MME/data/fFjv93ACGo8.mp4", "MVBench/video/star/Charades_v1_480/K9UXS.mp4",
         "videos/Perception_Test/video_1234.mp4", "videos/ReXTime/v_ZMTi498qnPc.mp4", "videos/FIBER-1k/a.mp4",
         "videos/Dream-1k/a.mp4"]


@pytest.fixture
def downloads(tmp_path, monkeypatch):
    """A root with everything that the page says to download, under the official names; the films are no films."""
    for name, content in DOWNLOADS.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    for split in ("Train", "Val"):
        folder = tmp_path / "videos" / "GOT-10k" / split.lower()
        sequence = folder / f"GOT-10k_{split}_000001"
        sequence.mkdir(parents=True)
        (folder / "list.txt").write_text(f"{sequence.name}\n")
        (sequence / "groundtruth.txt").write_text("10.0,10.0,20.0,20.0\n" * 9)
        (sequence / "absence.label").write_text("0\n" * 9)
        (sequence / "meta_info.ini").write_text("[METAINFO]\nobject_class: cat\nresolution: (100, 100)\n")
        for number in range(1, 10):
            (sequence / f"{number:08d}.jpg").write_bytes(b"x")
    for film in FILMS:
        (tmp_path / film).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / film).write_bytes(b"x")
    caption = {"id": "a", "task": "captioning", "video": "a.mp4", "question": "Describe it.", "events": ["A dog runs."]}
    for name in OWN:
        write_jsonl(tmp_path / "data" / f"{name}.jsonl", [caption])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def find_only(videos: dict, num_workers: int, deadline: float) -> dict:
    """In place of decoding: whether the file is there."""
    for video, _ in videos:
        find_video(video)
    return {}


def load(entries: list[str]) -> list[dict]:
    samples = load_samples(entries, None, None, 0)
    for sample in samples:
        find_video(sample["video"])
    return samples


def answer(args) -> None:
    """What the evaluation leaves behind: the answers that are selected from, the metrics that step 0 reads."""
    samples = load(args.data)
    args.out.mkdir(parents=True, exist_ok=True)
    parts = [rewards.score(sample, "").parts for sample in samples]
    spread = [[{name: float(k % 2 and name != "format") for name in part} for k in range(8)] for part in parts]
    write_jsonl(args.out / "predictions.jsonl", [{"id": sample["id"], "task": sample["task"], "parts": of_sample}
                                                 for sample, of_sample in zip(samples, spread)])
    (args.out / "metrics.json").write_text(json.dumps(sample_metrics(samples[0], None)))


@pytest.mark.parametrize("name", LINES)
def test_every_path_leads_somewhere(name, downloads, monkeypatch):
    """A download that the page does not list, a folder with another name, a suffix that the converter does not read, a
    file that no earlier step has made: each is a recipe that stops after hours, or before the first."""
    monkeypatch.setattr(check, "inspect_videos", find_only)
    made = set()
    for line in LINES[name]:
        if line.startswith("python data.py"):
            assert data_commands.run_command(data_commands.parse_arguments(arguments_of(line))) == 0
        elif script_of(line + " x.py") == "eval.py":
            args = evaluate.parse_arguments(arguments_of(line))
            assert args.model.startswith("Qwen/") or args.model in made
            answer(args)
        elif script_of(line + " x.py") == "train.py":
            config = train.parse_config(arguments_of(line))
            assert load(config.train_data)
            made.add(f"{config.out}/final")
        elif "step0.py" in line:
            metrics, *figures = (word for word in arguments_of(line) if word != "--at_least")
            assert {figure.split("=")[0] for figure in figures} <= set(json.loads(Path(metrics).read_text()))
        elif "pandas" not in line:  # parquet: not a package of this project
            subprocess.run(["bash", "-c", line], check=True)


def test_what_the_page_lists_is_what_the_recipes_read():
    """The list of downloads: nothing missing, and nothing that nobody needs."""
    listed = RECIPES.split("## Data")[1].split("## Step 0")[0]
    for name in DOWNLOADS:
        folder, _, file = name.rpartition("/")
        if name.startswith("Annotations/"):
            assert f"`{name.removeprefix('Annotations/')}`" in listed or f"`{file}`" in listed, name
        elif not name.startswith(("MVBench", "videomme/videomme")):
            assert f"{folder}/" in listed and file in listed, name
    assert all(f"`{Path(film).parts[0]}/{Path(film).parts[1]}/" in listed or film.startswith("MVBench") or
               Path(film).parts[1] in OWN.values() for film in FILMS)


def made_by(name: str, out: str) -> str:
    """The command of a recipe that writes this file."""
    return next(line for line in LINES[name] if line.endswith(f"> {out}"))


def test_the_seds_make_samples_of_what_they_say(tmp_path):
    """A blank more or less in the JSON and `sed` changes nothing, silently: questions would keep their windows."""
    sample = {"id": "a", "task": "gqa", "video": "v.mp4", "question": "why?", "options": ["x", "y"], "answer": "A", "spans": [[1.0, 2.0]]}
    (tmp_path / "data").mkdir()
    changed = []
    for name, out, source in (("questions.sh", "nextgqa_val_qa", "nextgqa_val"),
                              ("temporal_r1.sh", "charades_train_answer", "charades_train")):
        write_jsonl(tmp_path / "data" / f"{source}.jsonl", [sample])
        subprocess.run(["bash", "-c", made_by(name, f"data/{out}.jsonl")], cwd=tmp_path, check=True)
        changed += read_jsonl(tmp_path / "data" / f"{out}.jsonl")
    assert [s["task"] for s in changed] == ["qa", "gqa"]
    assert [s.get("think") for s in changed] == [None, False]
    assert "<glue>" not in data.target_text(changed[0], "answer")
    assert "<think>" not in data.target_text(changed[1], "think")


def test_one_question_of_each_video(downloads):
    """`:43%` of the questions is not one a video: some videos would come three times and others never."""
    convert.convert("charades_sta", Path("charades_sta"), Path("data/charades_train.jsonl"), "train")
    environment = os.environ | {"GROUNDING": "charades_train_videos"}
    shown = subprocess.run(["bash", FOLDER / "joint.sh", "--dry_run"], capture_output=True, text=True, check=True,
                           env=environment).stdout
    line = next(line for line in shown.splitlines() if line.startswith("awk"))
    subprocess.run(["bash", "-c", line], check=True)
    kept = read_jsonl(Path("data/charades_train_videos.jsonl"))
    assert [(s["video"], s["question"]) for s in kept] == [("AO8RW.mp4", "a person reads."), ("IOL8Q.mp4", "x.")]
    assert "data/charades_train_videos.jsonl@videos/Charades_v1_480" in shown.replace(" ", "\n").splitlines()


def test_the_short_videos_are_those_of_the_length_class(downloads):
    """`grep` on a converted file: the word in a question or another key must not make a video short."""
    rows = [row | {"question": 'Is it "short"?'} for row in VIDEO_MME]
    write_jsonl(Path("videomme/videomme.jsonl"), rows)
    convert.convert("videomme", Path("videomme/videomme.jsonl"), Path("data/videomme.jsonl"))
    subprocess.run(["bash", "-c", made_by("joint.sh", "data/videomme_short.jsonl")], check=True)
    assert [s["category"] for s in read_jsonl(Path("data/videomme_short.jsonl"))] == ["short"]


# --- a recipe that runs -----------------------------------------------------------------------------------------------

STAND_IN = """#!/usr/bin/env bash
# Writes down what it was asked, and leaves behind what the real program would.
echo "$(basename "$0") $*" >> log
[ "${FAIL:-}" ] && [[ "$*" == *$FAIL* ]] && exit 1
out=${@: -1}
case $* in
    *convert*) mkdir -p "$(dirname "$out")"; seq 300 > "$out" ;;
    *check*) mkdir -p "$out"; seq 299 > "$out/good.jsonl"; seq "${BAD:-1}" > "$out/bad.jsonl"; exit 1 ;;
    *train.py*) mkdir -p "$out"; touch "$out/config.json" "$out/summary.json" ;;
    *eval.py*) mkdir -p "$out"; touch "$out/metrics.json" ;;
esac
"""


@pytest.fixture
def machine(tmp_path):
    """(words, **environment) -> exit status and commands of grounding.sh, in a root with stand-ins for the programs."""
    shutil.copytree(FOLDER, tmp_path / "docs" / "recipes")
    for name in ("python", "torchrun"):
        (tmp_path / "bin" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(STAND_IN)
        (tmp_path / "bin" / name).chmod(0o755)

    def start(*words: str, **environment: str) -> tuple[int, list[str]]:
        (tmp_path / "log").write_text("")
        environment = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"} | environment
        done = subprocess.run(["bash", tmp_path / "docs/recipes/grounding.sh", *words], env=environment, timeout=60,
                              capture_output=True, text=True, cwd="/")
        return done.returncode, (tmp_path / "log").read_text().splitlines()
    start.root = tmp_path
    return start


def test_what_is_whole_is_not_made_again(machine):
    """A recipe takes days and is started more than once; each time it must go on where it was."""
    status, ran = machine("sft_tg", "sft_tg_3ep")
    assert status == 0
    assert [line.split("runs/")[-1] for line in ran if "train.py" in line] == ["sft_tg", "sft_tg_3ep"]
    assert machine("sft_tg", "sft_tg_3ep")[1] == [line for line in ran if "step0.py" in line]
    (machine.root / "runs/sft_tg/summary.json").unlink()
    (again,) = (line for line in machine("sft_tg")[1] if "step0.py" not in line)
    assert " --resume " in again and again.endswith("runs/sft_tg")  # not refused because its folder holds a run


def test_nothing_is_trained_behind_a_failed_step_0(machine):
    """Nor where most videos could not be read; the exit status says so to whatever started the recipe."""
    status, ran = machine(FAIL="step0.py")
    assert status != 0 and not any("train.py" in line or "base_think" in line for line in ran)
    status, ran = machine("sft_tg", BAD="4")
    assert status != 0 and any("check" in line for line in ran) and not any("train.py" in line for line in ran)
    shutil.rmtree(machine.root / "data/checked")
    status, ran = machine("sft_tg", FAIL="step0.py", STEP0="go_on")
    assert status == 0 and any("train.py" in line for line in ran)


def test_half_a_file_is_not_taken_for_a_whole_one(machine):
    """A full disk leaves a part of a file; under its own name it would be trained on the next time."""
    full = machine.root / "bin" / "cat"
    full.write_text("#!/usr/bin/env bash\nhead -1 \"$1\"\nexit 1\n")
    full.chmod(0o755)
    status, ran = machine("sft_tg")
    assert status != 0 and not any("train.py" in line for line in ran)
    assert not (machine.root / "data/charades_train.jsonl").exists()
    full.unlink()
    status, ran = machine("sft_tg")
    assert status == 0 and len((machine.root / "data/charades_train.jsonl").read_text().splitlines()) == 299


def test_a_word_that_is_no_run_is_refused(machine):
    """`--dryrun`, or a run with a typing error, must neither start everything nor nothing, silently."""
    for word in ("--dryrun", "grpo_tgg"):
        status, ran = machine(word)
        assert status == 2 and not ran, word


# --- step 0 -----------------------------------------------------------------------------------------------------------


def judged(tmp_path, capsys, monkeypatch, ours: float, *flags: str) -> tuple[int, str]:
    config = dict.fromkeys(step0.SEEN, 1)
    metrics = {"grounding/mIoU": ours, "n": 3720, "parse_failure": 0.5, "reasons": {"no_answer": 7}, "config": config}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    monkeypatch.setattr("sys.argv", ["step0.py", str(tmp_path / "metrics.json"), *flags, "grounding/mIoU=29.0"])
    try:
        step0.main()
    except SystemExit as stop:
        return 1, f"{capsys.readouterr().out}{stop.code}"
    return 0, capsys.readouterr().out


def test_step_0_stops_at_a_base_model_that_is_not_the_published_one(tmp_path, capsys, monkeypatch):
    """Two standard errors of 3,720 questions and a point: 2.5. Lower and higher alike, for both are another pipeline."""
    assert set(step0.SEEN) <= {field.name for field in dataclasses.fields(evaluate.Flags)}
    assert step0.allowed(29.0, 3720) == pytest.approx(2.488, abs=1e-3)
    assert judged(tmp_path, capsys, monkeypatch, 0.27)[0] == 0
    assert judged(tmp_path, capsys, monkeypatch, 0.437)[0] == 1
    assert judged(tmp_path, capsys, monkeypatch, 0.437, "--at_least")[0] == 0
    status, said = judged(tmp_path, capsys, monkeypatch, 0.26, "--at_least")
    assert status == 1 and "no_answer" in said and "prompt 1" in said and "docs/recipes.md" in said


def steps0() -> list[tuple[str, str, str, dict[str, float], bool]]:
    """(recipe, run, benchmark, published figures, whether more is allowed) of each step 0."""
    found = []
    for name, lines in LINES.items():
        for line in (line for line in lines if "step0.py" in line):
            metrics, *words = arguments_of(line)
            figures = {pair.split("=")[0]: float(pair.split("=")[1]) for pair in words if "=" in pair}
            found.append((name.removesuffix(".sh"), *Path(metrics).parts[1:3], figures, "--at_least" in words))
    return found


def test_step_0_is_the_first_of_every_recipe_and_compares_with_the_published_row():
    """Captions have no base row that this code could reach, and say so."""
    assert {name for name, *_ in steps0()} | {"captions"} == {name.removesuffix(".sh") for name in LINES}
    assert "Qwen2-VL-7B" in (FOLDER / "captions.sh").read_text()
    for name, lines in LINES.items():
        training = [number for number, line in enumerate(lines) if "train.py" in line]
        assert all(number < training[0] for number, line in enumerate(lines) if "step0.py" in line), name
    rows = {(run, benchmark): numbers for run, benchmark, numbers, _ in expected()}
    for _, run, benchmark, figures, _ in steps0():
        names = ORDER[re.sub(r"_answer$", "", benchmark)]
        assert figures.items() <= dict(zip(names, rows[run, benchmark])).items()


# --- the hyper-parameters ---------------------------------------------------------------------------------------------


def differing(config: train.Config, wanted: dict) -> dict:
    return {name: getattr(config, name) for name, value in wanted.items() if getattr(config, name) != value}


@pytest.mark.parametrize("name", list(trained()))
def test_every_run_has_the_published_settings(name):
    """Whatever a command leaves to the defaults counts too: a default that moves must not move a recipe."""
    config = trained()[name]
    if name.startswith("temporal_rlt") or name == "temporal_r1":
        half = name.removeprefix("temporal_rlt_")  # of the dual reward, where the run is about one
        assert differing(config, TEMPORAL_R1 | ({"reward": half} if half in ("discrete", "continuous") else {})) == {}
    elif name == "temporal_r1_sft":  # its settings are not published, but for what the model sees
        assert differing(config, {k: TEMPORAL_R1[k] for k in ("total_pixels", "min_pixels", "fps", "prompt")}) == {}
    elif name.startswith("sft_"):
        assert differing(config, VIDEOCHAT_R1_SFT) == {}
    else:  # the paper pays captions for recall alone
        assert differing(config, VIDEOCHAT_R1 | ({"reward": "videochat_r1"} if name == "grpo_captions" else {})) == {}
    assert ("3B" in config.model) == (name in ("temporal_r1", "temporal_r1_sft"))


def test_what_is_no_flag_is_as_published():
    """AdamW of both papers' trainers, and where they shorten a gradient: the toy needs another memory of squares."""
    policy = SimpleNamespace(visual=torch.nn.Linear(2, 2), hf=torch.nn.Linear(2, 2))
    for config in trained().values():
        (group,) = train.make_optimizer(config, policy, 1e-6).param_groups
        assert group["betas"] == (0.9, 0.999) and group["eps"] == 1e-8
    assert train.MAX_GRAD_NORM == 1.0


def changed(one: str, other: str) -> set[str]:
    """The settings in which two runs differ."""
    one, other = vars(trained()[one]), vars(trained()[other])
    return {name for name in one if one[name] != other[name]}


def test_epochs_and_prompts_are_those_of_the_rows():
    """The runs of an ablation differ in what it is about and in nothing else."""
    runs = trained()
    assert {name: run.steps for name, run in runs.items() if run.steps not in (0, -1)} == {"grpo_tg_3ep": -3,
                                                                                           "temporal_r1": 630}
    assert {name for name, run in runs.items() if run.sft_steps == -3} == {"sft_tg_3ep"}
    grpo = {name: run.prompt for name, run in runs.items() if run.steps}
    assert grpo["videochat_r1"] == "answer" and grpo["videochat_r1_thinking"] == "think"
    assert all(prompt == "answer" for name, prompt in grpo.items() if name.endswith("_answer"))
    assert grpo["grpo_tg"] == grpo["grpo_gqa"] == grpo["grpo_tracking"] == "think"
    assert changed("temporal_rlt", "temporal_rlt_random") == {"train_data", "out"}
    assert changed("temporal_rlt", "temporal_rlt_discrete") == {"reward", "out"}
    assert changed("temporal_rlt", "temporal_rlt_continuous") == {"reward", "out"}
    assert runs["sft_joint"].train_data == runs["videochat_r1"].train_data
    assert changed("sft_joint", "sft_tg") == {"train_data", "out"}


# --- the expected numbers ---------------------------------------------------------------------------------------------

# Which row of lib/published.py a row of docs/recipes.md is. Benchmarks that lib/published.py has no row for are left out.
ROWS = {
    "base_answer": published.BASE, "base_think": f"{published.BASE}, think prompt", "sft_tg": "SFT, 1 epoch",
    "sft_tg_3ep": "SFT, 3 epochs", "grpo_tg_answer": "GRPO on Charades, answer prompt", "grpo_tg": "GRPO on Charades",
    "grpo_tg_3ep": "GRPO on Charades, 3 epochs", "sft_tracking": "SFT on GOT-10k", "grpo_tracking": "GRPO on GOT-10k",
    "sft_gqa": "SFT", "grpo_gqa_answer": "GRPO on NExT-GQA", "grpo_gqa": "GRPO on NExT-GQA, think prompt",
    "grpo_qa_answer": "GRPO on answers only", "grpo_tg_gqa": "GRPO on Charades and NExT-GQA",
    "videochat_r1": published.R1, "videochat_r1_thinking": published.R1_THINKING, "sft_quality": "SFT",
    "grpo_quality": "GRPO", "sft_captions": "SFT", "grpo_captions": "GRPO", "temporal_r1": "Temporal-R1-3B",
    "temporal_rlt": "Temporal-RLT-7B", "temporal_r1_sft": "Temporal-R1-3B, SFT", "base_3b": "Qwen2.5-VL-3B",
    "base_3b_answer": "Qwen2.5-VL-3B",
}
ROWS_ELSEWHERE = {  # a run that has another name in another table
    ("base_answer", "dream1k"): "Qwen2-VL-7B", ("sft_gqa", "videomme"): "SFT on NExT-GQA",
    ("sft_gqa", "mvbench"): "SFT on NExT-GQA", ("sft_gqa", "perception_test"): "SFT on NExT-GQA",
    ("sft_tg", "activitynet"): "SFT on Charades, 1 epoch", ("sft_tg_3ep", "activitynet"): "SFT on Charades, 3 epochs",
    **{(run, f"videomme_{way}"): f"{model}, {look} look" for way, look in (("all", "one"), ("looks", "second"))
       for run, model in (("base_answer", published.BASE), ("videochat_r1_thinking", published.R1_THINKING))},
    ("temporal_r1", "charades_sta_answer"): "Temporal-R1-3B, answer only", ("temporal_r1", "activitynet_answer"): None,
}
NO_NUMBER = {"sft_joint", "grpo_tracking_aligned", "temporal_rlt_random", "temporal_rlt_discrete",
             "temporal_rlt_continuous"}  # ours
ORDER = {"charades_sta": ("grounding/mIoU", "grounding/R@0.3", "grounding/R@0.5", "grounding/R@0.7"),
         "nextgqa": ("gqa/accuracy", "gqa/mIoU"), "got10k": ("tracking/AO", "tracking/R@0.5", "tracking/R@0.7"),
         "vidtab_qa": ("classification/accuracy",),
         "dream1k": ("captioning/F1", "captioning/recall", "captioning/precision")}
ORDER["activitynet"] = ORDER["rextime"] = ORDER["charades_sta"]
ORDER["videomme"] = ORDER["mvbench"] = ORDER["perception_test"] = ("qa/accuracy",)


def expected() -> list[tuple[str, str, list[float | None], str]]:
    rows = re.findall(r"^\| (\w+) \| (\w+) \| ([-\d./ ]+) \| (.+) \|$", RECIPES, re.MULTILINE)
    return [(run, benchmark, [None if n == "-" else float(n) for n in numbers.split(" / ")], source)
            for run, benchmark, numbers, source in rows]


def row_of(run: str, benchmark: str) -> published.Row | None:
    """The row of lib/published.py that a row of docs/recipes.md repeats; None where it has none."""
    model = ROWS_ELSEWHERE.get((run, benchmark), ROWS.get(run))
    rows = published.rows_of(re.sub(r"_(answer|32|all|looks)$", "", benchmark))
    return next((row for row in rows if row.model == model), None)


def test_expected_numbers_are_the_published_ones():
    """The same numbers stand in lib/published.py, from the same tables; a typing error in either is found here."""
    found = [(run, benchmark, numbers, row.values) for run, benchmark, numbers, _ in expected()
             if (row := row_of(run, benchmark))]
    for run, benchmark, numbers, published_values in found:
        names = ORDER[re.sub(r"_(answer|32|all|looks)$", "", benchmark)]
        given = {name: number for name, number in zip(names, numbers) if name in published_values or number is None}
        values = {name: published_values.get(name) for name in given}
        assert given == {name: v and pytest.approx(100 * v) for name, v in values.items()}, (run, benchmark)
    assert len(found) >= 68


def test_every_row_of_the_papers_is_here_or_said_to_be_missing():
    """"For each row of the papers' tables": the baselines too, beside which the other numbers mean something."""
    here = {row_of(run, benchmark) and row_of(run, benchmark)[:2] for run, benchmark, *_ in expected()}
    papers = ("VideoChat-R1,", published.TEMPORAL_R1, published.QUOTED)  # not VideoChat-R1.5, a later paper
    missing = {row[:2] for row in published.ROWS if row.source.startswith(papers)} - here
    assert missing == {("activitynet_rtl", "Temporal-RLT-7B"), ("mmvu", "Temporal-RLT-7B"),
                       ("charades_sta", "Temporal-RLT-7B "), ("activitynet", "Temporal-RLT-7B "),  # by OneThinker
                       ("dream1k", "GRPO, GPT-3.5 as its judge in training"),
                       *(("longvideobench", f"{model}, {look} look")
                         for model in (published.BASE, published.R1_THINKING) for look in ("one", "second"))}
    top = RECIPES.split("## Data")[0]
    assert "ActivityNet-RTL" in top and "MMVU" in top and "OneThinker (arXiv 2512.03043)\nquotes 57.9" in RECIPES


def test_every_expected_number_names_its_source_and_a_run_with_a_command():
    runs = {run for run, *_ in expected()}
    assert runs - {"base_answer", "base_think", "base_3b", "base_3b_answer"} == set(trained()) - NO_NUMBER
    assert len({(run, benchmark) for run, benchmark, *_ in expected()}) == len(expected())
    outs = [arguments_of(command)[-1] for command in COMMANDS]
    for run, benchmark, _, source in expected():
        assert source.startswith(("VideoChat-R1", "Temporal-R1, README", "Temporal-RLT as quoted by"))
        assert f"runs/{run}/{benchmark}" in outs, (run, benchmark)


# --- what it takes ----------------------------------------------------------------------------------------------------

# The plan's arguments of each data set, and the tokens of an answer with and without thought: all ours but the counts.
INPUTS = {
    "grounding": ("--samples 12408 --videos 5338 --seconds 30.6 --width 480 --height 360", 150, 20),
    "tracking": ("--samples 9335 --frames 8 --seconds 15 --width 1920 --height 1080 --video_bytes 470000", 350, 250),
    "questions": ("--samples 3358 --videos 567 --seconds 40 --width 640 --height 480", 180, 40),
    "quality": ("--samples 200 --seconds 9 --width 1920 --height 1080 --video_bytes 500000", 120, 10),
    "captions": ("--samples 1000 --seconds 30 --width 640 --height 360", 300, 150),
    "pool": ("--samples 49898 --videos 9775 --seconds 40 --width 640 --height 480", 150, 20),
    "selected": ("--samples 32000 --videos 9775 --seconds 40 --width 640 --height 480", 150, 20),
}
JOINT = ["grounding", "questions", "tracking"]
RUNS = {  # what a run's plan is made of, beside its command
    "sft_tg": ["grounding"], "sft_tg_3ep": ["grounding"], "grpo_tg_answer": ["grounding"], "grpo_tg": ["grounding"],
    "grpo_tg_3ep": ["grounding"], "sft_tracking": ["tracking"], "grpo_tracking": ["tracking"],
    "grpo_tracking_aligned": ["tracking"], "sft_qa": ["questions"],
    "sft_gqa": ["questions"], "grpo_qa_answer": ["questions"], "grpo_gqa_answer": ["questions"],
    "grpo_qa": ["questions"], "grpo_gqa": ["questions"], "grpo_tg_gqa": JOINT[:2], "videochat_r1": JOINT,
    "sft_joint": JOINT, "videochat_r1_thinking": JOINT, "sft_quality": ["quality"],
    "grpo_quality": ["quality"],
    "sft_captions": ["captions"], "grpo_captions": ["captions"], "temporal_r1": ["grounding"],
    "temporal_r1_sft": ["grounding"], "temporal_rlt": ["selected"], "temporal_rlt_random": ["selected"],
    "temporal_rlt_discrete": ["selected"], "temporal_rlt_continuous": ["selected"],
}
MODELS = {name: plan.count(plan.load_shape(name)) for name in plan.SHAPES}
SHARED = ("max_frames", "total_pixels", "min_pixels", "group_size", "max_new_tokens", "beta", "freeze_vision",
          "fps", "lora_rank", "shard", "offload")


def job(config: train.Config, source: str) -> plan.Job:
    """The plan's job for a command of train.py on one of its data sets."""
    given, thinking, plain = INPUTS[source]
    made = vars(plan.parse_arguments(shlex.split(given)))
    tuned = not config.steps
    asked = config.sft_steps if tuned else config.steps
    questions = config.sft_questions if tuned else config.questions
    epochs = -asked if asked < 0 else asked * questions / made["samples"]
    made |= {name: getattr(config, name) for name in SHARED}
    made |= {"model": "3b" if "3B" in config.model else "7b", "stage": "sft" if tuned else "grpo", "epochs": epochs,
             "questions": questions, "completion_tokens": plain if tuned or config.prompt == "answer" else thinking}
    return plan.Job(**made)


def run_row(name: str, config: train.Config) -> str:
    jobs = [job(config, source) for source in RUNS[name]]
    model = MODELS[jobs[0].model]
    memory = max(max(plan.peak_bytes(model, j).values()) for j in jobs)
    disks = [plan.disk(model, j) for j in jobs]
    disk = disks[0]["checkpoints"] + disks[0]["models"] + sum(d["videos"] for d in disks)
    hours = sum(plan.hours(model, j) for j in jobs)
    cells = (name, jobs[0].model, " + ".join(RUNS[name]), str(sum(map(plan.steps, jobs))), f"{memory / 1e9:.0f}",
             f"{disk / 1e9:.0f}", f"{hours:.1f}")
    return "| " + " | ".join(cells) + " |"


def answering_row() -> str:
    """Repeated inference on the pool, before anything is trained."""
    arguments = f"--model 7b --stage answer {INPUTS['pool'][0]} --total_pixels 1605632 --min_pixels 3136"
    j = plan.parse_arguments([*shlex.split(arguments), "--questions", str(8 * 8)])
    memory, disk = (sum(part.values()) for part in (plan.peak_bytes(MODELS["7b"], j), plan.disk(MODELS["7b"], j)))
    return (f"| probe_charades, probe_nextgqa, probe_nextqa | 7b | pool | {plan.steps(j)} | {memory / 1e9:.0f} | "
            f"{disk / 1e9:.0f} | {plan.hours(MODELS['7b'], j):.1f} |")


def tables() -> dict[str, list[str]]:
    inputs = ["| data | tools.plan | answer, tokens | without thought |", "|---|---|---|---|"]
    inputs += [f"| {name} | `{given}` | {thinking} | {plain} |" for name, (given, thinking, plain) in INPUTS.items()]
    runs = ["| run | model | data | steps | memory of a card, GB | disk, GB | hours |", "|---" * 7 + "|"]
    first = ["| recipe | run | benchmark | published, and what is allowed |", "|---" * 4 + "|", *map(step0_row, steps0())]
    return {"step0": first, "inputs": inputs,
            "runs": [*runs, *(run_row(name, trained()[name]) for name in RUNS), answering_row()]}


# How many samples the benchmarks have on which step 0 is taken.
SIZES = {"charades_sta": 3720, "charades_sta_answer": 3720, "nextgqa": 5553, "got10k": 180, "vidtab_qa": 724}


def step0_row(step: tuple) -> str:
    recipe, run, benchmark, figures, at_least = step
    sign, end = ("−", " at least") if at_least else ("±", "")
    cells = [f"{name.split('/')[1]} {percent:.1f} {sign} {step0.allowed(percent, SIZES[benchmark]):.1f}{end}"
             for name, percent in figures.items()]
    return f"| {recipe} | {run} | {benchmark} | {', '.join(cells)} |"


def with_tables(text: str) -> str:
    for name, rows in tables().items():
        table = f"<!-- table: {name} -->\n" + "\n".join(rows) + "\n\n"
        text = re.sub(rf"<!-- table: {name} -->\n(?:\|[^\n]*\n)*\n", lambda _: table, text)
    return text


def test_the_predictions_are_those_of_the_plan():
    """`python tests/test_recipes.py` writes them; a figure that was typed, or is older than the formula, fails here."""
    assert RECIPES == with_tables(RECIPES) and RECIPES.count("<!-- table: ") == 3
    assert set(RUNS) == set(trained())
    assert re.search(r"\| grpo_tg \| 7b \| grounding \| 1551 \| 37 \|", RECIPES)  # VideoChat-R1's number of steps


def test_what_is_said_to_fit_fits_and_what_is_not_does_not():
    """The sentences at the top that decide whether somebody rents a machine."""
    peak = {}
    for name, config in trained().items():
        model = MODELS["3b" if "3B" in config.model else "7b"]
        jobs = [job(config, source) for source in RUNS[name]]
        assert all(plan.sharded(model, j) and plan.verdict(model, j).startswith("fits a card of 80 GB") for j in jobs)
        peak[name] = max(plan.needed(model, j) for j in jobs)
    tg = job(trained()["grpo_tg"], "grounding")
    ways = [{"shard": "off"}, {"gpus": 1, "offload": True}, {"gpus": 1, "lora_rank": 16}]
    whole, offloaded, adapted = (plan.needed(MODELS["7b"], dataclasses.replace(tg, **way)) / 1e9 for way in ways)
    small = plan.needed(MODELS["3b"], dataclasses.replace(tg, **ways[2])) / 1e9
    own = sum(plan.states(MODELS["7b"], tg).values()) / 1e9
    top = " ".join(RECIPES.split("## Data")[0].split())
    assert f"GRPO needs about {peak['grpo_tg'] / 1e9:.0f} GB of each" in top and whole > 80
    assert f"it is about {whole:.0f} GB; one card takes it with `--offload` ({offloaded:.0f} GB, and {own:.0f} GB" in top
    assert f"{adapted:.0f} GB for 7B and {small:.0f} GB for `Qwen/Qwen2.5-VL-3B-Instruct`" in top
    answering = plan.parse_arguments(["--stage", "answer", "--questions", "64"])
    assert plan.verdict(MODELS["7b"], answering).startswith("fits")


def main() -> None:
    path = ROOT / "docs" / "recipes.md"
    path.write_text(with_tables(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
