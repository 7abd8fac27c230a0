"""A second look in miniature: clips of 40 seconds in which 20 evenly spaced frames often miss what is asked for.

    python tests/looks.py             three seeds, a few minutes each on one core; goes on where it was interrupted
    python tests/looks.py --report    only the table, from the runs that are there (also in tests/results/looks.json)
    python tests/looks.py --frames    only what the frames allow, without a model: seconds

Once in a clip the lights go out for 8 seconds, and while it is dark the screen flashes in one of four colours for one
second. Which one? A frame every two seconds shows the darkness always and the flash every other time. So a first look can say
when it is dark, and a second one, with as many frames but more of them there, can see what the first one missed.

The tiny model learns by imitation, from one command of train.py and with nothing made for it: gqa questions about evenly
spaced frames (the first look), and qa questions about the same frames and about denser ones (`dense_windows` in the samples:
around the darkness, or anywhere). The thought that it imitates lists what its frames show; a flash between two of them is not in it.

Each model answers the same held-out questions in the same number of frames: in one look; in two; and in one look at frames
chosen without a look: by another clip's window, and by the true one. What the frames allow is 1 where the flash is in one of
them, else the chance of a guess; it needs no model.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from data import denser_frames  # noqa: E402
from eval import blind_baselines  # noqa: E402
from lib import toy  # noqa: E402
from lib.files import write_whole  # noqa: E402
from lib.samples import read_jsonl  # noqa: E402
from rewards import spans_iou  # noqa: E402
from tools import evaluate  # noqa: E402

DURATION, FPS, SHOWN = 40, 2, 20  # seconds, frames a second of the file, frames that the model sees
DARK, FLASH, BIN = 8, 1, 4  # seconds; the darkness begins at a multiple of BIN
TRAIN, HELD_OUT = 160, 100  # clips
DENSITIES = (1.5, 4.0)  # VideoChat-R1.5's, and one that shows every frame of a window twice a second
TRAINING = (f"--fps {SHOWN / DURATION} --max_new_tokens 72 --min_pixels 3136 --warmup_steps 10 --no-gradient_checkpointing "
            "--pack_tokens 16384 --num_workers 0 --save_dtype float32 --sft_steps 450 --sft_questions 16 --sft_lr 2e-3 "
            "--steps 0")

# --- clips and questions ----------------------------------------------------------------------------------------------


def draw_event(rng: np.random.Generator) -> tuple[str, int, float]:
    """-> colour, begin of the darkness, begin of the flash; half a second of darkness at least on either side of it."""
    dark = BIN * int(rng.integers(0, (DURATION - DARK) // BIN + 1))
    flash = dark + 0.5 + int(rng.integers(0, (DARK - FLASH - 1) * FPS + 1)) / FPS
    return str(rng.choice(list(toy.COLOURS))), dark, flash


def render(rng: np.random.Generator, event: tuple[str, int, float]) -> np.ndarray:
    """-> frames (T, SIZE, SIZE, 3) uint8."""
    colour, dark, flash = event
    ground = rng.uniform(110, 140) + 6 * rng.standard_normal((toy.SIZE, toy.SIZE, 1), dtype=np.float32)
    frames = np.broadcast_to(ground, (DURATION * FPS, toy.SIZE, toy.SIZE, 3)).astype(np.float32)
    frames[dark * FPS:(dark + DARK) * FPS] -= 90
    begin, end = round(flash * FPS), round((flash + FLASH) * FPS)
    frames[begin:end] = 0.3 * frames[begin:end] + 0.7 * np.array(toy.COLOURS[colour])
    return frames.clip(0, 255).astype(np.uint8)


def shown_times(windows: list, density: float) -> np.ndarray:
    """Seconds (SHOWN,) of the frames that `read_video` chooses."""
    begins = np.arange(DURATION * FPS) / FPS
    return begins[denser_frames(begins, windows, SHOWN, density)]


def has_flash(times: np.ndarray, flash: float) -> bool:
    return bool(((flash <= times) & (times < flash + FLASH)).any())


def thought(event: tuple[str, int, float], times: np.ndarray) -> str:
    """What frames at these seconds show, four seconds by four seconds. Four tokens for each: as many positions as that part
    of the video spans, so that to look at what one writes about is one fixed distance (see `toy.thought`)."""
    colour, dark, flash = event
    seen = []
    for start in range(0, DURATION, BIN):
        within = times[(start <= times) & (times < start + BIN)]
        plain = "dark" if dark <= start < dark + DARK else "grey"
        seen.append(f"{start:02d} {colour if has_flash(within, flash) else plain},")
    return f"<think>{''.join(seen)}</think>"


def make_samples(rng: np.random.Generator, name: str, event: tuple[str, int, float]) -> list[dict]:
    """The question about one clip: with its window (gqa), and without (qa) at evenly spaced frames, around the darkness in each
    density, and around some other part of the clip. Where the frames do not show the flash, the label guesses A."""
    colour, dark, flash = event
    letter = "ABCD"[list(toy.COLOURS).index(colour)]
    common = {"question": "which colour flashes in the dark?", "options": list(toy.COLOURS), "answer": letter,
              "video": f"videos/{name}.mp4", "duration": float(DURATION), "spans": [[dark, dark + DARK]], "flash": flash}

    def said(windows: list, density: float) -> str:
        times = shown_times(windows, density)
        return f"{thought(event, times)}<answer>{letter if has_flash(times, flash) else 'A'}</answer>"

    even = said([], 1.0)
    samples = [{"id": f"{name}-first", "task": "gqa", **common, "target": f"{even}<glue>[({dark}, {dark + DARK})]</glue>"},
               {"id": f"{name}-one", "task": "qa", **common, "target": even}]
    begins = [float(np.clip(dark + rng.integers(-3, 4), 0, DURATION - DARK)) for _ in DENSITIES]
    places = [*zip(begins, DENSITIES), (float(rng.integers(0, DURATION - DARK + 1)), float(rng.choice(DENSITIES)))]
    for number, (start, density) in enumerate(places):
        window = [[start, start + DARK]]
        samples.append({"id": f"{name}-closer{number}", "task": "qa", **common, "dense_windows": window, "density": density,
                        "target": said(window, density)})
    return samples


def write_data(folder: Path, seed: int) -> None:
    """Clips, train.jsonl, eval.jsonl (the qa questions of the held-out clips), and a tiny random model."""
    if (folder / "initial" / "preprocessor_config.json").exists():
        return
    samples: dict[str, list[dict]] = {"train": [], "eval": []}
    if not (folder / "videos").exists():
        with write_whole(folder / "videos") as videos:
            videos.mkdir()
            for name, rng, event in clips(seed):
                toy.write_mp4(videos / f"{name}.mp4", render(rng, event), FPS)
    for name, rng, event in clips(seed):
        samples[name.split("-")[0]] += make_samples(rng, name, event)
    samples["eval"] = [sample for sample in samples["eval"] if sample["id"].endswith("-one")]
    for split, lines in samples.items():
        write(folder / f"{split}.jsonl", lines)
    toy.write_model(folder / "initial", toy.texts_of(samples["train"], ["gqa", "qa"], "think"), seed)
    config = json.loads((folder / "initial" / "config.json").read_text())
    config["vision_config"]["tokens_per_second"] = 1  # a long clip: one position a second
    (folder / "initial" / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def clips(seed: int):
    for split, (kind, number) in enumerate((("train", TRAIN), ("eval", HELD_OUT))):
        for i in range(number):
            rng = np.random.default_rng([seed, split, i])
            yield f"{kind}-{i:04d}", rng, draw_event(rng)


def write(file: Path, samples: list[dict]) -> None:
    file.write_text("".join(json.dumps(sample) + "\n" for sample in samples), encoding="utf-8")


# --- training and asking ----------------------------------------------------------------------------------------------


def run_seed(folder: Path, seed: int) -> None:
    """Train one model and ask it in every way; what is there is left alone."""
    folder.mkdir(parents=True, exist_ok=True)
    write_data(folder, seed)
    if not (folder / "run" / "summary.json").exists():
        again = ["--resume"] if (folder / "run" / "config.json").exists() else []
        train.main(["--model", str(folder / "initial"), "--train_data", str(folder / "train.jsonl"), "--out",
                    str(folder / "run"), "--seed", str(seed), *TRAINING.split(), *again])
    ask(folder, "one look", "eval.jsonl")
    for density in DENSITIES:
        ask(folder, f"two looks, {density}", "eval.jsonl", "--looks", "2", "--density", str(density))
        for kind, windows in chosen_windows(folder, density).items():
            file = folder / f"{kind}-{density}.jsonl".replace(" ", "-").replace("'", "")
            write(file, [{**sample, "dense_windows": [window], "density": density}
                         for sample, window in zip(read_jsonl(folder / "eval.jsonl"), windows)])
            ask(folder, f"{kind}, {density}", file.name)


def chosen_windows(folder: Path, density: float) -> dict[str, list]:
    """Windows that no look has chosen: another clip's, as the model saw it, and the true one."""
    seen = [line["first"]["windows"] for line in predictions(folder, f"two looks, {density}")]
    known = [windows[0] for windows in seen if windows] or [[0, DURATION]]
    others = [(windows or known)[0] for windows in seen[1:] + seen[:1]]
    return {"another clip's window": others, "the true window": [s["spans"][0] for s in read_jsonl(folder / "eval.jsonl")]}


def folder_of(folder: Path, way: str) -> Path:
    return folder / way.replace(",", "").replace(" ", "-").replace("'", "")


def predictions(folder: Path, way: str) -> list[dict]:
    return list(map(json.loads, open(folder_of(folder, way) / "predictions.jsonl")))


def ask(folder: Path, way: str, data: str, *flags: str) -> None:
    out = folder_of(folder, way)
    if not (out / "metrics.json").exists():
        evaluate.run(["--model", str(folder / "run" / "final"), "--data", str(folder / data), "--out", str(out),
                      "--batch", "32", "--num_workers", "0", *flags])


# --- the table --------------------------------------------------------------------------------------------------------

WAYS = ("one look", *(f"{way}, {density}" for density in DENSITIES
                      for way in ("two looks", "another clip's window", "the true window")))


def measure(folder: Path) -> dict:
    """{way: {accuracy, allowed}}, the overlap of the first look's windows with the darkness, and a blind answer."""
    samples, found = read_jsonl(folder / "eval.jsonl"), {}
    for way in WAYS:
        metrics = json.loads((folder_of(folder, way) / "metrics.json").read_text())
        asked = read_jsonl(Path(next(iter(metrics["data"]))))
        if "looks/fell_back" in metrics:
            windows = [line["first"]["windows"] for line in predictions(folder, way)]
            asked = [{**sample, "dense_windows": seen} for sample, seen in zip(samples, windows)]
            overlaps = [spans_iou(seen or [], sample["spans"]) for sample, seen in zip(samples, windows)]
            found["first look"] = {"mIoU of its windows": statistics.fmean(overlaps), "fell back": metrics["looks/fell_back"]}
        found[way] = {"accuracy": metrics["qa/accuracy"], "allowed": allowed(asked, density_of(way))}
    seconds = json.loads((folder / "run" / "summary.json").read_text())["seconds"]["total"]
    return found | {"blind": blind_baselines(samples)["most_frequent_letter"]["qa/accuracy"], "seconds": seconds}


def measure_frames(seed: int, number: int = 1000) -> dict:
    """{way: {allowed}} of the ways to choose frames that take no model, on `number` further clips."""
    rng = np.random.default_rng([seed, 2])
    events = [draw_event(rng) for _ in range(number)]
    samples = [{"flash": flash, "spans": [[dark, dark + DARK]]} for _, dark, flash in events]
    windows = {"the true window": [s["spans"] for s in samples], "another clip's window": [
        s["spans"] for s in samples[1:] + samples[:1]]}
    found = {"one look": {"allowed": allowed(samples, 1.0)}}
    for density in DENSITIES:
        for kind, of_clips in windows.items():
            asked = [{**sample, "dense_windows": spans} for sample, spans in zip(samples, of_clips)]
            found[f"{kind}, {density}"] = {"allowed": allowed(asked, density)}
    return found


def density_of(way: str) -> float:
    return float(way.rpartition(", ")[2]) if "," in way else 1.0


def allowed(samples: list[dict], density: float) -> float:
    """Mean over the clips of 1 where one of the frames that are shown shows the flash, else of a guess among four."""
    seen = [has_flash(shown_times(sample.get("dense_windows") or [], density), sample["flash"]) for sample in samples]
    return statistics.fmean(1.0 if hit else 1 / len(toy.COLOURS) for hit in seen)


def table(results: dict) -> list[str]:
    """Rows of Markdown: mean and standard deviation (ddof 1) over the seeds."""
    seeds = [{way: {} for way in WAYS} | seed for seed in results["seeds"].values()]
    rows = ["| what is shown, in 20 frames | accuracy | what the frames allow |", "|---|---|---|"]
    for way in WAYS:
        accuracy, allow = (cell([seed[way][name] for seed in seeds if name in seed[way]]) for name in ("accuracy", "allowed"))
        rows.append(f"| {way} | {accuracy} | {allow} |")
    return [*rows, f"| nothing: the most frequent letter | {cell([seed['blind'] for seed in seeds if 'blind' in seed])} | |"]


def cell(values: list[float]) -> str:
    if not values:
        return "not measured"
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description="One look against two, on synthetic clips.")
    parser.add_argument("--out", type=Path, default=Path("runs/looks"), help="folder of all runs (%(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--report", action="store_true", help="run nothing, only collect what is there")
    parser.add_argument("--frames", action="store_true", help="train nothing, only count what the frames allow")
    args = parser.parse_args()
    out = args.out.resolve()
    for seed in args.seeds if not (args.report or args.frames) else []:
        run_seed(out / f"seed{seed}", seed)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    found = {seed: measure_frames(seed) if args.frames else measure(out / f"seed{seed}") for seed in args.seeds}
    results = {"command": "python tests/looks.py" + " --frames" * args.frames, "commit": commit,
               "date": time.strftime("%Y-%m-%d"), "training": None if args.frames else f"train.py {TRAINING}", "seeds": found}
    (ROOT / "tests" / "results" / "looks.json").write_text(json.dumps(results, indent=1) + "\n")
    print("\n".join(table(results)))


if __name__ == "__main__":
    main()
