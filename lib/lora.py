"""LoRA: a frozen model, and a thin trained layer beside each of its large ones (arXiv 2106.09685).

    y = W x + b + (alpha / r) B A x        W (O, I) and b (O,) frozen; A (r, I) and B (O, r) trained, r small

B starts at 0, so the model starts as it was, to the last bit. What that buys when memory is short:

    gradients and AdamW's moments    for A and B alone: with r = 16 40 million numbers in a 7B model, not 8.3 billion
    the frozen weights               may be bfloat16: they never take a step that rounding could swallow
    the reference of GRPO            is the policy with its adapters off (`adapters_off`), so it is not loaded at all
    checkpoints                      hold A, B and their moments

The adapted matrices are those of the language model; the vision tower stays frozen. The frozen matrices keep their
names in the state dict, so that `merged_state` (W + (alpha / r) B A) is a plain Hugging Face checkpoint.

Left out on purpose: dropout, a scale for each layer, adapters on embeddings and output layer, four-bit weights.

Shapes: I and O numbers into and out of a layer, r rank.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # of a decoder layer: all

# --- one layer --------------------------------------------------------------------------------------------------------


class LoRALinear(nn.Module):
    """Takes the place of `linear` and holds its very weight and bias, frozen, beside A and B in float32."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, generator: torch.Generator):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.lora_A = nn.Parameter(linear.weight.new_empty(rank, linear.in_features, dtype=torch.float32))
        self.lora_B = nn.Parameter(linear.weight.new_empty(linear.out_features, rank, dtype=torch.float32))
        self.scale, self.on = alpha / rank, True
        self.restart(generator)

    @torch.no_grad()
    def restart(self, generator: torch.Generator) -> None:
        """A drawn anew, B = 0. On the CPU, whatever the device: every rank must draw the same numbers."""
        r, I = self.lora_A.shape
        self.lora_A.copy_((2 * torch.rand(r, I, generator=generator) - 1) / I**0.5)  # as nn.Linear draws its weights
        self.lora_B.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """x (..., I) -> (..., O)."""
        y = F.linear(x, self.weight, self.bias)
        return y + self.scale * F.linear(F.linear(x, self.lora_A), self.lora_B) if self.on else y

    def merged(self) -> Tensor:
        """W + (alpha / r) B A (O, I) in float32: bfloat16 would round a change below 1/512 of a weight to none."""
        return self.weight.detach().float() + self.scale * (self.lora_B.detach() @ self.lora_A.detach())


# --- a whole model ----------------------------------------------------------------------------------------------------


def add_adapters(hf, rank: int, alpha: float, targets: list[str], seed: int) -> None:
    """Freeze a Qwen2.5-VL or Qwen3-VL and put an adapter beside every matrix of its decoder layers whose name is in `targets`."""
    hf.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parent in list(hf.model.language_model.layers.modules()):
        for name, child in list(parent.named_children()):
            if name in targets and isinstance(child, nn.Linear):
                setattr(parent, name, LoRALinear(child, rank, alpha, generator))


def adapters(hf) -> dict[str, LoRALinear]:
    """By their names in `hf`; empty for a model without."""
    return {name: module for name, module in hf.named_modules() if isinstance(module, LoRALinear)}


@contextmanager
def adapters_off(hf) -> Iterator[None]:
    """Inside, `hf` is the frozen model. It has to be left before `backward`: gradient checkpointing runs layers again.

    No change for a model without adapters."""
    layers = adapters(hf).values()
    for layer in layers:
        layer.on = False
    try:
        yield
    finally:
        for layer in layers:
            layer.on = True


def merged_state(hf) -> dict[str, Tensor]:
    """The state dict of the model with its adapters folded in, under the names of one that never had any.

    `hf` stays as it is. Merged matrices are float32 on the CPU: beside a model that just fits its card, a second one
    does not. Without adapters: the state dict itself.
    """
    state = hf.state_dict()
    for name, layer in adapters(hf).items():
        del state[f"{name}.lora_A"], state[f"{name}.lora_B"]
        state[f"{name}.weight"] = layer.merged().cpu()
    return state


@torch.no_grad()
def fold_adapters(hf, seed: int) -> None:
    """Make what was learned part of the frozen weights (rounded to their type) and start again with fresh adapters:
    after the warm start this model, and not the one before, is what GRPO is held to. `seed` as in `add_adapters`."""
    generator = torch.Generator().manual_seed(seed)
    for layer in adapters(hf).values():
        layer.weight.copy_(layer.merged())
        layer.restart(generator)


# --- in PEFT's layout -------------------------------------------------------------------------------------------------


def adapter_state(hf) -> dict[str, Tensor]:
    """A (r, I) and B (O, r) of every adapter, float32 on the CPU, under the names that PEFT gives them. A copy."""
    return {f"base_model.model.{name}.{part}.weight": getattr(layer, part).detach().clone().cpu()
            for name, layer in adapters(hf).items() for part in ("lora_A", "lora_B")}


def write_adapter(folder: Path, state: dict[str, Tensor], alpha: float, base: str) -> None:
    """What `peft.PeftModel.from_pretrained(model, folder)` loads, `model` being the checkpoint `base`."""
    rank = next(len(tensor) for name, tensor in state.items() if "lora_A" in name)
    targets = "|".join(TARGETS)
    folder.mkdir(parents=True)
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": rank,
                "lora_alpha": int(alpha) if alpha == int(alpha) else alpha, "lora_dropout": 0.0, "bias": "none",
                "inference_mode": True,
                # An expression and not the names alone: three of them are names of the vision tower's matrices, too.
                "target_modules": rf".*language_model\.layers\.\d+\.(self_attn|mlp)\.({targets})"}
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n")
