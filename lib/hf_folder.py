"""A Hugging Face folder: one that is not whole is refused, and one that is written loads wherever its start did.

    read     `check_folder` looks at the files, `load_whole` at the weights: a checkpoint whose names or shapes are not the
             model's would otherwise be filled up with random numbers, and trained on.
    write    training changes weights and nothing else. So config, tokenizer, template and preprocessor are passed on, byte
             for byte (`own_files`): a newer library would write its own form of them, which older ones misread or refuse.

Left out on purpose: formats other than safetensors.
"""

import json
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import cached_file, logging
from transformers.utils.hub import extract_commit_hash

from lib.geometry import GEOMETRIES, Geometry, geometry_of

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json",
                   "added_tokens.json")
# What a checkpoint folder holds beside its weights.
OWN_FILES = ("config.json", "generation_config.json", *TOKENIZER_FILES, "preprocessor_config.json",
             "video_preprocessor_config.json", "processor_config.json", "chat_template.json", "chat_template.jinja")
INDEX = "model.safetensors.index.json"

# --- read -------------------------------------------------------------------------------------------------------------


def is_hub_id(name: str) -> bool:
    """OWNER/NAME, and no path into a run, or a folder of runs, whose last part is missing."""
    parts = Path(name).parts
    if Path(name).exists() or len(parts) != 2:
        return False
    return not (Path(parts[0], "lock").exists() or any(Path(parts[0]).glob("*/lock")))


def check_folder(folder: Path) -> None:
    """ValueError, with file and remedy, for a folder that lacks files or holds broken ones. Weights are not read, only
    where they begin and end. A hub id is no folder and passes: the hub's client checks what it downloads."""
    if not folder.exists():
        if not is_hub_id(str(folder)):
            raise ValueError(f"{folder}: no such folder; --model takes a Hugging Face checkpoint folder (of a run that has ended: "
                             "its final/) or a hub id")
        return
    if (folder / "config.json").exists() and (folder / "lock").exists():
        raise ValueError(f"{folder} is the folder of a run: --model takes the model in it, {folder / 'final'}")
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder}: no config.json in it; --model takes a Hugging Face checkpoint folder or a hub id")
    for name in (*OWN_FILES, INDEX):
        if name.endswith(".json") and (folder / name).exists():
            check_json(folder / name)
    check_type(folder, json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type"))
    if not (folder / "tokenizer_config.json").exists() or not (
            (folder / "tokenizer.json").exists() or all((folder / name).exists() for name in ("vocab.json", "merges.txt"))):
        raise ValueError(f"{folder}: no tokenizer in it (tokenizer_config.json, and tokenizer.json or vocab.json with "
                         "merges.txt): copy these files from the checkpoint that the model was made from")
    parts = set(json.loads((folder / INDEX).read_text())["weight_map"].values()) if (folder / INDEX).exists() else set()
    if lost := sorted(name for name in parts if not (folder / name).exists()):
        raise ValueError(f"{folder / lost[0]} is not there, and {INDEX} names it: copy or download it again")
    if not [*folder.glob("*.safetensors"), *folder.glob("*.bin")]:
        raise ValueError(f"{folder}: no weights in it (model.safetensors, or parts of it): copy or download them again")
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "pt"):
                pass
        except SafetensorError as error:
            raise ValueError(f"{file} is cut off or broken, with {file.stat().st_size:,} bytes ({error}): copy or download "
                             "it again") from error


def check_type(name: str | Path, model_type: str | None) -> None:
    if model_type not in GEOMETRIES:
        raise ValueError(f"{name} is a {model_type!r} model; this code is for {' and '.join(map(repr, GEOMETRIES))} alone, "
                         "whose patches and positions it writes by hand")


def check_json(file: Path) -> None:
    try:
        json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON ({error}): copy or download it again") from error


def load_whole(cls: type, name: str, dtype: torch.dtype):
    """`cls.from_pretrained`, and a ValueError where the checkpoint does not give every weight its values."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # its table of weights, a line each: the sentence below says it
    try:
        hf, info = cls.from_pretrained(name, dtype=dtype, attn_implementation="sdpa", output_loading_info=True,
                                       ignore_mismatched_sizes=True)  # or it raises without a name
    finally:
        logging.set_verbosity(level)
    if info["mismatched_keys"]:
        key, there, here = min(info["mismatched_keys"], key=lambda mismatch: mismatch[0])
        raise ValueError(f"{name}: {key} is {tuple(there)} in its weights and {tuple(here)} by its config.json, and so are "
                         f"{len(info['mismatched_keys']) - 1} more: put the config.json there that belongs to the weights")
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"{name}: its weights lack {len(missing)} of this model's, first {', '.join(missing[:3])}, which "
                         "would be random numbers: --model takes a whole checkpoint (merge an adapter first)")
    return hf


# --- write ------------------------------------------------------------------------------------------------------------


def geometry_in(source: str) -> Geometry:
    """What a folder or hub id says of its `Geometry`, before its weights are read."""
    files = own_files(source)
    if "config.json" not in files:
        return Geometry()  # nothing there: loading it says so
    config = json.loads(files["config.json"])
    check_type(source, config.get("model_type"))
    return geometry_of(config, json.loads(files.get("preprocessor_config.json", "{}")))


def own_files(source: str) -> dict[str, bytes]:
    """Content of the files beside the weights of a folder or hub id, by name, of those that it has."""
    find = partial(cached_file, source, _raise_exceptions_for_missing_entries=False,
                   _raise_exceptions_for_connection_errors=False)
    commit = extract_commit_hash(find("config.json"), None)  # of a hub id: what is known of it is not asked for again
    found = {name: find(name, _commit_hash=commit) for name in OWN_FILES}
    return {name: Path(path).read_bytes() for name, path in found.items() if path is not None}


def rounded(weights: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """In `dtype`, on the CPU, one by one: no card needs room for a second model. Tied weights stay one tensor."""
    copies: dict[tuple, Tensor] = {}
    for w in weights.values():
        if (w.data_ptr(), w.shape) not in copies:
            copies[w.data_ptr(), w.shape] = w.to("cpu", dtype)
    return {name: copies[w.data_ptr(), w.shape] for name, w in weights.items()}


def with_type_of(weights: dict[str, Tensor], config: bytes) -> bytes:
    """config.json with the type of the weights, the widest if there are several: `from_pretrained` rounds to the type that
    it finds there. The very same bytes where it is that already."""
    known = json.loads(config)
    kinds = {w.dtype for w in weights.values()}
    kind = str(torch.float32 if torch.float32 in kinds else min(kinds, key=str)).removeprefix("torch.")

    def changed_in(part: dict) -> dict:
        return part | {key: kind for key in ("torch_dtype", "dtype") if key in part}

    # Qwen3-VL's stands in the part of the language model
    changed = changed_in(known | {name: changed_in(part) for name, part in known.items() if isinstance(part, dict)})
    return config if changed == known else (json.dumps(changed, indent=2) + "\n").encode()
