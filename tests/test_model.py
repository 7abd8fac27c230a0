"""The policy gives the numbers of the unmodified library, whatever is shared, packed, cached or dropped on the way."""

import filecmp
import json

import gpu_check
import pytest
import torch
from conftest import make_prompts
from scoring import completions, embeds_of, logps_packed, positions_of, sample
from transformers import (AutoModelForImageTextToText, AutoTokenizer, Qwen2_5_VLForConditionalGeneration,
                          Qwen3VLForConditionalGeneration)

import model as model_file
from data import Clip, prepare
from lib import lora
from lib.geometry import QWEN3
from model import VideoLM, causal_attention, sample_tokens


def library_distribution(folder, prompt, row, temperature=1.0):
    """By the unmodified library: log p over the vocabulary for each token of `row` and for the one behind it."""
    hf = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, attn_implementation="eager")
    config = hf.config
    video = None
    if prompt.patches is not None:
        video = hf.model.visual(prompt.patches, grid_thw=torch.tensor([prompt.grid])).pooler_output
    ids = torch.cat([prompt.ids, row])
    embeds = hf.model.language_model.embed_tokens(ids)
    if video is not None:
        embeds = embeds.masked_scatter((ids == config.video_token_id)[:, None], video)
    own = prompt.positions.max() + 1 + torch.arange(len(row))
    positions = torch.cat([prompt.positions, own.expand(3, -1)], dim=1)[:, None]
    states = hf.model.language_model(inputs_embeds=embeds[None], position_ids=positions, use_cache=False)
    logits = hf.lm_head(states.last_hidden_state)[0, len(prompt.ids) - 1 :] / temperature
    logits[:, [config.image_token_id, config.video_token_id, config.vision_start_token_id,
               config.vision_end_token_id]] = float("-inf")
    return logits.log_softmax(-1)  # (len(row) + 1, W)


def library_logps(folder, prompt, tokens, temperature):
    """(G, C), one full forward a completion."""
    rows = [library_distribution(folder, prompt, row, temperature)[:-1].gather(-1, row[:, None]).squeeze(-1)
            for row in tokens]
    return torch.stack(rows)


# --- scoring ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_scores_are_those_of_the_unmodified_library(model, model_folder, prompts, temperature):
    """Catches a wrong mask, position, cut or temperature anywhere in the packed forward: peers drop fps here, or score at
    another temperature than they sample at."""
    tokens = [completions(seed=i, C=4 + i) for i in range(3)]
    with torch.no_grad():
        ours = logps_packed(model, embeds_of(model, prompts), positions_of(prompts), tokens, temperature)
        for prompt, t, mine in zip(prompts, tokens, ours):
            torch.testing.assert_close(mine, library_logps(model_folder, prompt, t, temperature), atol=2e-5, rtol=1e-5)


def gradients(model, prompts, tokens, share_prefix):
    model.hf.zero_grad()
    logps = logps_packed(model, embeds_of(model, prompts), positions_of(prompts), tokens, 1.0, share_prefix)
    weights = [torch.linspace(-1, 1, lp.numel()).view(lp.shape) for lp in logps]
    sum((lp * w).sum() for lp, w in zip(logps, weights)).backward()
    return [lp.detach() for lp in logps], {n: p.grad.clone() for n, p in model.hf.named_parameters() if p.grad is not None}


def test_sharing_the_prompt_changes_neither_values_nor_gradients(model, prompts):
    """The repeated prompt is what everybody else computes; sharing it must be an optimisation, not an approximation."""
    tokens = [completions(seed=i) for i in range(3)]
    shared, shared_grads = gradients(model, prompts, tokens, True)
    repeated, repeated_grads = gradients(model, prompts, tokens, False)
    for a, b in zip(shared, repeated):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert shared_grads.keys() == repeated_grads.keys() and any("visual" in name for name in shared_grads)
    largest = max(g.abs().max() for g in repeated_grads.values())
    for name in shared_grads:
        assert (shared_grads[name] - repeated_grads[name]).abs().max() < 1e-5 * largest, name


def test_gradient_checkpointing_changes_nothing(model, prompts):
    """The library's checkpointing turns its own cache off; the shared prefix must survive being recomputed backward."""
    tokens = [completions(seed=i) for i in range(3)]
    plain, plain_grads = gradients(model, prompts, tokens, True)
    model.checkpoint_activations()
    layers_ran = []
    for part in (model.text.layers[0].mlp, model.visual.blocks[0].mlp):
        part.register_forward_pre_hook(lambda *_: layers_ran.append(1))
    model.hf.eval()  # as sampling leaves it
    checked, checked_grads = gradients(model, prompts, tokens, True)
    assert len(layers_ran) == 4  # each once forward, once backward: it was really on, in both towers
    for a, b in zip(plain, checked):
        torch.testing.assert_close(a, b)
    for name in plain_grads:
        torch.testing.assert_close(plain_grads[name], checked_grads[name], atol=1e-6, rtol=1e-5)


def bytes_kept(forward) -> int:
    """What autograd holds on to between forward and backward, parameters not counted."""
    kept = {}

    def keep(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return sum(kept.values())


def test_gradient_checkpointing_keeps_the_input_of_a_layer_and_no_more(model, prompts):
    """Checkpointing that is on by name alone costs a card: layers that keep their insides need ten times as much."""
    tokens, prompts = [completions(G=8, C=16)], prompts[:1]

    def forward():
        model.logprobs_packed(embeds_of(model, prompts), positions_of(prompts), tokens, 1.0)

    plain = bytes_kept(forward)
    model.checkpoint_activations()
    checked = bytes_kept(forward)
    L, D, W, layers = len(prompts[0].ids) + 8 * 15, 96, model.lm_head.out_features, len(model.text.layers)
    video = len(prompts[0].patches) * (1176 + 32) * 4  # the tower's input, and that of its one block
    assert checked < 1.3 * (4 * L * D * (layers + 3) + 3 * 4 * 8 * 16 * W + video) < 0.5 * plain


def test_long_groups_do_not_keep_their_logits(model):
    """8 completions of 1,024 tokens have 5 GB of them in float32, which is what does not fit."""
    states, tokens = torch.randn(8, 64, 96, requires_grad=True), completions(G=8, C=64)
    pieces, whole = (bytes_kept(lambda: model._score_tokens(states, tokens, 1.0, rows=rows)) for rows in (64, 4096))
    assert pieces <= 4 * states.numel() + 8 * tokens.numel()  # what goes in, and nothing that is as wide as the vocabulary
    assert whole >= 4 * tokens.numel() * model.lm_head.out_features


def test_completions_of_a_group_do_not_see_each_other(model, prompts):
    """A packed row holds all G of them: a leak would let one completion read the answer of another."""
    tokens = completions(G=3)
    other = tokens.clone()
    other[1:] = completions(G=2, seed=9)
    with torch.no_grad():
        embeds, positions = embeds_of(model, prompts)[0], prompts[0].positions
        a, b = (model.logprobs(embeds, positions, t, 1.0) for t in (tokens, other))
    torch.testing.assert_close(a[0], b[0], atol=1e-6, rtol=0)
    assert (a[1:] - b[1:]).abs().max() > 0.1


def test_padding_behind_a_completion_changes_nothing(model, prompts):
    """Rows of a group have different lengths; what stands behind an end token must not reach the tokens before it."""
    tokens = completions(C=4)
    padded = torch.cat([tokens, torch.zeros(3, 6, dtype=torch.long)], dim=1)
    with torch.no_grad():
        embeds, positions = embeds_of(model, prompts)[1], prompts[1].positions
        torch.testing.assert_close(model.logprobs(embeds, positions, tokens, 1.0),
                                   model.logprobs(embeds, positions, padded, 1.0)[:, :4], atol=1e-5, rtol=0)


def test_completions_of_one_token_are_scored(model, prompts):
    """A collapsed policy that only says its end token, or --max_new_tokens 1, feeds nothing behind the prompt."""
    with torch.no_grad():
        one = model.logprobs(embeds_of(model, prompts)[0], prompts[0].positions, completions(C=1), 1.0)
        three = model.logprobs(embeds_of(model, prompts)[0], prompts[0].positions, completions(C=3)[:, :3], 1.0)
    assert one.shape == (3, 1) and torch.isfinite(one).all() and three.shape == (3, 3)


def test_packing_questions_changes_nothing(model, prompts):
    """How many questions share a pass is a matter of memory only."""
    tokens = [completions(seed=i, C=3 + i) for i in range(3)]
    with torch.no_grad():
        together = logps_packed(model, embeds_of(model, prompts), positions_of(prompts), tokens, 1.0)
        for i, prompt in enumerate(prompts):
            alone = model.logprobs(embeds_of(model, [prompt])[0], prompt.positions, tokens[i], 1.0)
            torch.testing.assert_close(together[i], alone, atol=1e-5, rtol=0)
    assert model.pack([5, 5, 5]) == [[0, 1, 2]]
    model.pack_tokens = 10
    assert model.pack([5, 5, 5, 30, 1]) == [[0, 1], [2], [3], [4]]


def test_logits_in_pieces_are_the_same_logits(model):
    """Long groups are scored a few rows at a time, with the logits recomputed backward."""
    states = torch.randn(4, 6, 96, generator=torch.Generator().manual_seed(0)).requires_grad_()
    tokens = completions(G=4, C=6)
    results = []
    for rows in (5, 4096):
        logps = model._score_tokens(states, tokens, 0.7, rows=rows).logps
        (grad,) = torch.autograd.grad(logps.square().sum(), states)
        results.append((logps.detach(), grad))
    torch.testing.assert_close(results[0], results[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("share_prefix", [True, False])
def test_entropies_are_those_of_the_librarys_distribution(model, model_folder, prompts, share_prefix):
    """In float64 by hand, at the temperature, without the banned ids, whose p log p would be nan; the log-probabilities
    beside them do not change by a bit."""
    tokens = [completions(seed=i, C=4 + i) for i in range(3)]
    with torch.no_grad():
        arguments = embeds_of(model, prompts), positions_of(prompts), tokens, 0.6, share_prefix
        plain, both = model.logprobs_packed(*arguments), model.logprobs_packed(*arguments, with_entropy=True)
        for prompt, t, (alone, none), (logps, entropies) in zip(prompts, tokens, plain, both):
            assert none is None
            assert torch.equal(logps, alone)
            for row, mine in zip(t, entropies):
                p = library_distribution(model_folder, prompt, row, 0.6)[:-1].double().exp()
                expected = -(p * p.clamp(min=1e-300).log()).sum(-1)
                torch.testing.assert_close(mine.double(), expected, atol=2e-5, rtol=1e-4)


def test_the_gradient_of_the_entropy_is_the_written_one(model):
    """dH / dlogit = -p (log p + H): none for a banned token, whether the logits are kept or made again backward."""
    states, tokens = torch.randn(2, 3, 96, requires_grad=True), completions(G=2, C=3)
    weight = model.lm_head.weight.detach().double()
    logits = (states.detach().double() @ weight.T / 0.7).masked_fill(model.is_banned, float("-inf"))
    p, logp = logits.softmax(-1), logits.log_softmax(-1).masked_fill(model.is_banned, 0.0)
    by_logits = -p * (logp - (p * logp).sum(-1, keepdim=True))
    for rows in (2, 4096):
        entropies = model._score_tokens(states, tokens, 0.7, with_entropy=True, rows=rows).entropies
        (gradient,) = torch.autograd.grad(entropies.sum(), states)
        torch.testing.assert_close(gradient.double(), by_logits @ weight / 0.7, atol=2e-5, rtol=1e-4)


def test_time_reaches_the_model_through_the_positions(model, prompts):
    """Frames a second at which a clip was sampled changes only the time axis; dropping it was peers' commonest bug."""
    embeds, tokens = embeds_of(model, prompts)[0].detach(), completions()
    slower = prompts[0].positions.clone()
    slower[0] = slower[0] * 3
    with torch.no_grad():
        difference = model.logprobs(embeds, prompts[0].positions, tokens, 1.0) - model.logprobs(embeds, slower, tokens, 1.0)
    assert difference.abs().max() > 1e-3


# --- sampling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_what_is_sampled_is_what_is_scored(model, prompts, temperature):
    """|log p when sampled - log p when scored| is the alarm for every mismatch of positions, masks or temperature."""
    for prompt, (tokens, logps) in zip(prompts, sample(model, prompts, temperature=temperature)):
        with torch.no_grad():
            scored = model.logprobs(embeds_of(model, [prompt])[0], prompt.positions, tokens, temperature)
        written = torch.cumsum(torch.isin(tokens, torch.tensor(model.eos_ids)).long(), 1) <= 1
        assert ((scored - logps).abs() * written * (logps != 0)).max() < 2e-5
        assert (logps < 0).any()


def test_a_sample_depends_on_its_seed_and_on_nothing_else_in_the_batch(model, prompts):
    """The world size and the batch decide which questions run together; they must not change what is drawn."""
    together = sample(model, prompts)
    for i, prompt in enumerate(prompts):
        (tokens, logps), = sample(model, [prompt], seeds=[[11, 22, 33][i]])
        assert torch.equal(tokens, together[i][0])
        torch.testing.assert_close(logps, together[i][1], atol=1e-5, rtol=0)
    assert not torch.equal(sample(model, prompts[:1], seeds=[12])[0][0], together[0][0])


def test_every_token_has_noise_of_its_own(model, prompts):
    """At a very high temperature all tokens are equally likely: noise that is reused repeats the token itself."""
    for tokens, _ in sample(model, prompts, temperature=1e6, group_size=8):
        assert (tokens[:, 1:] == tokens[:, :-1]).float().mean() < 0.1
        assert all(len(set(column.tolist())) > 4 for column in tokens[:, :3].T)


def test_the_group_varies_although_the_checkpoint_says_top_k_1(model_folder, prompts):
    """Qwen2.5-VL ships generation settings under which `generate()` returns G identical completions."""
    model = VideoLM.load(str(model_folder))
    model.hf.generation_config.update(top_k=1, do_sample=True, temperature=1e-6)
    (tokens, _), = sample(model, prompts[:1], group_size=8)
    assert len({tuple(row.tolist()) for row in tokens}) > 4


def test_temperature_0_is_the_arg_max(model, model_folder, prompts):
    """Greedy decoding against the library, token by token, by the full forward of what was said so far."""
    (tokens, _), = sample(model, prompts[1:2], temperature=0.0, group_size=1, max_new_tokens=6)
    said = tokens[0]
    with torch.no_grad():
        best = library_distribution(model_folder, prompts[1], said)[:-1].argmax(-1)
    assert torch.equal(best, said)


def test_vision_placeholders_are_neither_sampled_nor_scored(model, prompts):
    """A sampled <|video_pad|> would be taken for a piece of video later: 'tokens 2601, features 2600' after hours."""
    with torch.no_grad():
        model.lm_head.weight[model.banned_ids] += 5.0 * model.lm_head.weight.mean(0)
    for tokens, _ in sample(model, prompts, group_size=16, max_new_tokens=20):
        assert not torch.isin(tokens, torch.tensor(model.banned_ids)).any()
    with torch.no_grad():
        embeds = embeds_of(model, prompts)[0]
        logps = model.logprobs(embeds, prompts[0].positions, torch.tensor([[model.video_token_id, 30]]), 1.0)
    assert logps[0, 0] == float("-inf") and torch.isfinite(logps[0, 1])


def test_rows_end_at_any_end_token_and_are_padded_behind_it(model, prompts):
    """Rows that ended leave the batch: the others must go on undisturbed, and nothing may be written behind an end."""
    model.eos_ids = list(range(40, 300, 2))  # about half of the tokens end a completion: rows leave at every step
    pad = model.tokenizer.pad_token_id
    lengths = set()
    for prompt, (tokens, logps) in zip(prompts, sample(model, prompts, group_size=8)):
        with torch.no_grad():
            scored = model.logprobs(embeds_of(model, [prompt])[0], prompt.positions, tokens, 1.0)
        for row, lp, sc in zip(tokens.tolist(), logps, scored):
            ends = [i for i, t in enumerate(row) if t in model.eos_ids]
            length = ends[0] + 1 if ends else len(row)
            lengths.add(length)
            assert set(row[length:]) <= {pad} and not lp[length:].any()
            torch.testing.assert_close(lp[:length], sc[:length], atol=2e-5, rtol=0)
        assert tokens.shape[1] == max(len([t for t in row if t != pad]) for row in tokens.tolist())
    assert len(lengths) > 3


def test_a_completion_that_never_ends_is_cut_without_an_end_token(model, prompts):
    """Truncated rows are counted and get no reward for ending; an end token that was never sampled must not appear."""
    model.eos_ids = [model.tokenizer.pad_token_id]
    with torch.no_grad():
        model.lm_head.weight[model.eos_ids] = 0
        model.text.norm.weight *= 3
    (tokens, logps), = sample(model, prompts[:1], max_new_tokens=5)
    assert tokens.shape == (4, 5) and (logps != 0).all()


def test_how_many_slots_are_looked_at_changes_nothing(model, prompts, monkeypatch):
    """Slots are added as they fill up; one step too late, and a token does not see itself."""
    model.eos_ids = [-1]
    expected = sample(model, prompts, max_new_tokens=19)
    model.first_width = 1
    for (tokens, logps), (as_expected, at_once) in zip(sample(model, prompts, max_new_tokens=19), expected):
        assert torch.equal(tokens, as_expected)
        torch.testing.assert_close(logps, at_once, atol=1e-5, rtol=0)


def test_looking_seldom_changes_nothing(model, prompts):
    """On a GPU rows that are done run on for a few steps: what they say then must reach nobody."""
    model.eos_ids = list(range(40, 300, 4))
    expected = sample(model, prompts, group_size=8)
    for model.look_every, model.retire_below in ((5, 0.5), (100, 0.5), (1, 1.0), (1, 0.0)):
        for (tokens, logps), (as_expected, by_then) in zip(sample(model, prompts, group_size=8), expected):
            assert torch.equal(tokens, as_expected)
            torch.testing.assert_close(logps, by_then, atol=1e-5, rtol=0)


def test_flash_attention_reads_a_prompt_only_where_nothing_is_padded(model, prompts, monkeypatch):
    """On a GPU a fused kernel reads the prompt, and knows no mask: a padded prompt would be looked at to the padding's end.
    A CPU has the same kernel; here it is used as a GPU's would be. Questions of other lengths leave until one is left."""
    model.eos_ids = list(range(40, 300, 4))
    settings, lengths = {"group_size": 4, "max_new_tokens": 60}, []
    expected = sample(model, prompts, **settings)

    def flash(query, key, value, scaling):
        lengths.append(key.shape[2])
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, scale=scaling)

    monkeypatch.setattr(model_file.kernels, "has_flash", lambda query: True)
    monkeypatch.setattr(model_file.kernels, "flash_with_mass", flash)
    for (tokens, logps), (wanted, wanted_logps) in zip(sample(model, prompts, **settings), expected):
        assert torch.equal(tokens, wanted)
        torch.testing.assert_close(logps, wanted_logps, atol=1e-5, rtol=0)
    steps = max(tokens.shape[1] for tokens, _ in expected) - 1
    assert 0 < len(lengths) < steps * len(model.text.layers)  # not while there was padding
    assert set(lengths) < {len(prompt.ids) for prompt in prompts}
    lengths.clear()
    sample(model, prompts[:1] * 3, **settings)
    assert len(lengths) >= len(model.text.layers) and set(lengths) == {len(prompts[0].ids)}


def test_rows_leave_when_they_are_done(model, prompts):
    """A group waits for its longest completion; what the others cost meanwhile is what sampling wastes."""
    model.eos_ids = list(range(40, 300, 4))
    rows = []
    step = model.decode_step
    model.decode_step = lambda run: (rows.append(run.rows.numel()), step(run))
    lengths = torch.cat([(lp != 0).sum(1) for _, lp in sample(model, prompts, group_size=8, max_new_tokens=40)])
    assert rows[0] == 24 and rows == sorted(rows, reverse=True) and len(set(rows)) > 2
    assert len(rows) == lengths.max() - 1  # and all of it ends with the last
    for c, running in enumerate(rows, 1):
        assert (lengths > c).sum() <= running <= max(24 if c == 1 else 0, int((lengths > c).sum() / 0.75) + 8)


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.0}, {"group_size": 8, "max_new_tokens": 150},
                                      {"group_size": 8, "max_new_tokens": 40, "eos_ids": range(40, 300, 4)}])
def test_the_cuda_graph_gives_the_tokens_of_the_steps_it_was_recorded_from(model_folder, prompts, gpu, settings):
    """The bfloat16 weights that autocast keeps must live as long as the graph: freed, they are read as other tensors.
    With many tokens that end a completion rows leave, and the graph is recorded again."""
    model, settings = VideoLM.load(str(model_folder), gpu), dict(settings)
    model.eos_ids = list(settings.pop("eos_ids", model.eos_ids))
    graph, model.new_graph = model.new_graph, lambda: None
    expected = sample(model, prompts, **settings)
    model.new_graph = graph
    for again in range(2):  # the second run meets memory that the first has left behind
        for (tokens, logps), (as_expected, by_python) in zip(sample(model, prompts, **settings), expected):
            assert torch.equal(tokens, as_expected)
            torch.testing.assert_close(logps, by_python, atol=1e-3, rtol=0)


@pytest.mark.gpu
def test_a_decode_step_never_waits_for_the_gpu(model_folder, prompts, gpu):
    """One question to the device in a step, and the graph cannot be recorded, or Python stands still for every token."""
    if gpu == "cpu":
        pytest.skip("a CPU is never waited for")
    model = VideoLM.load(str(model_folder), gpu)
    assert gpu_check.waits_for_nothing(model, lambda C: sample(model, prompts, max_new_tokens=C))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, value, gradient", [(torch.float32, 1e-3, 1e-3), (torch.bfloat16, 0.05, 0.1)])
@pytest.mark.parametrize("share", [True, False])
def test_a_gpu_gives_the_values_and_gradients_of_the_cpu(model_folder, gpu, dtype, value, gradient, share):
    """Other kernels for every operation, in float32 to rounding; in bfloat16 single tokens differ more, the mean does not."""
    found = gpu_check.compare_with_cpu(str(model_folder), gpu, None if dtype == torch.float32 else dtype, share)
    kind = "largest" if dtype == torch.float32 else "mean"
    assert found[f"{kind} |log p - CPU's|"] < value
    assert found["|gradient - CPU's|, of its length"] < gradient


@pytest.mark.gpu
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_what_a_gpu_samples_is_what_it_scores(model_folder, prompts, gpu, temperature):
    """In the bfloat16 of training: one token at a time with a graph against whole rows, other kernels on either side."""
    model = VideoLM.load(str(model_folder), gpu)
    settings = {"group_size": 8, "max_new_tokens": 100, "temperature": temperature}
    for prompt, (tokens, logps) in zip(prompts, sample(model, prompts, **settings)):
        with torch.no_grad():
            scored = model.logprobs(embeds_of(model, [prompt])[0], prompt.positions, tokens, temperature)
        assert (scored - logps)[logps != 0].abs().mean() < 0.05


def test_inverting_the_cumulative_distribution_draws_the_distribution():
    """Frequencies against probabilities, with impossible tokens at both ends: neither rounding nor u = 0 may pick them."""
    p = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    noise = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    drawn = sample_tokens(p.log().expand(10_000, -1), noise)
    assert torch.bincount(drawn, minlength=6).tolist() == [0, 5000, 0, 3000, 2000, 0]
    assert sample_tokens(p.log()[None], torch.zeros(1, dtype=torch.float64)).item() == 1
    almost_one = torch.tensor([1 - 2**-53], dtype=torch.float64)
    assert sample_tokens(p.log()[None], almost_one).item() == 4


def test_two_levels_of_sums_draw_the_tokens_of_one():
    """Blocks are added up in another order than one running sum: a border that is off by one entry or one block, or a
    vocabulary that is no multiple of the block, shifts every token behind it."""
    generator = torch.Generator().manual_seed(0)
    for vocabulary in (5, 511, 512, 513, 2000):
        p = torch.rand(400, vocabulary, generator=generator) ** 8
        p[:, torch.randperm(vocabulary, generator=generator)[: vocabulary // 3]] = 0.0
        logps, noise = p.log().log_softmax(-1), torch.rand(400, generator=generator, dtype=torch.float64)
        cdf = logps.double().exp().cumsum(-1)
        expected = torch.searchsorted(cdf, noise[:, None] * cdf[:, -1:], right=True).squeeze(-1)
        assert torch.equal(sample_tokens(logps, noise), expected)
    almost_one = torch.full((400,), 1 - 2**-53, dtype=torch.float64)
    drawn = sample_tokens(logps, almost_one)
    assert (p.gather(-1, drawn[:, None]) > 0).all()  # not the padding behind the last token, and none of mass 0


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_attention_behind_a_prefix_is_that_of_an_explicit_mask(monkeypatch, device):
    """SDPA's `is_causal` is anchored at the upper left: with fewer queries than keys each token would see the prompt's
    first tokens only. Values and gradients in float64, two query heads to a key head, with the mask of either device."""
    masks = {name: model_file.lower_right_mask(5, 12, name) for name in ("cpu", "cuda")}
    monkeypatch.setattr(model_file, "lower_right_mask", lambda *_: masks[device])
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, heads, length, 8, dtype=torch.float64, generator=generator).requires_grad_()
               for heads, length in ((4, 5), (2, 12), (2, 12)))
    mask = torch.ones(5, 12, dtype=torch.bool).tril(7)
    repeated = [x.repeat_interleave(2, dim=1) for x in (k, v)]
    scores = (q @ repeated[0].transpose(2, 3) * 0.3).masked_fill(~mask, float("-inf"))
    by_hand = scores.softmax(-1) @ repeated[1]
    ours = causal_attention(q, k, v, 0.3)
    torch.testing.assert_close(ours, by_hand, atol=1e-14, rtol=0)
    weight = torch.randn(ours.shape, dtype=torch.float64, generator=generator)
    for a, b in zip(torch.autograd.grad((ours * weight).sum(), (q, k, v)),
                    torch.autograd.grad((by_hand * weight).sum(), (q, k, v))):
        torch.testing.assert_close(a, b, atol=1e-13, rtol=0)


def test_bfloat16_copies_are_kept_while_sampling_and_not_while_learning(model, prompts):
    """Kept while learning they are as large as the model once more, 14 GB at 7B; not kept while sampling, each weight is
    rounded again for every token."""
    model.autocast = torch.bfloat16
    kept = []
    hook = model.text.layers[0].register_forward_hook(lambda *_: kept.append(torch.is_autocast_cache_enabled()))
    sample(model, prompts, max_new_tokens=4)
    assert len(kept) > 1 and all(kept)
    kept.clear()
    tokens = [completions() for _ in prompts]
    model.logprobs_packed(embeds_of(model, prompts), positions_of(prompts), tokens, 1.0)
    assert kept == [False]
    hook.remove()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cudnn_is_not_asked_for_attention(model_folder):
    """It builds a plan for each new shape, and every prompt has a new one."""
    VideoLM.load(str(model_folder), "cuda")
    assert not torch.backends.cuda.cudnn_sdp_enabled()


# --- Qwen3-VL ---------------------------------------------------------------------------------------------------------


def by_the_library(folder, prompt, tokens, of=Qwen3VLForConditionalGeneration):
    """log p of each completion, (G, C), and the model: from pixels, with the library's own positions and deepstack."""
    hf = of.from_pretrained(folder, attn_implementation="eager")
    video = {} if prompt.patches is None else {
        "pixel_values_videos": prompt.patches, "video_grid_thw": torch.tensor([prompt.grid])}
    if "image" in prompt.sample:
        video = {"pixel_values": prompt.patches, "image_grid_thw": torch.tensor(prompt.grid)}
    banned = [hf.config.image_token_id, hf.config.video_token_id, hf.config.vision_start_token_id,
              hf.config.vision_end_token_id]
    logps = []
    for row in tokens:
        ids = torch.cat([prompt.ids, row])[None]
        kinds = 2 * (ids == hf.config.video_token_id).int() + (ids == hf.config.image_token_id).int()
        out = hf(input_ids=ids, mm_token_type_ids=kinds, use_cache=False, **video)
        logits = out.logits[0, len(prompt.ids) - 1: -1].index_fill(-1, torch.tensor(banned), float("-inf"))
        logps.append(logits.log_softmax(-1).gather(-1, row[:, None]).squeeze(-1))
    return torch.stack(logps), hf


def assert_values_and_gradients_of_the_library(model, folder, prompt, of=Qwen3VLForConditionalGeneration):
    tokens = completions(seed=0)
    theirs, hf = by_the_library(folder, prompt, tokens, of)
    model.hf.zero_grad()
    (ours,) = logps_packed(model, embeds_of(model, [prompt]), [prompt.positions], [tokens], 1.0)
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)
    weights = torch.linspace(-1, 1, ours.numel()).view(ours.shape)
    for logps in (ours, theirs):
        (logps * weights).sum().backward()
    expected = {name: p.grad for name, p in hf.named_parameters() if p.grad is not None}
    found = {name: p.grad for name, p in model.hf.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    largest = max(grad.abs().max() for grad in expected.values())
    for name in expected:
        assert (found[name] - expected[name]).abs().max() < 1e-5 * largest, name
    return found


def test_qwen3_gives_the_values_and_gradients_of_its_own_library_class(qwen3, qwen3_folder):
    """Deepstack left out, or added a layer late or at text, gives a model that still answers, a little worse."""
    for prompt in make_prompts(qwen3):
        found = assert_values_and_gradients_of_the_library(qwen3, qwen3_folder, prompt)
        assert any("deepstack" in name for name in found) == (prompt.patches is not None)


def picture_prompts(model) -> list:
    """A question about one picture, and one about two of other sizes, larger than a window of the vision tower."""
    generator = torch.Generator().manual_seed(3)

    def picture(height: int, width: int) -> Clip:
        size = (1, 3, height * model.geometry.factor, width * model.geometry.factor)
        return Clip(torch.randint(0, 256, size, generator=generator, dtype=torch.uint8), torch.zeros(1), 1.0)

    sample = {"id": "p", "task": "qa", "question": "which colour?", "options": ["red", "green"], "answer": "A"}
    return [prepare({**sample, "image": image}, clips, model.tokenizer, "answer", geometry=model.geometry)
            for image, clips in (("a.png", [picture(3, 5)]), (["b.png", "c.png"], [picture(2, 6), picture(5, 2)]))]


@pytest.mark.parametrize("family", ["qwen2.5", "qwen3"])
def test_pictures_give_the_values_and_gradients_of_the_library(model_folder, qwen3_folder, family):
    """From pixels on, by the library's own path for images, with its own positions. Pictures of a sample that saw each other,
    or whose rows changed places, would still give answers."""
    folder, of = {"qwen2.5": (model_folder, Qwen2_5_VLForConditionalGeneration),
                  "qwen3": (qwen3_folder, Qwen3VLForConditionalGeneration)}[family]
    model = VideoLM.load(str(folder))
    for prompt in picture_prompts(model):
        assert_values_and_gradients_of_the_library(model, folder, prompt, of)


def test_videos_pictures_and_text_share_a_pass(model):
    """Each as if it were alone, whatever else is in the pack."""
    prompts = [p for pair in zip(make_prompts(model), [*picture_prompts(model), None]) for p in pair if p is not None]
    tokens = [completions(seed=i) for i in range(len(prompts))]
    with torch.no_grad():
        together = logps_packed(model, embeds_of(model, prompts), [p.positions for p in prompts], tokens, 1.0)
        for prompt, row, expected in zip(prompts, tokens, together):
            (alone,) = logps_packed(model, embeds_of(model, [prompt]), [prompt.positions], [row], 1.0)
            torch.testing.assert_close(alone, expected, atol=1e-5, rtol=1e-5)


def test_qwen3_shares_its_prompt_checkpoints_and_samples_what_it_scores(qwen3):
    """Deepstack belongs to the prompt: it must not be lost on the way into the cache, in a pack of several questions, where
    completions have none, or when a layer is recomputed backward."""
    prompts, tokens = make_prompts(qwen3), [completions(seed=i) for i in range(3)]
    shared, grads = gradients(qwen3, prompts, tokens, True)
    repeated, repeated_grads = gradients(qwen3, prompts, tokens, False)
    qwen3.checkpoint_activations()
    checked, checked_grads = gradients(qwen3, prompts, tokens, True)
    largest = max(grad.abs().max() for grad in grads.values())
    assert len(grads) == len(list(qwen3.hf.parameters()))  # everything learns
    for a, b, c in zip(shared, repeated, checked):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(a, c)
    for name in grads:
        assert (grads[name] - repeated_grads[name]).abs().max() < 1e-5 * largest, name
        torch.testing.assert_close(grads[name], checked_grads[name], atol=1e-5 * largest, rtol=1e-4)
    sampled = sample(qwen3, prompts)
    with torch.no_grad():
        scored = logps_packed(qwen3, embeds_of(qwen3, prompts), positions_of(prompts), [t for t, _ in sampled], 1.0)
    for (rows, logps), again in zip(sampled, scored):
        said = logps != 0  # not the padding
        assert len({tuple(row) for row in rows.tolist()}) > 1
        torch.testing.assert_close(logps[said], again[said], atol=2e-5, rtol=1e-5)


def test_qwen3_with_adapters_starts_as_itself_and_folds_them_in(qwen3):
    """Adapters find their matrices by name; a name that Qwen3-VL does not have would be left out in silence."""
    prompts, tokens = make_prompts(qwen3), [completions(seed=i) for i in range(3)]
    with torch.no_grad():
        before = logps_packed(qwen3, embeds_of(qwen3, prompts), positions_of(prompts), tokens, 1.0)
    layers, names = len(qwen3.text.layers), qwen3.hf.state_dict().keys()
    lora.add_adapters(qwen3.hf, 2, 4.0, list(lora.TARGETS), seed=0)
    assert len(lora.adapters(qwen3.hf)) == layers * len(lora.TARGETS)
    after, grads = gradients(qwen3, prompts, tokens, True)
    for a, b in zip(before, after):
        torch.testing.assert_close(a, b)
    assert len(grads) == 2 * layers * len(lora.TARGETS)
    assert lora.merged_state(qwen3.hf).keys() == {name for name in names if name != "lm_head.weight"} or (
        lora.merged_state(qwen3.hf).keys() == names)


def test_qwen3_is_saved_in_the_form_that_it_was_published_in(qwen3, qwen3_folder, tmp_path):
    """Its type of weights stands in a part of config.json, where a float32 model that says bfloat16 is rounded."""
    qwen3.save(tmp_path, dtype=torch.bfloat16)
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path, qwen3_folder))
    assert ours["text_config"].pop("dtype") == "bfloat16" and theirs["text_config"].pop("dtype") == "float32" and ours == theirs
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(again) is Qwen3VLForConditionalGeneration and again.dtype == torch.bfloat16
    chat = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "hm?"}]}]
    assert AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(chat, tokenize=False) == (
        "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>hm?<|im_end|>\n")
    assert VideoLM.load(str(tmp_path)).geometry == QWEN3


# --- files ------------------------------------------------------------------------------------------------------------


def test_another_architecture_is_refused_by_name(tmp_path, model_folder):
    """Patches and positions are written by hand; another model, a near relation too, would train on nonsense without a
    word."""
    for name in ("llama", "qwen3_vl_moe", "qwen3_5", "qwen2_vl"):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": name}))
        with pytest.raises(ValueError, match=f"'{name}' model.*'qwen2_5_vl' and 'qwen3_vl' alone"):
            VideoLM.load(str(tmp_path))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="config.json"):
        VideoLM.load(str(empty))


def test_what_is_saved_loads_like_any_published_checkpoint(model, model_folder, tmp_path):
    """final/ without a tokenizer, template or preprocessor is of no use to anybody; weights must survive unchanged."""
    with torch.no_grad():
        model.text.norm.weight += 0.5
    model.save(tmp_path / "final")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "final")
    assert type(again) is Qwen2_5_VLForConditionalGeneration
    for name, weight in model.hf.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name
    text = "<|im_start|>user\nis it red?<|im_end|>\n"
    assert AutoTokenizer.from_pretrained(tmp_path / "final")(text) == model.tokenizer(text)
    chat = [{"role": "user", "content": [{"type": "text", "text": "hm?"}, {"type": "video"}]}]
    assert AutoTokenizer.from_pretrained(tmp_path / "final").apply_chat_template(chat, tokenize=False) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nhm?<|vision_start|><|video_pad|>"
        "<|vision_end|><|im_end|>\n")
    for file in ("preprocessor_config.json", "generation_config.json"):
        assert filecmp.cmp(model_folder / file, tmp_path / "final" / file, shallow=False), file


def test_a_prompt_and_a_video_that_do_not_fit_are_refused(model, prompts):
    """masked_scatter silently takes the first rows of a video that is too long."""
    video = model.encode_prompts(prompts[:1])[0].detach()
    with pytest.raises(ValueError, match="placeholders"):
        model.embed(prompts[0].ids, video[:-1])
    with pytest.raises(ValueError, match="placeholders"):
        model.embed(prompts[0].ids, None)


def test_videos_in_one_pass_do_not_see_each_other(model, prompts):
    """Several videos share a pass of the vision tower; each must come out as if it were alone."""
    with torch.no_grad():
        together = model.encode_prompts(prompts)
        for i in (0, 1):
            torch.testing.assert_close(together[i], model.encode_prompts([prompts[i]])[0], atol=1e-5, rtol=1e-5)
        assert together[2] is None
