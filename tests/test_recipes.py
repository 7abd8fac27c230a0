"""docs/recipes.md: its commands are accepted, carry the published settings, and its figures are those of the code."""

import dataclasses
import re
import shlex
import subprocess
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

import data
import train
from lib import published
from lib.samples import read_jsonl, write_jsonl
from tools import convert, data_commands, evaluate, plan

RECIPES = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", RECIPES, re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if re.search(r"\.py|-m tools", line)]

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


def script_of(command: str) -> str:
    return re.search(r"(\w+\.py|tools\.\w+)", command)[1]


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
    else:
        assert script == "data.py"
        parsed = data_commands.parse_arguments(arguments)
        if parsed.command == "convert":
            splits = convert.FORMATS[parsed.name][1]
            assert parsed.split is None or parsed.split in splits


def test_every_file_that_a_command_reads_is_made_by_another():
    """A data file under a name that no earlier line writes. The captions are the reader's own, and said to be."""
    written, own = set(), {"data/fiber1k.jsonl", "data/dream1k.jsonl"}
    for line in (line for block in BLOCKS for line in block.splitlines()):
        read = {name for name in re.findall(r"(?<![\w/])data/\w+\.jsonl", line)}
        made = set(re.findall(r"(?:--out|>) (data/\w+\.jsonl)", line))
        assert read - made <= written | own, line
        written |= made
    assert all(name in RECIPES.split("## How every row")[0] for name in own)
    probes = set(re.findall(r"select (runs/\w+)/predictions", RECIPES))
    assert probes and all(f"--out {probe}\n" in RECIPES for probe in probes)


def test_the_seds_make_samples_of_what_they_say(tmp_path):
    """A blank more or less in the JSON and `sed` changes nothing, silently: questions would keep their windows."""
    sample = {"id": "a", "task": "gqa", "video": "v.mp4", "question": "why?", "options": ["x", "y"], "answer": "A",
              "spans": [[1.0, 2.0]]}
    seds = [line for block in BLOCKS for line in block.splitlines() if line.startswith("sed ")]
    assert len(seds) == 5
    changed = []
    for line in seds:
        source, target = re.search(r"(data/\S+) > (data/\S+)", line).groups()
        (tmp_path / "data").mkdir(exist_ok=True)
        write_jsonl(tmp_path / source, [sample])
        subprocess.run(line, shell=True, cwd=tmp_path, check=True)
        changed += read_jsonl(tmp_path / target)
    assert [s["task"] for s in changed] == ["qa", "qa", "gqa", "gqa", "gqa"]
    assert [s.get("think") for s in changed] == [None, None, False, False, False]
    assert "<glue>" not in data.target_text(changed[0], "answer")
    assert "<think>" not in data.target_text(changed[2], "think")


def test_the_short_videos_are_those_of_the_length_class(tmp_path):
    """`grep` on a converted file: the word in a question or another key must not make a video short."""
    row = {"videoID": "v", "question": 'Is it "short"?', "options": ["A. yes", "B. no"], "answer": "B"}
    (tmp_path / "data").mkdir()
    rows = [row | {"question_id": name, "duration": name} for name in ("short", "medium", "long")]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    convert.convert("videomme", tmp_path / "rows.jsonl", tmp_path / "data/videomme.jsonl")
    (line,) = (line for block in BLOCKS for line in block.splitlines() if line.startswith("grep "))
    subprocess.run(line, shell=True, cwd=tmp_path, check=True)
    assert [s["id"] for s in read_jsonl(tmp_path / line.split(" > ")[1])] == ["short"]


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
    else:
        assert differing(config, VIDEOCHAT_R1) == {}
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

# Which row of lib/published.py a row of docs/recipes.md is. Benchmarks that lib/published.py has no row for are left out here.
ROWS = {
    "base_answer": published.BASE, "base_think": f"{published.BASE}, think prompt", "sft_tg": "SFT, 1 epoch",
    "sft_tg_3ep": "SFT, 3 epochs", "grpo_tg_answer": "GRPO on Charades, answer prompt", "grpo_tg": "GRPO on Charades",
    "grpo_tg_3ep": "GRPO on Charades, 3 epochs", "sft_tracking": "SFT on GOT-10k", "grpo_tracking": "GRPO on GOT-10k",
    "sft_gqa": "SFT", "grpo_gqa_answer": "GRPO on NExT-GQA", "grpo_gqa": "GRPO on NExT-GQA, think prompt",
    "grpo_qa_answer": "GRPO on answers only", "grpo_tg_gqa": "GRPO on Charades and NExT-GQA",
    "videochat_r1": published.R1, "videochat_r1_thinking": published.R1_THINKING, "sft_quality": "SFT",
    "grpo_quality": "GRPO", "sft_captions": "SFT", "grpo_captions": "GRPO", "temporal_r1": "Temporal-R1-3B",
    "temporal_rlt": "Temporal-RLT-7B", "temporal_r1_sft": "Temporal-R1-3B, SFT", "base_3b": "Qwen2.5-VL-3B",
}
ROWS_ELSEWHERE = {  # a run that has another name in another table
    ("base_answer", "dream1k"): "Qwen2-VL-7B", ("sft_gqa", "videomme"): "SFT on NExT-GQA",
    ("sft_gqa", "mvbench"): "SFT on NExT-GQA", ("sft_gqa", "perception_test"): "SFT on NExT-GQA",
    ("sft_tg", "activitynet"): "SFT on Charades, 1 epoch", ("sft_tg_3ep", "activitynet"): "SFT on Charades, 3 epochs",
    ("temporal_r1", "charades_sta_answer"): "Temporal-R1-3B, answer only", ("temporal_r1", "activitynet_answer"): None,
}
NO_NUMBER = {"sft_joint", "temporal_rlt_random", "temporal_rlt_discrete", "temporal_rlt_continuous"}  # ours
ORDER = {"charades_sta": ("grounding/mIoU", "grounding/R@0.3", "grounding/R@0.5", "grounding/R@0.7"),
         "nextgqa": ("gqa/accuracy", "gqa/mIoU"), "got10k": ("tracking/AO", "tracking/R@0.5"),
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
    rows = published.rows_of(re.sub(r"_(answer|32)$", "", benchmark))
    return next((row for row in rows if row.model == model), None)


def test_expected_numbers_are_the_published_ones():
    """The same numbers stand in lib/published.py, from the same tables; a typing error in either is found here."""
    found = [(run, benchmark, numbers, row.values) for run, benchmark, numbers, _ in expected()
             if (row := row_of(run, benchmark))]
    for run, benchmark, numbers, published_values in found:
        names = ORDER[re.sub(r"_(answer|32)$", "", benchmark)]
        values = [published_values.get(name) for name in names][: len(numbers)]
        assert [None if v is None else pytest.approx(100 * v) for v in values] == numbers, (run, benchmark)
    assert len(found) >= 68


def test_every_row_of_the_papers_is_here_or_said_to_be_missing():
    """"For each row of the papers' tables": the baselines too, beside which the other numbers mean something."""
    here = {row_of(run, benchmark) and row_of(run, benchmark)[:2] for run, benchmark, *_ in expected()}
    papers = ("VideoChat-R1", published.TEMPORAL_R1, published.QUOTED)
    missing = {row[:2] for row in published.ROWS if row.source.startswith(papers)} - here
    assert missing == {("activitynet_rtl", "Temporal-RLT-7B"), ("mmvu", "Temporal-RLT-7B"),
                       ("charades_sta", "Temporal-RLT-7B ")}  # by OneThinker
    top = RECIPES.split("## Data")[0]
    assert "ActivityNet-RTL" in top and "MMVU" in top and "OneThinker\nquotes 57.9" in RECIPES


def test_every_expected_number_names_its_source_and_a_run_with_a_command():
    runs = {run for run, *_ in expected()}
    assert runs - {"base_answer", "base_think", "base_3b"} == set(trained()) - NO_NUMBER
    assert len({(run, benchmark) for run, benchmark, *_ in expected()}) == len(expected())
    outs = [arguments_of(command)[-1] for command in COMMANDS]
    for run, benchmark, _, source in expected():
        assert source.startswith(("VideoChat-R1", "Temporal-R1, README", "Temporal-RLT as quoted by"))
        places = [f"runs/{run}/{benchmark}", f"runs/$RUN/{benchmark}"]
        assert any(place in outs for place in places[: 1 if run.startswith("base") else 2]), (run, benchmark)


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
    "grpo_tg_3ep": ["grounding"], "sft_tracking": ["tracking"], "grpo_tracking": ["tracking"], "sft_qa": ["questions"],
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
    return {"inputs": inputs, "runs": [*runs, *(run_row(*item) for item in trained().items()), answering_row()]}


def with_tables(text: str) -> str:
    for name, rows in tables().items():
        table = f"<!-- table: {name} -->\n" + "\n".join(rows) + "\n\n"
        text = re.sub(rf"<!-- table: {name} -->\n(?:\|[^\n]*\n)*\n", lambda _: table, text)
    return text


def test_the_predictions_are_those_of_the_plan():
    """`python tests/test_recipes.py` writes them; a figure that was typed, or is older than the formula, fails here."""
    assert RECIPES == with_tables(RECIPES) and RECIPES.count("<!-- table: ") == 2
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
