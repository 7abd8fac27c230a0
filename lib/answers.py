"""Answers on the disk: written down as they are given, and never mixed with answers given under other settings.

A run that is killed goes on where it was, with another number of processes too: what is sampled depends on the question
alone. `claim` refuses a folder whose answers were given otherwise, by the `fingerprint` of all that an answer depends on.
How a model was asked in training is written beside its weights (`write_asked`), so that evaluation asks it in the same way.
"""

import hashlib
import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from transformers.utils import cached_file

from data import VideoSettings
from lib.distributed import World
from lib.files import write_whole
from lib.hf_folder import is_hub_id

# ---- how a model is asked -------------------------------------------------------------------------------------------

ASKED = "asked.json"  # in a model's folder
PUBLISHED = {"prompt": "think", "timestamps": False, "fps": 2.0, "max_frames": 768, "total_pixels": 3584 * 784, "min_pixels": 16 * 784,
             "image_pixels": 0, "max_new_tokens": 1024, "max_prompt_tokens": 16384}  # VideoChat-R1's, where a folder does not say


@dataclass(frozen=True)
class SamplingSettings:
    """How questions are put to a model, and how it answers."""
    style: str  # of the prompt
    max_new_tokens: int
    max_prompt_tokens: int | None = None
    num_samples: int = 1  # completions of each question
    temperature: float = 0.0  # 0 is greedy
    mix: str = "sum"  # of the reward's parts
    seed: int = 0
    batch: int = 32  # questions answered together, on each rank
    timestamps: bool = False  # times as text, where the model does not always have them


def read_asked(model: str) -> dict:
    """How the model, a folder or a hub id, was asked in training: at another resolution, or with another prompt, it is another
    model."""
    file: Path | str | None = Path(model) / ASKED
    if is_hub_id(model):
        with suppress(OSError):  # one that may not be read: loading it says so
            file = cached_file(model, ASKED, _raise_exceptions_for_missing_entries=False,
                               _raise_exceptions_for_connection_errors=False)
    return PUBLISHED | (json.loads(Path(file).read_text()) if file and Path(file).exists() else {})


def write_asked(folder: Path, settings: dict) -> None:
    """Beside the weights, what `read_asked` finds there later."""
    (folder / ASKED).write_text(json.dumps({name: settings[name] for name in PUBLISHED}, indent=1) + "\n")


# ---- answers that survive a kill ------------------------------------------------------------------------------------

SETTINGS = "settings.json"  # in a folder of answers: what decides them


def append_lines(file: Path, lines: list[dict]) -> None:
    """The line break comes first: what a kill has torn before stays a line of its own, which does not parse."""
    with open(file, "a", encoding="utf-8") as out:
        out.writelines("\n" + json.dumps(line) for line in lines)


def read_partial(world: World, folder: Path, samples: list[dict]) -> dict[str, dict]:
    """The answers that all ranks of earlier runs have written down, by id; the same on every rank.

    Rank 0 reads for all: a rank that looked a moment later would find more answers, and share out differently.
    """
    found: dict[str, dict] = {}
    if world.is_first:
        wanted = {sample["id"] for sample in samples}
        for file in sorted(folder.glob("rank*.jsonl")):
            for line in file.read_bytes().split(b"\n"):
                try:
                    prediction = json.loads(line)
                except ValueError:  # blank, or torn: no beginning of an object is an object
                    continue
                # A file that could not be read then may be there now.
                if prediction["id"] in wanted and set(prediction["reasons"]) != {"unreadable_video"}:
                    found[prediction["id"]] = prediction
    found = {prediction["id"]: prediction for prediction in world.all_gather(list(found.values()))}
    folder.mkdir(parents=True, exist_ok=True)
    return found


def write_lines(file: Path, lines: list[dict]) -> None:
    """All lines or no file."""
    with write_whole(file) as partial:
        partial.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


# ---- answers of one kind ---------------------------------------------------------------------------------------------


def fingerprint(model: str, judge: str, sampling: SamplingSettings, settings: VideoSettings, samples: list[dict]) -> dict:
    """All that an answer depends on, by the names of the flags. Neither the batch nor the number of processes is
    among it. `model` and `judge` are names."""
    digest = hashlib.sha256(json.dumps(samples, sort_keys=True).encode()).hexdigest()
    model = str(Path(model)) if Path(model).exists() else model  # "final" and "final/" are one model
    return {"model": model, "weights": weights_of(model), "prompt": sampling.style,
            "timestamps": sampling.timestamps, "reward": sampling.mix, "judge": judge,
            "num_samples": sampling.num_samples, "temperature": sampling.temperature, "seed": sampling.seed,
            "max_new_tokens": sampling.max_new_tokens, "max_prompt_tokens": sampling.max_prompt_tokens,
            "fps": settings.target_fps, "max_frames": settings.max_frames, "total_pixels": settings.total_pixels,
            "min_pixels": settings.min_pixels, "factor": settings.factor,
            **({"picture_pixels": list(settings.picture_pixels)} if any("image" in sample for sample in samples) else {}),
            "samples": f"{len(samples)} with sha256 {digest}"}


def weights_of(model: str) -> str:
    """What a model folder's weights are: another training may have come to the same name. "" on the hub.

    The sha256 of sizes and of 16 pieces of each file, evenly spaced: training changes nearly all numbers, and to read 15 GB
    would take a minute. Not the time of writing: the same weights saved or copied again are the same weights."""
    digest, files = hashlib.sha256(), sorted(Path(model).glob("*.safetensors"))
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with open(file, "rb") as data:
            for k in range(16):
                data.seek(max(size - PIECE, 0) * k // 15)
                digest.update(data.read(PIECE))
    return digest.hexdigest()[:16] if files else ""


PIECE = 2**20  # bytes


def claim(world: World, folder: Path, settings: dict) -> None:
    """Make `folder` one of answers given under `settings`. ValueError where it is one of others."""
    file = folder / SETTINGS
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
    world.sync()  # nobody writes before everybody has looked
    for name in {**settings, **known} if known is not None else ():
        if known.get(name) != settings.get(name):
            raise ValueError(f"{folder} holds answers with {name} {known.get(name)!r}, not {settings.get(name)!r}: go back to "
                             "that, name another folder, or delete what is in this one (eval.py does it with --overwrite)")
    if known is None and world.is_first:
        with write_whole(file) as partial:
            partial.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    world.sync()
