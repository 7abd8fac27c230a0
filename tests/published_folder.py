"""A checkpoint folder in the form of the published Qwen2.5-VL ones: their files, keys, sizes of vocabulary and token ids,
with a model that is small in everything else, and words that are made up (or those of a .tiktoken file)."""

import base64
import json
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from lib import toy

SPECIAL = ("<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> "
           "<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|> "
           "<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|>").split()
FIRST_SPECIAL = 151643


def config_of(tied: bool) -> dict:
    """The keys of the 3B folder (tied) or the 7B one, in their order; small numbers where no other part depends on them."""
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"], "attention_dropout": 0.0, "bos_token_id": 151643,
        "eos_token_id": 151645, "vision_start_token_id": 151652, "vision_end_token_id": 151653, "vision_token_id": 151654,
        "image_token_id": 151655, "video_token_id": 151656, "hidden_act": "silu", "hidden_size": 32,
        "initializer_range": 0.2, "intermediate_size": 64, "max_position_embeddings": 128000, "max_window_layers": 70,
        "model_type": "qwen2_5_vl", "num_attention_heads": 2, "num_hidden_layers": 2, "num_key_value_heads": 1,
        "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16", "transformers_version": "4.41.2", "use_cache": True, "use_sliding_window": False,
        "vision_config": {"depth": 2, "hidden_act": "silu", "hidden_size": 32, "intermediate_size": 48, "num_heads": 2,
                          "in_chans": 3, "out_hidden_size": 32, "patch_size": 14, "spatial_merge_size": 2,
                          "spatial_patch_size": 14, "window_size": 112, "fullatt_block_indexes": [1],
                          "tokens_per_second": 2, "temporal_patch_size": 2, "initializer_range": 0.2},
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}, "vocab_size": 151936 if tied else 152064,
    }


def write_published(folder: Path, tied: bool = True, words: Path | None = None) -> Path:
    """`words`: a .tiktoken file with the words of Qwen's vocabulary; without it they are bytes and made-up ones."""
    folder.mkdir(parents=True, exist_ok=True)
    config = Qwen2_5_VLConfig.from_dict(config_of(tied))
    torch.manual_seed(0)
    Qwen2_5_VLForConditionalGeneration(config).bfloat16().save_pretrained(folder)
    write_tokenizer(folder, *(read_words(words) if words else make_words()))
    added = {str(FIRST_SPECIAL + i): {"content": token, "lstrip": False, "normalized": False, "rstrip": False,
                                      "single_word": False, "special": "tool_call" not in token}
             for i, token in enumerate(SPECIAL)}
    settings = {"add_bos_token": False, "add_prefix_space": False, "added_tokens_decoder": added,
                "additional_special_tokens": SPECIAL[1:14], "bos_token": None, "chat_template": toy.CHAT_TEMPLATE,
                "clean_up_tokenization_spaces": False, "eos_token": "<|im_end|>", "errors": "replace",
                "model_max_length": 131072, "pad_token": "<|endoftext|>", "split_special_tokens": False,
                "tokenizer_class": "Qwen2Tokenizer", "unk_token": None}
    generation = {"bos_token_id": 151643, "pad_token_id": 151643, "do_sample": True, "eos_token_id": [151645, 151643],
                  "repetition_penalty": 1.05, "temperature": 0.000001, "transformers_version": "4.49.0"}
    for name, content in (("config", config_of(tied)), ("tokenizer_config", settings), ("generation_config", generation),
                          ("preprocessor_config", toy.PREPROCESSOR),
                          ("chat_template", {"chat_template": toy.CHAT_TEMPLATE})):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=4))  # as no library here would write it
    return folder


def write_tokenizer(folder: Path, vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> None:
    """tokenizer.json, vocab.json, merges.txt."""
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(toy.QWEN_SPLIT), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(token, special="tool_call" not in token, normalized=False) for token in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.model.save(str(folder))


def make_words() -> tuple[dict[str, int], list[tuple[str, str]]]:
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "the", "in", "Ġthe"]
    words += [f"Ġword{i}" for i in range(FIRST_SPECIAL - len(words))]
    return {word: i for i, word in enumerate(words)}, [("t", "h"), ("th", "e"), ("i", "n"), ("Ġ", "the")]


def read_words(file: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges from the ranks of byte strings: a word is merged from what lower ranks make of its bytes."""
    ranks = {base64.b64decode(word): int(rank) for word, rank in map(str.split, open(file))}
    in_letters = dict(zip(bytes_in_order(), letters()))
    spell = {word: "".join(in_letters[byte] for byte in word) for word in ranks}
    merges = [tuple(spell[part] for part in split_below(word, rank, ranks)) for word, rank in ranks.items() if len(word) > 1]
    return {spell[word]: rank for word, rank in ranks.items()}, merges


def bytes_in_order() -> list[int]:
    """Bytes in the order in which GPT-2 gives them letters: the printable ones keep their own."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return printable + [byte for byte in range(256) if byte not in printable]


def letters() -> list[str]:
    printable = bytes_in_order()[: 94 + 12 + 82]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def split_below(word: bytes, rank: int, ranks: dict[bytes, int]) -> list[bytes]:
    parts = [bytes([byte]) for byte in word]
    while len(parts) > 2:
        best = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], rank))
        parts[best: best + 2] = [parts[best] + parts[best + 1]]
    return parts
