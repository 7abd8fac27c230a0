"""Faster and the same: what replaces a part of the library, or of Python, gives its numbers."""

import copy

import pytest
import torch
from scoring import sample
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

import model as model_file
from lib import kernels
from lib.kernels import WINDOWED, WindowAttention, use_windows

# --- a decode step that is recorded -----------------------------------------------------------------------------------


class Tape(TorchDispatchMode):
    """A CUDA graph's contract, kept on the CPU: `record` writes down the operations with the memory that each reads and
    writes, and puts back what they did; `replay` does them again there, without Python, so without new values of it."""

    def __init__(self):
        super().__init__()
        self.calls = []  # of warm_up, record and replay

    def warm_up(self, step):
        self.calls.append("warm up")
        step()

    def record(self, step):
        self.calls.append("record")
        self.operations, self.before = [], {}
        with self:
            step()
        for tensor, value in reversed(self.before.values()):  # capturing computes nothing
            tensor.copy_(value)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        assert "local_scalar" not in str(operation) and "nonzero" not in str(operation), "the step waits for the device"
        tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        writes = operation._schema.is_mutable
        if writes:
            self.before.setdefault(id(args[0]), (args[0], args[0].clone()))
        out = operation(*args, **(kwargs or {}))
        made = [x for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor)]
        old = {x.untyped_storage().data_ptr() for x in tensors}
        is_view = not writes and all(x.untyped_storage().data_ptr() in old for x in made)
        if not is_view:
            self.operations.append((operation, args, kwargs or {}, [] if writes else made))
        return out

    def replay(self):
        self.calls.append("replay")
        for operation, args, kwargs, made in self.operations:
            out = operation(*args, **kwargs)
            for x, new in zip(made, torch.utils._pytree.tree_leaves(out)):
                x.copy_(new)


@pytest.mark.parametrize("temperature, eos_ids", [(1.0, range(40, 60)), (0.0, range(40, 60)), (1.0, [-1])])
def test_a_recorded_step_gives_the_tokens_of_one_that_python_runs(model, prompts, monkeypatch, temperature, eos_ids):
    """A graph repeats operations on addresses: a position, slot, mask or column kept as a Python number would be the
    recorded one for ever, and a tensor made anew in each step would never be seen."""
    model.first_width = 4  # it grows often, with no row leaving where none ever ends
    settings = {"group_size": 4, "max_new_tokens": 30, "temperature": temperature}
    model.eos_ids = list(eos_ids)
    expected = sample(model, prompts, **settings)
    tapes = []
    model.new_graph = lambda: tapes.append(Tape()) or tapes[-1]
    for (tokens, logps), (as_expected, by_python) in zip(sample(model, prompts, **settings), expected):
        assert torch.equal(tokens, as_expected)
        torch.testing.assert_close(logps, by_python, atol=1e-6, rtol=0)
    (tape,) = tapes
    shapes = tape.calls.count("warm up")  # rows left, completions grew
    assert 2 <= shapes < 20 and tape.calls.count("record") <= shapes and tape.calls.count("replay") > 10
    assert all(tape.calls[i - 1] == "warm up" for i, call in enumerate(tape.calls) if call == "record")


# --- the compiled layer -----------------------------------------------------------------------------------------------


def test_one_compiled_layer_serves_all_layers_and_gives_their_tokens(model, prompts, monkeypatch):
    """A number of the layer in what is compiled, or a weight taken for a constant, and each layer is compiled for itself:
    minutes at 36 layers, and past a limit of the library nothing is compiled at all."""
    model.eos_ids, model.first_width = [-1], 16
    expected = [sample(model, prompts[:n], group_size=4, max_new_tokens=40) for n in (2, 3)]
    torch._dynamo.reset()
    counters.clear()
    eager = kernels.compiled(model_file.decoder_layer, backend="eager")
    monkeypatch.setattr(kernels, "compiled", lambda layer: eager)
    model.compile_decoding = True
    for n, outputs in zip((2, 3), expected):
        for (tokens, logps), (as_expected, by_python) in zip(sample(model, prompts[:n], group_size=4, max_new_tokens=40),
                                                             outputs):
            assert torch.equal(tokens, as_expected) and torch.equal(logps, by_python)
        if n == 2:  # a first width of its own, and all others
            assert len(model.text.layers) > counters["stats"]["unique_graphs"] - 1 and not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] <= 6  # of another number of questions too; 3 layers, each for itself: 12
    torch._dynamo.reset()


@pytest.mark.slow
def test_what_the_compiler_makes_of_the_layer_samples_the_same_tokens(model, prompts):
    """The compiler adds up in another order, and must do no more than that."""
    model.eos_ids = [-1]
    expected = sample(model, prompts, group_size=4, max_new_tokens=12)
    model.compile_decoding = True
    for (tokens, logps), (as_expected, by_python) in zip(sample(model, prompts, group_size=4, max_new_tokens=12), expected):
        assert torch.equal(tokens, as_expected)
        torch.testing.assert_close(logps, by_python, atol=1e-4, rtol=0)


def test_weights_are_rounded_for_the_compiled_layer_and_whole_behind_it(model, prompts, monkeypatch):
    """Left rounded, the weights that are trained would have lost what makes a small learning rate count."""
    model.autocast, model.compile_decoding = torch.bfloat16, True
    before = {name: p.detach().clone() for name, p in model.hf.named_parameters()}
    types = set()

    def layer(module, hidden, rope, attend):
        types.add((module.self_attn.q_proj.weight.dtype, module.input_layernorm.weight.dtype))
        return model_file.decoder_layer(module, hidden, rope, attend)

    monkeypatch.setattr(kernels, "compiled", lambda _: layer)
    compiled = sample(model, prompts)
    assert types == {(torch.bfloat16, torch.float32)}
    assert all(p.dtype == torch.float32 and torch.equal(p, before[name]) for name, p in model.hf.named_parameters())
    model.compile_decoding = False
    for (tokens, _), (as_expected, _) in zip(compiled, sample(model, prompts)):
        assert torch.equal(tokens, as_expected)  # autocast rounds the same weights


# --- what is done in another way than the library does it -------------------------------------------------------------


def test_the_patch_embedding_is_the_librarys_convolution(model, model_folder):
    """One axis of the kernel in another order and every patch is read wrongly, with all shapes right."""
    library = Qwen2_5_VLForConditionalGeneration.from_pretrained(model_folder).model.visual.patch_embed
    patches = torch.randn(20, 1176, generator=torch.Generator().manual_seed(0))
    ours, theirs = model.visual.patch_embed(patches), library(patches)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    weight = torch.randn_like(ours)
    (ours * weight).sum().backward()
    (theirs * weight).sum().backward()
    torch.testing.assert_close(model.visual.patch_embed.proj.weight.grad, library.proj.weight.grad, atol=1e-4, rtol=1e-4)


def test_a_deep_copy_of_the_model_embeds_with_its_own_weights(model):
    """A forward that is a closure goes on using the model it was made for: a reference that moves with the policy."""
    copied = copy.deepcopy(model.hf)
    with torch.no_grad():
        for p in copied.parameters():
            p.zero_()
    patches = torch.randn(4, 1176)
    assert copied.model.visual.patch_embed(patches).abs().max() == 0 < model.visual.patch_embed(patches).abs().max()
    hidden = torch.randn(2, model.text.config.hidden_size)
    assert copied.model.language_model.norm(hidden).abs().max() == 0 < model.text.norm(hidden).abs().max()


def test_a_tower_of_an_uneven_width_gives_the_values_and_gradients_of_the_library(model_folder, prompts):
    """The published towers are 3,420 wide, which fast matrix products do not like; the columns of zeros must not be seen."""
    config = Qwen2_5_VLForConditionalGeneration.from_pretrained(model_folder).config
    config.vision_config.intermediate_size = 44
    torch.manual_seed(0)
    hf = Qwen2_5_VLForConditionalGeneration(config)
    theirs = copy.deepcopy(hf).model.visual
    model, prompt = model_file.VideoLM(hf, AutoTokenizer.from_pretrained(model_folder), ""), prompts[0]
    assert model.visual.blocks[0].mlp.forward.__func__ is kernels._padded_mlp
    found = []
    for tower, video in ((theirs, theirs(prompt.patches, grid_thw=torch.tensor([prompt.grid])).pooler_output),
                         (model.visual, model.encode_video(prompt.patches, prompt.grid))):  # (V, D)
        video.square().sum().backward()
        found.append([video.detach(), *(p.grad for p in tower.parameters())])
    for library, ours in zip(*found):
        assert (library - ours).abs().max() <= 1e-5 * library.abs().max()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_the_norms_are_the_librarys(model, model_folder, dtype, tolerance):
    """Another epsilon, or a weight that is not used, hardly shows in a tiny model and ruins a large one."""
    library = Qwen2_5_VLForConditionalGeneration.from_pretrained(model_folder).model
    hidden = 1e-3 * torch.randn(5, model.text.config.hidden_size, generator=torch.Generator().manual_seed(0)).to(dtype)
    for ours, theirs in ((model.text.norm, library.language_model.norm),
                         (model.text.layers[0].input_layernorm, library.language_model.layers[0].input_layernorm)):
        with torch.no_grad():
            for norm in (ours, theirs):
                norm.weight.copy_(torch.linspace(0.5, 2, len(norm.weight)))
        got, expected = ours(hidden), theirs(hidden)
        torch.testing.assert_close(got.float(), expected.float(), atol=tolerance, rtol=tolerance)
        assert got.dtype == dtype


# --- windows of the vision tower --------------------------------------------------------------------------------------

GRIDS = [[(2, 16, 16)], [(2, 16, 16), (1, 16, 16)], [(3, 10, 18), (1, 4, 4), (2, 18, 10), (1, 22, 6)]]


def vision_tower(implementation: str):
    """The library's, with blocks of both kinds, in float64."""
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
        Qwen2_5_VisionTransformerPretrainedModel,
        Qwen2_5_VLVisionConfig,
    )

    config = Qwen2_5_VLVisionConfig(depth=4, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=24,
                                    fullatt_block_indexes=[1, 3])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tower = Qwen2_5_VisionTransformerPretrainedModel._from_config(config, attn_implementation="eager").double()
        for p in tower.parameters():
            torch.nn.init.normal_(p, std=0.2)
    if implementation == WINDOWED:
        use_windows(tower)
    return tower


def encode(tower, grids, **attend):
    patches = torch.randn(sum(t * h * w for t, h, w in grids), 1176, generator=torch.Generator().manual_seed(1))
    out = tower(patches.double(), grid_thw=torch.tensor(grids), **attend).pooler_output  # (V, D)
    (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    return out.detach(), {name: p.grad for name, p in tower.named_parameters()}


@pytest.mark.parametrize("grids", GRIDS)
def test_windows_in_batches_are_the_windows_of_the_library(grids):
    """Values and gradients of the library's loop over segments: one video whose windows are all whole, two of one size,
    and four whose windows are cut at the right, at the bottom and at both."""
    expected, expected_grads = encode(vision_tower("eager"), grids)
    out, grads = encode(vision_tower(WINDOWED), grids, attend=WindowAttention())
    assert expected.abs().mean() > 0.1
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-6)
    for name in grads:
        torch.testing.assert_close(grads[name], expected_grads[name], atol=1e-5, rtol=1e-5)


def test_a_block_makes_one_call_for_all_segments_of_a_length(monkeypatch):
    """The library makes one call a segment, hundreds a block for a real video; a GPU waits for each to be launched."""
    calls, real = [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(kernels.F, "scaled_dot_product_attention", lambda q, *a, **k: calls.append(q) or real(q, *a, **k))
    grids, attend = [(3, 10, 18), (2, 10, 18)], WindowAttention()
    tower = vision_tower(WINDOWED)
    with torch.no_grad():
        tower(torch.randn(900, 1176).double(), grid_thw=torch.tensor(grids), attend=attend)
    # whole 8 x 8 windows; cut to 8 x 2, to 2 x 8 (as long) and to 2 x 2; and, in two blocks of four, all 10 x 18 patches
    assert [tuple(q.shape[:3]) for q in calls] == 2 * [(5, 2, 4), (15, 2, 16), (10, 2, 64), (5, 2, 180)]
    assert len(attend.known) == 2  # the lengths went to the CPU once for each kind of block
    calls.clear()
    for module in (tower, *(block.attn for block in tower.blocks)):
        module.config._attn_implementation = "sdpa"
    with torch.no_grad():
        tower(torch.randn(900, 1176).double(), grid_thw=torch.tensor(grids))
    assert len(calls) == 2 * (30 + 5)


def test_the_policy_encodes_its_videos_that_way(model, prompts, monkeypatch):
    """An attention function that is registered and not used would pass every other test."""
    plans, real = [], WindowAttention._plan
    monkeypatch.setattr(WindowAttention, "_plan", lambda self, bounds: plans.append(bounds) or real(self, bounds))
    with torch.no_grad():
        model.encode_prompts(prompts)
    assert len(plans) == 1  # one pass for both videos, through the one block


def test_the_configuration_still_builds_models(model):
    """The library refuses a name with "flash" in it where flash attention is not installed: a benchmark or a count that
    builds a second model from the config of the first must not meet it."""
    assert model.visual.config._attn_implementation == model.visual.blocks[0].attn.config._attn_implementation == WINDOWED
    again = Qwen2_5_VLForConditionalGeneration(model.hf.config)
    assert again.state_dict().keys() == model.hf.state_dict().keys()
