"""What is saved loads elsewhere as its start did, and a folder that is not whole is refused in one line.

tests/elsewhere.py tries it with other releases of the library; here is what that rests on: the same files, the same keys.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from published_folder import write_published
from safetensors.torch import load_file, save_file

import train
from lib import hf_folder
from model import VideoLM

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return write_published(tmp_path_factory.mktemp("published"))


@pytest.fixture
def broken(model_folder, tmp_path):
    """A copy of a checkpoint, to be damaged."""
    return shutil.copytree(model_folder, tmp_path / "broken")


# --- write ------------------------------------------------------------------------------------------------------------


def test_config_and_tokenizer_are_passed_on_byte_for_byte(published, tmp_path):
    """Written anew by the library they have its newest form, in which transformers 4.57 finds no rope settings and 4.51 no
    tokenizer class; and the tokenizer would lose vocab.json and merges.txt."""
    before = {file.name: file.read_bytes() for file in published.iterdir()}
    VideoLM.load(str(published)).save(tmp_path / "final", dtype=torch.bfloat16)
    after = {file.name: file.read_bytes() for file in (tmp_path / "final").iterdir()}
    assert before.keys() == after.keys() >= {"config.json", "vocab.json", "merges.txt", "tokenizer.json"}
    assert all(before[name] == after[name] for name in before if name != WEIGHTS)
    ours, theirs = (load_file(folder / WEIGHTS) for folder in (tmp_path / "final", published))
    assert ours.keys() == theirs.keys() and "lm_head.weight" not in ours  # the tied head is written once
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)  # bfloat16 through float32 and back


def test_only_the_type_changes_in_config_where_the_type_of_the_weights_does(published, tmp_path):
    """`from_pretrained` of newer releases rounds to the type that config.json names: float32 would be saved for nothing."""
    model = VideoLM.load(str(published))
    model.save(tmp_path)
    config, start = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path, published))
    assert config.pop("torch_dtype") == "float32" and start.pop("torch_dtype") == "bfloat16" and config == start
    assert {w.dtype for w in load_file(tmp_path / WEIGHTS).values()} == {torch.float32}
    adapted = {"a": torch.zeros(1, dtype=torch.bfloat16), "b": torch.zeros(1)}  # as with LoRA on a GPU
    assert hf_folder.with_type_of(adapted, b'{"torch_dtype":"float32"}') == b'{"torch_dtype":"float32"}'
    assert hf_folder.with_type_of(adapted, b'{"a": 1}') == b'{"a": 1}'


def test_the_toy_has_the_published_form(model_folder, published):
    """It starts from no checkpoint, so nobody else has written a form that older releases read."""
    toy, real = (json.loads((folder / "config.json").read_text()) for folder in (model_folder, published))
    assert real.keys() - toy.keys() == {"transformers_version", "vision_token_id"} and not toy.keys() - real.keys()
    assert all(toy[part].keys() == real[part].keys() for part in ("vision_config", "rope_scaling"))
    tokenizer = json.loads((model_folder / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "Qwen2Tokenizer" and "image_pad" in tokenizer["chat_template"]
    assert all((model_folder / name).stat().st_size > 9 for name in ("tokenizer.json", "vocab.json", "merges.txt"))


def test_a_model_can_be_saved_where_it_lies_and_when_its_start_is_gone(broken, model_folder, tmp_path):
    """Read at the end of a run, its files are the library's own form by then, or another model's, or no longer there."""
    model = VideoLM.load(str(broken))
    model.save(broken)
    shutil.rmtree(broken)
    model.save(tmp_path / "final")
    for name in {WEIGHTS, *hf_folder.OWN_FILES} & {file.name for file in model_folder.iterdir()}:
        assert (tmp_path / "final" / name).read_bytes() == (model_folder / name).read_bytes(), name
    VideoLM(model.hf, model.tokenizer, "").save(tmp_path / "new")  # from nowhere
    assert VideoLM.load(str(tmp_path / "new")).tokenizer("3 to 7 s") == model.tokenizer("3 to 7 s")


def test_rounding_keeps_what_is_tied_tied():
    """Two tensors in place of one would be a file with a head of its own, 0.6 GB more for 3B."""
    weight = torch.randn(3, 4)
    saved = hf_folder.rounded({"a": weight, "b": weight, "c": torch.ones(2)}, torch.bfloat16)
    assert saved["a"] is saved["b"] and saved["c"].dtype == torch.bfloat16 and weight.dtype == torch.float32


# --- read -------------------------------------------------------------------------------------------------------------


def rename(folder):
    save_file({f"thinker.{name}": w for name, w in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS, {"format": "pt"})


def lose_a_weight(folder):
    save_file({name: w for name, w in load_file(folder / WEIGHTS).items() if name != "model.norm.weight"}, folder / WEIGHTS)


def cut(folder):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:5000])


def change_width(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 64}))


def lose_the_tokenizer(folder):
    for name in hf_folder.TOKENIZER_FILES:
        (folder / name).unlink(missing_ok=True)


def lose_a_part(folder):
    (folder / hf_folder.INDEX).write_text('{"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}')


@pytest.mark.parametrize("damage, message", [
    (rename, r"lack \d\d of this model's, first lm_head.weight, model.language_model.embed_tokens.weight, "),
    (lose_a_weight, r"lack 1 of this model's, first model.language_model.norm.weight, "),
    (cut, r"broken.model.safetensors is cut off .* 5,000 bytes .*download it again"),
    (lambda folder: (folder / WEIGHTS).write_bytes(b""), r"broken.model.safetensors is cut off .* 0 bytes"),
    (lambda folder: (folder / WEIGHTS).unlink(), r"no weights in it"),
    (lose_a_part, r"broken.model-2.safetensors is not there"),
    (change_width, r"\(\d+, 96\) in its weights and \(\d+, 64\) by its config.json"),
    (lose_the_tokenizer, r"no tokenizer in it .*copy these files"),
    (lambda folder: (folder / "tokenizer.json").write_text(""), r"broken.tokenizer.json is not valid JSON"),
    (lambda folder: (folder / "config.json").write_text('{"model_type'), r"broken.config.json is not valid JSON"),
])
def test_a_folder_that_is_not_whole_is_refused(broken, damage, message, caplog):
    """The library fills up what is missing with random numbers, and a run of days is trained on them, exit status 0."""
    damage(broken)
    with pytest.raises(ValueError) as refusal:
        VideoLM.load(str(broken))
    text = str(refusal.value)
    assert re.search(message, text) and str(broken) in text and "\n" not in text and not caplog.records


def test_a_broken_folder_does_not_cost_an_old_run(broken, tmp_path, monkeypatch):
    """--overwrite deletes; a model that cannot be loaded has to be noticed before."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    (tmp_path / "x.jsonl").touch()
    cut(broken)
    with pytest.raises(ValueError, match="cut off"):
        train.main(["--model", "broken", "--train_data", "x.jsonl", "--out", "run", "--overwrite", "--device", "cpu"])
    assert (tmp_path / "run" / "config.json").read_text() == "{}"


def test_a_name_that_is_no_folder_is_left_to_the_hub():
    hf_folder.check_folder(Path("Qwen/Qwen2.5-VL-3B-Instruct"))


@pytest.mark.parametrize("name", ["final", "runs/final", "runs/own/final", "/runs/own"])
def test_a_path_that_leads_nowhere_is_not_asked_for_on_the_hub(tmp_path, monkeypatch, name):
    """The hub's client tried for minutes, and then spoke of a repository. But a folder with an owner's name is no reason."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "other").mkdir(parents=True)
    (tmp_path / "runs" / "other" / "lock").touch()
    (tmp_path / "Qwen").mkdir()
    hf_folder.check_folder(Path("Qwen/Qwen2.5-VL-3B-Instruct"))
    with pytest.raises(ValueError, match=f"{name}: no such folder"):
        hf_folder.check_folder(Path(name))


def test_the_folder_of_a_run_is_told_from_the_model_in_it(tmp_path):
    for file in ("config.json", "lock"):
        (tmp_path / file).write_text("{}")
    with pytest.raises(ValueError, match="takes the model in it, .*final"):
        hf_folder.check_folder(tmp_path)
