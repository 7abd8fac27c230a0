"""The claims of both papers, tested in miniature: every arm is a train.py command, every figure a mean of three seeds.

    python tests/claims.py            all arms of all seeds, two to three hours on two cores; goes on where it was interrupted
    python tests/claims.py --report   only the tables, from the runs that are there (also in tests/results/claims.json)

An arm starts from a model that has learnt a little of everything by imitation (`base`, one for each seed), is trained by
one command, and answers the same held-out questions through `eval.py`. What differs between the arms of a claim is one
flag or one file. The clips are those of `tests/one_event.py`; the questions about them are made here, five kinds:

    grounding   when is the screen red?                           the labels that SFT sees are late, so there is headroom
    begin       in which part of the clip does it begin? (qa)     likewise: the letter that a late annotator would choose
    evidence    the same, with the window it is seen in (gqa)     likewise
    colour      which colour does the screen turn? (qa)           the base knows it: there to be forgotten
    text        what is a hammer? (qa, without a video)           there to be forgotten: plain language

Equal compute means as many completions as each other or, for SFT against GRPO, about as many seconds on the same machine:
three SFT steps of 16 questions take as long as one GRPO step of 8 questions and 8 completions.

The results in tests/results were made when the second beta of AdamW was a flag, 0.99 in every arm and control, and the
tokenizer knew fewer phrases. Now train.py takes 0.999 wherever a model is given, so here too: the same commands of today are
not quite the same experiment.
"""

import argparse
import itertools
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import one_event  # noqa: E402
from data import STYLES, build_prompt, target_text  # noqa: E402
from eval import blind_baselines, compute_metrics  # noqa: E402
from lib import toy  # noqa: E402
from lib.samples import load_samples, read_jsonl  # noqa: E402

TRAIN, HELD_OUT = 400, 100  # clips
BEGINS = ["second 0 or 1", "second 2 or 3", "second 4 or 5", "second 6 or later"]
THINGS = {"animal": "horse cow goat fox", "tool": "hammer saw drill axe", "fruit": "apple pear plum lemon",
          "metal": "iron gold tin zinc"}

# --- questions --------------------------------------------------------------------------------------------------------


def make_questions(clip: dict[str, dict], rng: np.random.Generator) -> dict[str, dict]:
    """The questions about one clip, from its toy samples by task. `target` is late; `exact` is what it should be."""
    grounding = clip["grounding"]
    (span,), name = grounding["spans"], grounding["id"].removesuffix("-grounding")
    colour = grounding["question"].rsplit(" ", 1)[1]

    def letter(window) -> str:
        return "ABCD"[min(window[0] // 2, 3)]

    def question(kind: str, say, **fields) -> dict:
        late, exact = one_event.late_span(rng, *span), tuple(span)
        told = [f"<think>{one_event.thought(window, colour)}</think>{say(window)}" for window in (late, exact)]
        return {"id": f"{name}-{kind}", "category": kind, "video": grounding["video"], "duration": grounding["duration"],
                **fields, "target": told[0], "exact": told[1]}

    begin = {"question": "when does the screen turn?", "options": BEGINS, "answer": letter(span)}
    kind = rng.choice(list(THINGS))
    text = {"question": f"what is a {rng.choice(THINGS[kind].split())}?", "options": list(THINGS),
            "answer": "ABCD"[list(THINGS).index(kind)]}
    return {
        "grounding": question("grounding", lambda w: f"<answer>{w[0]} to {w[1]}</answer>", task="grounding",
                              question=grounding["question"], spans=[span]),
        "begin": question("begin", lambda w: f"<answer>{letter(w)}</answer>", task="qa", **begin),
        "evidence": question("evidence", lambda w: f"<answer>{letter(w)}</answer><glue>[({w[0]}, {w[1]})]</glue>",
                             task="gqa", spans=[span], **begin),
        "colour": {**clip["qa"], "category": "colour"},
        "text": {"id": f"{name}-text", "task": "qa", "category": "text", **text},
    }


def write_data(folder: Path, seed: int) -> None:
    """Clips, a file to train on for each kind of question and of label, the held-out questions, and a random model."""
    if (folder / "initial" / "preprocessor_config.json").exists():
        return
    one_event.write_dataset(folder / "clips", TRAIN, HELD_OUT, seed)
    for split in ("train", "eval"):
        rng = np.random.default_rng([seed, split == "eval"])
        clips: dict[str, dict] = {}
        for sample in load_samples([str(folder / "clips" / f"{split}.jsonl")]):
            clips.setdefault(sample["video"], {})[sample["task"]] = sample
        questions = [make_questions(clip, rng) for clip in clips.values()]
        if split == "eval":
            write(folder / "eval.jsonl", [sample for of_clip in questions for sample in of_clip.values()])
            continue
        for kind in questions[0]:
            samples = [of_clip[kind] for of_clip in questions]
            write(folder / f"{kind}.jsonl", samples)
            write(folder / f"{kind}.exact.jsonl", [{**s, "target": s.get("exact", s.get("target"))} for s in samples])
            write(folder / f"{kind}.brief.jsonl", [{**s, "target": brief(s)} for s in samples])
    samples = [sample for file in sorted(folder.glob("*.jsonl")) for sample in read_jsonl(file)]
    texts = [part["text"] for s in samples for style in STYLES for message in build_prompt(s, style)
             for part in (message["content"] if message["role"] == "user" else []) if "text" in part]
    toy.write_model(folder / "initial", texts + [target_text(s, "think") for s in samples], seed)


def brief(sample: dict) -> str:
    """The target without its thought, for models that are not asked to think."""
    return target_text(sample, "answer").rpartition("</think>")[2]


def write(file: Path, samples: list[dict]) -> None:
    with open(file, "w", encoding="utf-8") as lines:
        for sample in samples:
            fields = {name: value for name, value in sample.items() if name != "exact" and value is not None}
            lines.write(json.dumps(fields) + "\n")


# --- arms -------------------------------------------------------------------------------------------------------------

SIZES = {"grounding": 300, "begin": 300, "evidence": 300, "colour": 200, "text": 400}  # what the base learns from
BASE_STEPS, STEPS = 300, 100
COMMON = ("--max_new_tokens 64 --min_pixels 3136 --warmup_steps 10 --no-gradient_checkpointing --pack_tokens 8192 "
          "--num_workers 1 --sft_questions 16 --save_dtype float32")
GRPO = f"--steps {STEPS} --questions 8 --group_size 8 --lr 4e-4 --beta 0.01"
SFT = f"--steps 0 --sft_steps {3 * STEPS} --sft_lr"  # side by side with nothing else: 0.40 s a step, GRPO 1.09 s
JOINT = "grounding begin evidence"
POOL = "grounding begin colour text"


@dataclass(frozen=True)
class Arm:
    """One training run: which files (a kind, or kind.exact, kind.brief; or another arm's selection), which flags."""

    data: str
    flags: str
    start: str = "base"


BASES = {
    "base": Arm(" ".join(f"{kind}:{n}" for kind, n in SIZES.items()),
                f"--steps 0 --sft_steps {BASE_STEPS} --sft_lr 2e-3", "initial"),
    "base, no thought": Arm(" ".join(f"{kind}.brief:{n}" for kind, n in SIZES.items()),
                            f"--steps 0 --sft_steps {BASE_STEPS} --sft_lr 2e-3 --prompt answer", "initial"),
}
ARMS = {
    "grounding": Arm("grounding", GRPO),
    "begin": Arm("begin", GRPO),
    "evidence": Arm("evidence", GRPO),
    "SFT, late labels, lr 2e-3": Arm("grounding", f"{SFT} 2e-3"),
    "SFT, late labels, lr 5e-4": Arm("grounding", f"{SFT} 5e-4"),
    "SFT, exact labels, lr 2e-3": Arm("grounding.exact", f"{SFT} 2e-3"),
    "SFT, exact labels, lr 5e-4": Arm("grounding.exact", f"{SFT} 5e-4"),
    "joint, equal compute": Arm(JOINT, GRPO),
    "joint, equal data": Arm(JOINT, GRPO.replace(f"--steps {STEPS}", f"--steps {3 * STEPS}")),
    "whole pool": Arm(POOL, GRPO),
    "selected": Arm("selected", GRPO),
    "random, as many": Arm("random", GRPO),
    "selected at T = 0.5": Arm("selected-cool", GRPO),
    "random, as many as at T = 0.5": Arm("random-cool", GRPO),
    "discrete part only": Arm("evidence", f"{GRPO} --reward discrete"),
    "continuous part only": Arm("evidence", f"{GRPO} --reward continuous"),
    "no thought": Arm("grounding.brief", f"{GRPO} --prompt answer", "base, no thought"),
    "no KL": Arm("grounding", GRPO.replace("--beta 0.01", "--beta 0")),
    "token mean": Arm("grounding", f"{GRPO} --loss_norm token"),
    "no std": Arm("grounding", f"{GRPO} --adv_scale none"),
    "G = 2": Arm("grounding", GRPO.replace("--questions 8 --group_size 8", "--questions 32 --group_size 2")),
    "G = 4": Arm("grounding", GRPO.replace("--questions 8 --group_size 8", "--questions 16 --group_size 4")),
    "G = 16": Arm("grounding", GRPO.replace("--questions 8 --group_size 8", "--questions 4 --group_size 16")),
}
LAST = ("joint, equal data", "SFT, late labels, lr 5e-4", "SFT, exact labels, lr 5e-4", "G = 4")
COLUMNS = {"grounding mIoU": ("grounding", "grounding/mIoU"), "begin acc.": ("begin", "qa/accuracy"),
           "evidence acc.": ("evidence", "gqa/accuracy"), "evidence mIoU": ("evidence", "gqa/mIoU"),
           "Acc@GQA": ("evidence", "gqa/Acc@GQA"), "colour acc.": ("colour", "qa/accuracy"),
           "text acc.": ("text", "qa/accuracy")}

# --- running ----------------------------------------------------------------------------------------------------------


def folder_of(seed_folder: Path, arm: str) -> Path:
    return seed_folder / arm.replace(",", "").replace(" = ", "").replace(" ", "-")


def run_seed(folder: Path, seed: int, arms: dict[str, Arm], jobs: int) -> None:
    """These arms of one seed, `jobs` at a time, behind what they need; an arm that has been measured is left alone."""
    write_data(folder, seed)
    with ThreadPoolExecutor(jobs) as pool:  # list: an arm that fails stops the script here
        list(pool.map(lambda item: run_arm(folder, seed, *item), BASES.items()))
        list(pool.map(lambda each: select(folder, seed, *each), [("", 1.0), ("-cool", 0.5)]))
        list(pool.map(lambda item: run_arm(folder, seed, *item), arms.items()))


def run_arm(folder: Path, seed: int, name: str, arm: Arm) -> None:
    out = folder_of(folder, name)
    if (out / "predictions.jsonl").exists():
        return
    start = folder / "initial" if arm.start == "initial" else folder_of(folder, arm.start) / "final"
    data = [f"{folder}/{file}.jsonl{colon}{n}" for file, colon, n in (f.partition(":") for f in arm.data.split())]
    again = "--resume" if (out / "config.json").exists() else ""
    if not (out / "summary.json").exists():  # else the training is done, and only its answers are missing
        call(out, f"train.py --model {quote(start)} --train_data {quote(*data)} --out {quote(out)} --seed {seed} {COMMON} "
                  f"{arm.flags} {again}")
    call(out, f"eval.py --model {quote(out / 'final')} --data {quote(folder / 'eval.jsonl')} --out {quote(out)} "
              "--batch 32 --num_workers 1")


def select(folder: Path, seed: int, suffix: str, temperature: float) -> None:
    """Eight answers of the base to every question of the pool; the selected file, and a random one of its size."""
    out, pool = folder_of(folder, f"selecting{suffix}"), folder / f"pool{suffix}.jsonl"
    write(pool, [s for kind in POOL.split() for s in read_jsonl(folder / f"{kind}.jsonl")])
    if not (out / "predictions.jsonl").exists():
        call(out, f"eval.py --model {quote(folder / 'base' / 'final')} --data {quote(pool)} --out {quote(out)} --seed {seed} "
                  f"--num_samples 8 --temperature {temperature} --batch 16 --num_workers 1")
    for name, control in (("selected", ""), ("random", f"--control random --seed {seed}")):
        call(out, f"data.py select {quote(out / 'predictions.jsonl')} --data {quote(pool)} --out "
                  f"{quote(folder / f'{name}{suffix}.jsonl')} {control}")


def quote(*paths) -> str:
    return " ".join(shlex.quote(str(path)) for path in paths)


def call(out: Path, command: str) -> None:
    """One program of this repository, on one core, its output in `out`/log.txt."""
    out.mkdir(parents=True, exist_ok=True)
    start = time.time()
    with open(out / "log.txt", "a") as log:
        status = subprocess.run([sys.executable, *shlex.split(command)], cwd=ROOT, stdout=log, stderr=log,
                                env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode
    print(f"{time.strftime('%H:%M')} {time.time() - start:5.0f} s  {out.parent.name}  {out.name}  {command.split()[0]}", flush=True)
    if status:
        raise SystemExit(f"exit status {status}; see {out / 'log.txt'}")


# --- the tables -------------------------------------------------------------------------------------------------------

# Claim -> its arms, in the order of the table, and the columns that speak about it.
GROUNDING = ("grounding mIoU", "begin acc.", "evidence acc.", "evidence mIoU", "colour acc.", "text acc.")
CLAIMS = {
    "RL against SFT": (("base", "grounding", *(arm for arm in ARMS if arm.startswith("SFT"))), GROUNDING),
    "joint against single tasks": (("base", "grounding", "begin", "evidence", "joint, equal compute", "joint, equal data"),
                                   tuple(COLUMNS)),
    "selected against random and all": (("base", "selected", "random, as many", "selected at T = 0.5",
                                         "random, as many as at T = 0.5", "whole pool"),
                                        ("grounding mIoU", "begin acc.", "evidence mIoU", "colour acc.", "text acc.")),
    "dual reward against its parts": (("base", "evidence", "discrete part only", "continuous part only"),
                                      ("evidence acc.", "evidence mIoU", "Acc@GQA")),
    "variants of GRPO": (("base", "grounding", "base, no thought", "no thought", "no KL", "token mean", "no std",
                          "G = 2", "G = 4", "G = 16"), GROUNDING),
}


def measure(folder: Path, arm: str) -> dict[str, float]:
    """The columns of one arm and seed, and the seconds of its training."""
    predictions = {p["id"]: p for p in map(json.loads, open(folder_of(folder, arm) / "predictions.jsonl"))}
    held_out = read_jsonl(folder / "eval.jsonl")
    found = {}
    for column, (kind, metric) in COLUMNS.items():
        samples = [sample for sample in held_out if sample["category"] == kind]
        said = [predictions[sample["id"]]["completions"][0] for sample in samples]
        found[column] = compute_metrics(samples, said)[metric]
    summary = json.loads((folder_of(folder, arm) / "summary.json").read_text())
    return found | {"seconds": summary["seconds"]["total"]}


def measure_blind(folder: Path) -> dict[str, float]:
    """For each column the best of the answers that never look at the video."""
    held_out, found = read_jsonl(folder / "eval.jsonl"), {}
    for column, (kind, metric) in COLUMNS.items():
        guesses = blind_baselines([sample for sample in held_out if sample["category"] == kind])
        found[column] = max(guess.get(metric, 0.0) for guess in guesses.values())
    return found


def collect(out: Path, seeds: list[int]) -> dict:
    """What all arms scored, as tests/results/claims.json holds it."""
    arms = {arm: [measure(out / f"seed{seed}", arm) for seed in seeds] for arm in (*BASES, *ARMS)}
    arms["best blind answer"] = [measure_blind(out / f"seed{seed}") for seed in seeds]
    reports = {temperature: [json.loads((out / f"seed{seed}" / f"selected{suffix}.report.json").read_text())["tasks"]
                             for seed in seeds] for temperature, suffix in (("T = 1", ""), ("T = 0.5", "-cool"))}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return {"commit": commit, "date": time.strftime("%Y-%m-%d"), "seeds": seeds, "arms": arms,
            "selected": {temperature: [{task: f"{part['kept']}/{part['total']}" for task, part in tasks.items()}
                                       for tasks in of_seeds] for temperature, of_seeds in reports.items()}}


def table(results: dict, claim: str) -> list[str]:
    """Rows of Markdown: mean and standard deviation (ddof 1) over the seeds."""
    arms, columns = CLAIMS[claim]
    rows = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for arm in (*arms, "best blind answer"):
        values = [[seed[column] for seed in results["arms"][arm]] for column in columns]
        cells = [f"{statistics.fmean(v):.3f} ± {statistics.stdev(v):.3f}" for v in values]
        rows.append(f"| {arm} | " + " | ".join(cells) + " |")
    trained = [arm for arm in arms if not arm.startswith("base")]
    visible = [f"{visible_difference(results, trained, column):.2f}" for column in columns]
    return [*rows, "| *could have been seen* | " + " | ".join(visible) + " |"]


T_975 = {3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 8: 2.365, 10: 2.262}  # quantile of Student's t for so many seeds


def visible_difference(results: dict, arms: list[str], column: str) -> float:
    """Half the width of the 95 % interval of a difference of two of these arms, paired by seed: what is smaller could not be
    told from 0. Its standard deviation is pooled over all pairs of arms, because three seeds give a poor one of each."""
    values = [[seed[column] for seed in results["arms"][arm]] for arm in arms]
    n = len(values[0])
    variance = statistics.fmean(statistics.variance([a - b for a, b in zip(one, other)])
                                for one, other in itertools.combinations(values, 2))
    return T_975[n] * (variance / n) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description="Test the claims of both papers on synthetic clips.")
    parser.add_argument("--out", type=Path, default=Path("runs/claims"), help="folder of all runs (%(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="two at least (0 1 2)")
    parser.add_argument("--jobs", type=int, default=2, help="arms that run side by side, each on one core (%(default)s)")
    parser.add_argument("--report", action="store_true", help="run nothing, only collect what is there")
    args = parser.parse_args()
    if not args.report:
        for arms in ({name: arm for name, arm in ARMS.items() if name not in LAST}, ARMS):  # what matters most first
            for seed in args.seeds:
                run_seed(args.out.resolve() / f"seed{seed}", seed, arms, args.jobs)
    results = collect(args.out.resolve(), args.seeds)
    (ROOT / "tests" / "results" / "claims.json").write_text(json.dumps(results, indent=1) + "\n")
    for claim in CLAIMS:
        print(f"\n{claim}\n" + "\n".join(table(results, claim)))


if __name__ == "__main__":
    main()
