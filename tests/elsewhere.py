"""Does a model that was saved here load with another release of transformers, and say the same there?

    pip install --target releases/4.57.6 transformers==4.57.6             with peft beside it, adapters are tried as well
    python tests/elsewhere.py write FOLDER                                here: models, and what they say
    PYTHONPATH=releases/4.57.6 python tests/elsewhere.py read FOLDER    there: loads them, compares tokens and logits

`write FOLDER --words qwen.tiktoken` takes the words of Qwen's vocabulary, where that file is at hand, not made-up ones.
`read` imports nothing of this project. `tests/test_elsewhere.py` runs both for the releases in OTHER_RELEASES.
"""

import importlib.util
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

TEXTS = ["<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>When is it red?<|im_end|>\n<|im_start|>assistant\n",
         "<think>12.5 to 17 s, e\u0301t\u00e9 \u5b57</think><answer>12.5 to 17</answer>", "  in the end,\n\n the 3rd\tword"]
TOLERANCE = 2e-5  # of the largest logit: sums of float32 in another order


def write(folder: Path, words: Path | None) -> None:
    """A `final/` of the toy in float32, one with adapters, and of two folders of the published form in bfloat16."""
    root = Path(__file__).resolve().parent.parent
    sys.path[:0] = [str(root), str(root / "tests")]
    from published_folder import write_published

    from lib import lora, toy
    from model import VideoLM

    starts = {name: folder / "start" / name for name in ("toy", "lora", "like_3b", "like_7b")}
    toy.write_model(starts["toy"], TEXTS, seed=0)
    toy.write_model(starts["lora"], TEXTS, seed=0)
    write_published(starts["like_3b"], True, words)
    write_published(starts["like_7b"], False, words)
    for name, start in starts.items():
        model, final = VideoLM.load(str(start)), folder / "final" / name
        if name == "lora":
            lora.add_adapters(model.hf, 4, 8.0, list(lora.TARGETS), seed=0)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():  # training
            for p in model.hf.parameters():
                p += 0.1 * p.requires_grad * torch.randn(p.shape, generator=generator)
        model.save(final, dtype=torch.bfloat16 if "like" in name else None)
        if name == "lora":
            lora.write_adapter(final / "adapter", lora.adapter_state(model.hf), 8.0, str(start))
        save_file(logits_of(VideoLM.load(str(final))), folder / f"{name}.safetensors")  # loaded as eval.py does it
        (folder / f"{name}.json").write_text(json.dumps([model.tokenizer(text)["input_ids"] for text in TEXTS]))


def logits_of(model) -> dict[str, torch.Tensor]:
    """What our code makes of a clip of 8 frames at 2 a second, and the inputs in the names of the library."""
    from data import Clip, prepare
    from model import PackedAttention

    frames = torch.randint(0, 256, (8, 3, 56, 84), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    sample = {"id": "a", "task": "grounding", "question": "the screen is red", "video": "a.mp4", "spans": [[1, 2]]}
    prompt = prepare(sample, Clip(frames, torch.arange(8) / 2, 2.0), model.tokenizer, "think")
    with torch.no_grad():
        embeds = model.embed(prompt.ids, model.encode_video(prompt.patches, prompt.grid))
        spans = [(embeds.shape[1], 0, 0)]
        logits = model.lm_head(model._layers(embeds, prompt.positions, PackedAttention(spans).of))
    return {"input_ids": prompt.ids[None], "pixel_values_videos": prompt.patches, "logits": logits.contiguous(),
            "video_grid_thw": torch.tensor([prompt.grid]), "position_ids": prompt.positions[:, None],
            "second_per_grid_ts": torch.tensor([1.0])}


def read(folder: Path) -> None:
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

    for file in sorted(folder.glob("*.safetensors")):
        final = folder / "final" / file.stem
        model, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(final, torch_dtype=torch.float32,
                                                                         output_loading_info=True)
        assert not any(info.values()), info  # nothing missing, nothing unexpected
        tokenizer = AutoTokenizer.from_pretrained(final)
        assert [tokenizer(text)["input_ids"] for text in TEXTS] == json.loads(file.with_suffix(".json").read_text())
        compare(f"{file.stem}, {len(tokenizer):,} tokens", model, load_file(file))
        # Up to 4.51 the language model's layers had other names, and PEFT names an adapter by them.
        if (final / "adapter").exists() and importlib.util.find_spec("peft") and hasattr(model.model, "language_model"):
            import peft

            base = json.loads((final / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
            model = Qwen2_5_VLForConditionalGeneration.from_pretrained(base, torch_dtype=torch.float32)
            compare(f"adapter, peft {peft.__version__}", peft.PeftModel.from_pretrained(model, final / "adapter"),
                    load_file(file))


def compare(name: str, model, inputs: dict[str, torch.Tensor]) -> None:
    import transformers

    expected = inputs.pop("logits")
    positions = inputs.pop("position_ids")
    if int(transformers.__version__.split(".")[0]) >= 5:  # text behind a video counts on from another number there
        inputs["position_ids"] = positions
    with torch.no_grad():
        logits = model.eval()(**inputs).logits
    apart, largest = float((logits - expected).abs().max()), float(expected.abs().max())
    print(f"transformers {transformers.__version__}, {name}: largest logit {largest:.1f}, largest difference {apart:.1e}")
    assert apart < TOLERANCE * largest, apart


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write(Path(sys.argv[2]), Path(sys.argv[4]) if sys.argv[3:4] == ["--words"] else None)
    else:
        read(Path(sys.argv[2]))
