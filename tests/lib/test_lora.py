"""LoRA leaves the model as it is until it learns, learns nothing but its adapters, and can be folded back in."""

import json
import re
from functools import partial

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import rewards
from grpo import accumulate_gradients, grpo_loss, rollout
from lib import lora
from model import VideoLM

LOSS = partial(grpo_loss, beta=0.5, clip_low=0.2, clip_high=0.2)


def adapt(model, rank=4, alpha=8.0, targets=lora.TARGETS, seed=0, learned=0.0) -> VideoLM:
    """`learned` > 0: B is not 0 any more, as after some steps."""
    lora.add_adapters(model.hf, rank, alpha, targets, seed)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in lora.adapters(model.hf).values():
            layer.lora_B += learned * torch.randn(layer.lora_B.shape, generator=generator)
    return model


def completions(seed=0):
    return torch.randint(20, 200, (3, 5), generator=torch.Generator().manual_seed(seed))


def score(model, prompts):
    with torch.no_grad():
        embeds = [model.embed(p.ids, video) for p, video in zip(prompts, model.encode_prompts(prompts))]
        scores = model.logprobs_packed(embeds, [p.positions for p in prompts], [completions(i) for i in range(3)], 1.0)
    return torch.stack([of_question.logps for of_question in scores])


def live_groups(model, prompts) -> list:
    """Sampled from the policy; the random model's rewards are all alike, so the advantages are made up."""
    groups = rollout(model, prompts, rewards.score, group_size=4, max_new_tokens=6, temperature=1.0, seeds=[1, 2, 3])
    for group in groups:
        group.advantages = torch.tensor([1.0, -1.0, 0.5, -0.5])
    return groups


def frozen_state(model) -> dict:
    return {name: tensor.clone() for name, tensor in model.hf.state_dict().items() if "lora_" not in name}


def names_in(folder) -> dict:
    """Tensor names of a checkpoint's files, with their types."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_slice(name).get_dtype() for name in file.keys()}


# --- one layer --------------------------------------------------------------------------------------------------------


def test_a_layer_computes_the_formula():
    """y = W x + b + (alpha / r) B A x, against float64: a scale of alpha alone, or A and B in the wrong order, is the
    commonest slip."""
    linear = nn.Linear(5, 7)
    layer = lora.LoRALinear(linear, rank=3, alpha=6.0, generator=torch.Generator().manual_seed(0))
    layer.lora_B.data.normal_(generator=torch.Generator().manual_seed(1))
    x = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(2))
    W, b, A, B = (p.detach().double() for p in (linear.weight, linear.bias, layer.lora_A, layer.lora_B))
    expected = x.double() @ W.T + b + 6.0 / 3 * (x.double() @ A.T @ B.T)
    torch.testing.assert_close(layer(x).double(), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(layer.merged().double(), W + 2.0 * B @ A, atol=1e-6, rtol=0)
    assert layer.weight is linear.weight and layer.bias is linear.bias  # no second copy


def test_a_is_drawn_from_the_seed_for_every_layer_anew_and_b_is_0(model, model_folder):
    """Ranks that draw other numbers train other models; layers that share one A waste it."""
    a, b, other = (adapt(VideoLM.load(str(model_folder)), seed=seed).hf for seed in (3, 3, 4))
    drawn = [[layer.lora_A for layer in lora.adapters(hf).values()] for hf in (a, b, other)]
    assert all(torch.equal(x, y) for x, y in zip(drawn[0], drawn[1]))
    assert not any(torch.equal(x, y) for x, y in zip(drawn[0], drawn[2]))
    square = [x for x in drawn[0] if x.shape == drawn[0][0].shape]
    assert len({tuple(x.flatten().tolist()) for x in square}) == len(square) > 3
    for layer in lora.adapters(a).values():
        bound = layer.lora_A.shape[1] ** -0.5
        assert 0.9 * bound < layer.lora_A.abs().max() <= bound and not layer.lora_B.any()


# --- what is trained --------------------------------------------------------------------------------------------------


def test_fresh_adapters_change_nothing_to_the_last_bit(model, prompts):
    """Training has to start from the checkpoint, not from something near it."""
    before = score(model, prompts)
    adapt(model)
    assert torch.equal(score(model, prompts), before)


@pytest.mark.parametrize("targets", [lora.TARGETS, ("q_proj", "v_proj")])
def test_only_the_adapters_of_the_language_model_are_trained(model, prompts, targets):
    """r (I + O) numbers for each target, counted by hand; the vision tower has layers of the same names."""
    config, r = model.hf.config.text_config, 4
    D, M = config.hidden_size, config.intermediate_size
    own = D // config.num_attention_heads * config.num_key_value_heads  # keys of all heads
    sizes = {"q_proj": (D, D), "k_proj": (D, own), "v_proj": (D, own), "o_proj": (D, D), "gate_proj": (D, M),
             "up_proj": (D, M), "down_proj": (M, D)}
    adapt(model, rank=r, targets=targets, learned=0.1)
    trained = {name: p for name, p in model.hf.named_parameters() if p.requires_grad}
    expected = config.num_hidden_layers * sum(r * sum(sizes[target]) for target in targets)
    assert sum(p.numel() for p in trained.values()) == expected
    assert all("language_model.layers" in name and "lora_" in name for name in trained)
    accumulate_gradients(model, model, live_groups(model, prompts), LOSS, 12)
    for name, p in model.hf.named_parameters():
        assert (p.grad is not None and p.grad.any()) == (name in trained), name


def test_grpo_moves_the_adapters_alone_and_leaves_the_reference_behind(model, model_folder, prompts):
    """KL 0 before the first step and more behind it; the base, to the last bit, is what it was."""
    base = score(model, prompts)
    adapt(model)
    before, kl = frozen_state(model), []
    optimizer = torch.optim.SGD([p for p in model.hf.parameters() if p.requires_grad], lr=1.0)
    for _ in range(3):
        sums = accumulate_gradients(model, model, live_groups(model, prompts), LOSS, 12)
        kl.append(sums["kl_sum"] / sums["tokens"])
        optimizer.step()
        optimizer.zero_grad()
    assert kl[0] == 0 and 1e-6 < kl[1] < kl[2]
    assert all(torch.equal(before[name], tensor) for name, tensor in frozen_state(model).items())
    assert (score(model, prompts) - base).abs().max() > 1e-3
    with lora.adapters_off(model.hf):
        assert torch.equal(score(model, prompts), base)


# --- the reference ----------------------------------------------------------------------------------------------------


def gradients(model, reference, groups):
    model.hf.zero_grad()
    for group in groups:
        group.old_logps = None
    sums = accumulate_gradients(model, reference, groups, LOSS, 12)
    return sums, {name: p.grad.clone() for name, p in model.hf.named_parameters() if p.grad is not None}


def test_the_policy_without_adapters_is_as_good_as_a_second_model(model, model_folder, prompts):
    """The same loss and gradients as with a frozen copy in memory, which is what it saves."""
    groups = live_groups(adapt(model, learned=0.1), prompts)
    sums, grads = gradients(model, model, groups)
    sums_with_copy, grads_with_copy = gradients(model, VideoLM.load(str(model_folder)), groups)
    assert sums == sums_with_copy and sums["kl_sum"] > 0.01
    assert all(torch.equal(grads[name], grads_with_copy[name]) for name in grads)


def test_gradient_checkpointing_recomputes_with_the_adapters_on(model, prompts):
    """Backward runs the layers again, after the reference has been scored: with adapters off it would differentiate
    another model than was scored."""
    groups = live_groups(adapt(model, learned=0.1), prompts)
    _, plain = gradients(model, model, groups)
    model.checkpoint_activations()
    _, checked = gradients(model, model, groups)
    for name in plain:
        torch.testing.assert_close(plain[name], checked[name], atol=1e-6, rtol=1e-5)


def test_adapters_are_on_again_after_an_error(model, prompts):
    """A reference pass that fails and is caught must not leave the policy without what it has learned."""
    adapt(model, learned=0.1)
    learned = score(model, prompts)
    with pytest.raises(RuntimeError), lora.adapters_off(model.hf):
        raise RuntimeError
    assert torch.equal(score(model, prompts), learned)


# --- folding in -------------------------------------------------------------------------------------------------------


def test_a_saved_folder_is_a_plain_checkpoint_that_says_the_same(model, model_folder, prompts, tmp_path):
    """Names of the adapters' layers in the file, or a folder without the update: either would be noticed by others."""
    adapt(model, learned=0.1)
    model.save(tmp_path / "final")
    assert names_in(tmp_path / "final") == names_in(model_folder)
    torch.testing.assert_close(score(VideoLM.load(str(tmp_path / "final")), prompts), score(model, prompts),
                               atol=5e-5, rtol=0)
    assert len(lora.adapters(model.hf)) == 21  # 3 layers: saving leaves the adapters where they are
    base = score(VideoLM.load(str(model_folder)), prompts)
    assert (score(model, prompts) - base).abs().max() > 0.1
    with lora.adapters_off(model.hf):
        assert torch.equal(score(model, prompts), base)


def test_folding_makes_what_was_learned_the_reference(model, model_folder, prompts):
    """After a warm start GRPO is held to the model that came out of it, not to the one that went in."""
    with torch.no_grad():
        for layer in lora.adapters(adapt(model, learned=0.1).hf).values():
            layer.lora_A *= 1.1  # A has moved as well
    learned = score(model, prompts)
    lora.fold_adapters(model.hf, seed=0)
    with lora.adapters_off(model.hf):
        reference = score(model, prompts)
    torch.testing.assert_close(reference, learned, atol=5e-5, rtol=0)
    assert torch.equal(score(model, prompts), reference)  # fresh adapters
    fresh = lora.adapters(adapt(VideoLM.load(str(model_folder))).hf).values()
    assert all(torch.equal(a.lora_A, b.lora_A) for a, b in zip(lora.adapters(model.hf).values(), fresh))


def test_a_model_without_adapters_is_left_alone(model, prompts):
    """The functions stand in the one code path that all runs share."""
    before = frozen_state(model)
    with lora.adapters_off(model.hf):
        scored = score(model, prompts)
    lora.fold_adapters(model.hf, seed=0)
    state = lora.merged_state(model.hf)
    assert torch.equal(score(model, prompts), scored) and before.keys() == state.keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in state.items())


# --- in PEFT's layout -------------------------------------------------------------------------------------------------


def test_the_adapter_is_written_under_the_names_of_peft(model, tmp_path):
    """PEFT leaves out what it does not find, without an error: the adapter would load, and do nothing. With PEFT itself
    tests/elsewhere.py tries it."""
    adapt(model, rank=3, alpha=6.0, learned=0.1)
    lora.write_adapter(tmp_path / "adapter", lora.adapter_state(model.hf), 6.0, "some/base")
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["peft_type"] == "LORA" and settings["base_model_name_or_path"] == "some/base"
    assert (settings["r"], settings["lora_alpha"], settings["bias"]) == (3, 6, "none")
    matrices = {name for name, module in model.hf.named_modules() if isinstance(module, nn.Linear | lora.LoRALinear)}
    chosen = {name for name in matrices if re.fullmatch(settings["target_modules"], name)}
    assert chosen == lora.adapters(model.hf).keys()  # the vision tower has a gate_proj, too
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(saved) == 2 * len(chosen)
    for name, layer in lora.adapters(model.hf).items():
        A, B = (saved.pop(f"base_model.model.{name}.lora_{x}.weight") for x in "AB")
        O, I = layer.weight.shape
        assert A.shape == (3, I) and B.shape == (O, 3) and A.dtype == B.dtype == torch.float32
        torch.testing.assert_close(layer.weight + settings["lora_alpha"] / settings["r"] * (B @ A), layer.merged())


def test_what_was_taken_down_of_adapters_stays_when_they_start_again(model):
    """The warm start's adapter is written after it has been folded in: a view would hold the fresh one."""
    adapt(model, learned=0.1)
    state = lora.adapter_state(model.hf)
    lora.fold_adapters(model.hf, seed=1)
    assert all(tensor.abs().max() > 0 for tensor in state.values())


# --- bfloat16, as on a GPU --------------------------------------------------------------------------------------------


def test_a_bfloat16_base_learns_in_float32(model_folder, prompts, tmp_path):
    """The frozen weights are half as large on a GPU. What is learned stays float32, in training and in the file: an
    update of a thousandth of a weight would be lost in the rounding. Here on the CPU, with its autocast."""
    model = adapt(VideoLM.load(str(model_folder), dtype=torch.bfloat16))
    model.autocast = torch.bfloat16
    groups = live_groups(model, prompts)
    sums, grads = gradients(model, model, groups)
    assert sums["kl_sum"] == 0 and all(grad.dtype == torch.float32 for grad in grads.values())
    layer = lora.adapters(model.hf)["model.language_model.layers.0.self_attn.q_proj"]
    with torch.no_grad():
        layer.lora_B += 1e-3 * layer.weight.float().abs().mean()
    changed, visible = layer.merged() != layer.weight, layer.merged().bfloat16() != layer.weight
    assert changed.float().mean() > 0.9 and visible.float().mean() < 0.2
    model.save(tmp_path / "final")
    types = names_in(tmp_path / "final")
    adapted = {f"{name.replace('language_model.', '')}.weight" for name in lora.adapters(model.hf)}  # as in published files
    assert {name for name, kind in types.items() if kind == "F32"} == adapted
    saved = VideoLM.load(str(tmp_path / "final")).hf.state_dict()["model.language_model.layers.0.self_attn.q_proj.weight"]
    assert torch.equal(saved, layer.merged())
    expected = layer.merged().bfloat16()
    lora.fold_adapters(model.hf, seed=0)
    assert layer.weight.dtype == torch.bfloat16 and torch.equal(layer.weight, expected)
