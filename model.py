"""The policy: tokens in, probabilities out.

One class, `VideoLM`, wraps an unmodified Hugging Face Qwen2.5-VL or Qwen3-VL and does four things with it:

    load / save       a folder or a hub id in, the same layout out
    encode_video      patches (N, 1176) -> video embeddings (V, D): here pixels end
    generate          sample G completions of each question, the prompt encoded once
    logprobs          log-probabilities of those completions, differentiable, the prompt encoded once

The G completions of a group share a prompt that is long (a video) while they are short. So the prompt is never repeated:

    scoring    one packed row  [prompt | completion 1 | ... | completion G]  runs through every linear layer once; attention
               alone knows the structure (`PackedAttention`): the prompt sees itself, a completion sees the prompt and itself.
    sampling   the prompt's keys and values are stored once for a group; all G rows read them (`GroupCache`).

Both plug into the library's decoder layers as one registered attention function, and so does a third into its vision
tower (`WindowAttention`); nothing else of the library is touched.
Positions are always passed in (data.mrope_positions): the library's own change between versions.

The two models differ here in one thing. Qwen3-VL's tower has further outputs for each video token, which are added behind
the first decoder layers (deepstack). They ride behind the embedding: rows of (1 + n) D, of which `_layers` adds the k-th D
behind layer k; n is 0 for Qwen2.5-VL, and text has zeros there.

Left out on purpose: beam search, top-k, top-p and repetition penalties. What is sampled must be what is scored.

Shapes: Q questions, G completions of one question, C tokens of the longest completion, P prompt tokens with V video tokens
among them, N patches = 4 V, D hidden size (of embedded prompts (1 + n) D, see above), H heads, K key/value heads, d head
size, L tokens of a packed row, W vocabulary.
"""

import functools
import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoTokenizer, Qwen2_5_VLForConditionalGeneration, Qwen3VLForConditionalGeneration
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

from data import Grid, Prompt, grids_of
from lib import hf_folder, kernels, lora
from lib.geometry import geometry_of
from lib.sharding import Sharding

try:  # only where a CUDA compiler could build it
    from flash_attn import flash_attn_func
except ImportError:
    flash_attn_func = None

CLASSES = {"qwen2_5_vl": Qwen2_5_VLForConditionalGeneration, "qwen3_vl": Qwen3VLForConditionalGeneration}  # by model_type

logging.disable_progress_bar()  # of shards being read and written: ours is the only bar on the screen

# --- attention: the one thing that knows what a group is -------------------------------------------------------------


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Attention in which the last query sees every key: query (B, H, S, d), key and value (B, K, S', d), S <= S'.

    With fewer queries than keys the causal triangle is anchored at the lower right (the keys in front are a prefix that
    everybody sees). SDPA's own `is_causal` is anchored at the upper left, hence a mask. With `enable_gqa` a key head serves
    several query heads where it lies; repeating it would write the prompt's keys and values again for each head.
    """
    S, S_all = query.shape[2], key.shape[2]
    if flash_attn_func is not None and query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        out = flash_attn_func(*(x.transpose(1, 2) for x in (query, key, value)), softmax_scale=scaling, causal=True)
        return out.transpose(1, 2)
    mask = None if S == S_all else lower_right_mask(S, S_all, query.device.type)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling,
                                          enable_gqa=True)


def lower_right_mask(S: int, S_all: int, device: str) -> Tensor:
    """(S, S_all), true where a query may look. On a GPU the name of such a mask: flash attention refuses a tensor of ones and
    zeros and knows this one by itself."""
    if device == "cuda":
        return causal_lower_right(S, S_all)
    return torch.ones(S, S_all, dtype=torch.bool, device=device).tril(S_all - S)


class PackedAttention:
    """Scoring and prefill: several questions in one row, each [prompt (P) | G completions (C each)].

    `spans` lists (P, G, C). Prompts attend to themselves; each completion attends to its prompt and to itself, never to its
    siblings. With `cache` the prompts' keys and values are kept for sampling.
    """

    def __init__(self, spans: list[tuple[int, int, int]], cache: "GroupCache | None" = None):
        self.spans, self.cache = spans, cache

    def of(self, layer: int) -> Callable:
        """The attention of one decoder layer."""
        return functools.partial(self, layer)

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        outputs, sizes = [], [P + G * C for P, G, C in self.spans]
        rows = zip(self.spans, *(x.split(sizes, dim=2) for x in (query, key, value)))
        for (P, G, C), q, k, v in rows:  # q (1, H, P + G C, d)
            outputs.append(causal_attention(q[:, :, :P], k[:, :, :P], v[:, :, :P], scaling))  # (1, H, P, d)
            if self.cache is not None:
                self.cache.add_prompt(layer, k[0, :, :P], v[0, :, :P])
            if G * C > 0:
                q_c, k_c, v_c = (x[0, :, P:].unflatten(1, (G, C)).transpose(0, 1) for x in (q, k, v))  # (G, H, C, d)
                k_all = torch.cat([k[:, :, :P].expand(G, -1, -1, -1), k_c], dim=2)  # (G, K, P + C, d)
                v_all = torch.cat([v[:, :, :P].expand(G, -1, -1, -1), v_c], dim=2)
                out = causal_attention(q_c, k_all, v_all, scaling)  # (G, H, C, d)
                outputs.append(out.transpose(0, 1).flatten(1, 2).unsqueeze(0))  # (1, H, G C, d)
        return torch.cat(outputs, dim=2)  # (1, H, L, d)


class GroupCache:
    """Sampling: keys and values of Q prompts, each stored once, and of R completions of each question.

    prompt keys (Q, K, P, d) of every layer, shorter prompts padded on the right and masked; own keys (Q, R, K, C, d).
    Reading the prompt once for all R rows is what makes a long video cheap: it is R times less memory traffic.

    All of it is allocated once. How many own tokens are in, `t` (1,), is a number on the device: a step writes at t and
    masks what lies behind, so that every step over the same `width` is the same list of operations on the same memory.
    `first_width` own slots are looked at to begin with.
    """

    def __init__(self, num_layers: int, prompt_lengths: list[int], group_size: int, max_new_tokens: int,
                 first_width: int = 64):
        self.prompt: list[list] = [[] for _ in range(num_layers)]  # per layer: (keys, values) of each prompt, then stacked
        self.own: list = [None] * num_layers
        self.lengths, self.R, self.C, self.first_width = prompt_lengths, group_size, max_new_tokens, first_width

    def add_prompt(self, layer: int, key: Tensor, value: Tensor) -> None:
        """key, value (K, P, d) of the next question."""
        pad = max(self.lengths) - key.shape[1]
        self.prompt[layer].append((F.pad(key, (0, 0, 0, pad)), F.pad(value, (0, 0, 0, pad))))

    def seal(self) -> None:
        """All prompts are in: stack them, make room for the completions, build the mask over the padding."""
        for layer, pairs in enumerate(self.prompt):
            keys, values = (torch.stack(x) for x in zip(*pairs))  # (Q, K, P, d)
            self.prompt[layer] = (keys, values)
            Q, K, _, d = keys.shape
            self.own[layer] = tuple(keys.new_zeros(Q, self.R, K, self.C, d) for _ in range(2))
        self.hide_padding()
        self.slots = torch.arange(self.C, device=keys.device)
        self.t = torch.zeros(1, dtype=torch.long, device=keys.device)

    def hide_padding(self) -> None:
        """The mask of what stands behind the shorter prompts; None where all are as long."""
        P, device = max(self.lengths), self.prompt[0][0].device
        padding = torch.arange(P, device=device) >= torch.tensor(self.lengths, device=device)[:, None]  # (Q, P)
        self.hidden = padding[:, None, None] if min(self.lengths) < P else None  # (Q, 1, 1, P)

    def keep(self, questions: Tensor, rows: Tensor) -> None:
        """Only these go on: questions (Q',), rows (Q', R') of each of them. Finished completions cost nothing more."""
        self.lengths, self.R = [self.lengths[i] for i in questions.tolist()], rows.shape[1]
        for layer in range(len(self.own)):
            self.prompt[layer] = tuple(x[questions, :, : max(self.lengths)] for x in self.prompt[layer])
            self.own[layer] = tuple(x[questions[:, None], rows] for x in self.own[layer])
        self.hide_padding()

    def widen(self, count: int) -> None:
        """Look at enough own slots for `count` tokens: doubled when they are full, so a few widths serve all steps."""
        self.width = min(self.C, max(self.first_width, 1 << (count - 1).bit_length()))

    def begin_step(self) -> None:
        """The mask of this step, the same in all layers: slots behind the one to be filled."""
        self.future = self.slots[: self.width] > self.t  # (width,)

    def of(self, layer: int) -> "LayerCache":
        """What one decoder layer needs in this step."""
        (prompt_k, prompt_v), (own_k, own_v) = self.prompt[layer], self.own[layer]
        own_k, own_v = own_k[:, :, :, : self.width], own_v[:, :, :, : self.width]
        return LayerCache(prompt_k, prompt_v, own_k, own_v, self.t, self.future, self.hidden)


@dataclass
class LayerCache:
    """One layer's part of a GroupCache in one decode step. It does not know which layer it belongs to: if it did, a
    compiled layer would be compiled anew for each of them."""

    prompt_k: Tensor  # (Q, K, P, d)
    prompt_v: Tensor
    own_k: Tensor  # (Q, R, K, width, d), a view: what is written to it stays in the GroupCache
    own_v: Tensor
    t: Tensor  # (1,)
    future: Tensor  # (width,): own slots that are not filled yet
    hidden: Tensor | None  # (Q, 1, 1, P): padding, if there is any

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """One new token for each of the Q * R rows: query (Q R, H, 1, d), key and value (Q R, K, 1, d).

        First to the prompt, whose keys all rows of a group share: one matrix product for all of them. Its result then
        stands beside the own words as if it were one more of them. As the score of a key counts with e^score in a softmax,
        the prompt counts with the sum of e^score of all its keys, the logarithm of which is its `mass`.
        """
        (Q, K, _, d), R = self.prompt_k.shape, self.own_k.shape[1]
        self.own_k.index_copy_(3, self.t, key.view(Q, R, K, 1, d))
        self.own_v.index_copy_(3, self.t, value.view(Q, R, K, 1, d))
        q = query.view(Q, R, K, -1, d)  # H = K * n query heads, n of them to one key head
        n = q.shape[3]
        prompt, mass = self.of_prompt(q.transpose(1, 2).reshape(Q, K, R * n, d), scaling)  # (Q, K, R n, d), (Q, K, R n)
        prompt, mass = (x.unflatten(2, (R, n)).transpose(1, 2) for x in (prompt, mass))  # (Q, R, K, n, d), (Q, R, K, n)
        to_own = float32_product(q * scaling, self.own_k).masked_fill_(self.future, float("-inf"))  # (Q, R, K, n, width)
        weights = torch.cat([to_own, mass.unsqueeze(-1)], dim=-1).softmax(-1).to(value.dtype)  # (Q, R, K, n, width + 1)
        out = weights[..., :-1] @ self.own_v + weights[..., -1:] * prompt  # (Q, R, K, n, d)
        return out.reshape(Q * R, K * n, 1, d)

    def of_prompt(self, rows: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
        """rows (Q, K, M, d) -> attention to the prompts (Q, K, M, d), and mass (Q, K, M) in float32."""
        if self.hidden is None and kernels.has_flash(rows):
            return kernels.flash_with_mass(rows, self.prompt_k, self.prompt_v, scaling)
        scores = float32_product(rows * scaling, self.prompt_k)  # (Q, K, M, P)
        if self.hidden is not None:
            scores = scores.masked_fill_(self.hidden, float("-inf"))
        weights = scores.softmax(-1)
        mass = scores.amax(-1) - weights.amax(-1).log()  # a weight is e^(score - mass), the largest as any other
        return weights.to(rows.dtype) @ self.prompt_v, mass


def float32_product(query: Tensor, key: Tensor) -> Tensor:
    """query (..., M, d) times key (..., N, d) transposed -> (..., M, N) in float32. A GPU adds up in float32 and would
    round to bfloat16 only to store the scores, of which a softmax needs the differences; CPUs have no such product."""
    if query.is_cuda and query.dtype == torch.bfloat16:
        q, k = query.flatten(0, -3), key.flatten(0, -3)
        return torch.bmm(q, k.transpose(1, 2), out_dtype=torch.float32).view(*query.shape[:-1], key.shape[-2])
    return (query @ key.transpose(-2, -1)).float()


def _grouped_attention(module, query, key, value, attention_mask, *, scaling, attend, **unused):
    """The function the library's decoder layers call: hands their heads to `attend`, what `of` of a class above gave."""
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast the rotation has made float32 of them
    return attend(query, key, value, scaling).transpose(1, 2).contiguous(), None  # (B, S, H, d)


ALL_ATTENTION_FUNCTIONS.register("grouped", _grouped_attention)

# --- sampling one token -----------------------------------------------------------------------------------------------


def sample_tokens(logps: Tensor, noise: Tensor, width: int = 512) -> Tensor:
    """Invert the cumulative distribution: logps (..., W) -> tokens (...), noise (...) uniform in [0, 1).

    One uniform number a token, drawn beforehand, is all the randomness there is: that makes a sample a function of its seed,
    whatever else is in the batch. float64, because a float32 sum over 150,000 entries is coarser than a rare token.

    In two levels: first the block of `width` entries in which the cumulative sum passes the noise, then the entry in it.
    A running sum over all of W is one long chain, which a GPU takes long for; sums of blocks are independent.
    """
    where = noise.device  # Apple's GPUs have no float64: there the noise, and with it this function, stays on the CPU
    p = F.pad(logps.to(where).double().exp(), (0, -logps.shape[-1] % width)).unflatten(-1, (-1, width))  # (..., blocks, width)
    above = p.sum(-1).cumsum(-1)  # (..., blocks)
    target = noise.unsqueeze(-1) * above[..., -1:]  # the sum is 1 up to rounding; scale instead of hoping
    block = torch.searchsorted(above, target, right=True)  # (..., 1): the first with more: never one of mass 0
    before = torch.where(block > 0, above.gather(-1, (block - 1).clamp(min=0)), 0.0)
    cdf = p.take_along_dim(block.unsqueeze(-1), -2).squeeze(-2).cumsum(-1)  # (..., width)
    # Two ways to add up round differently: a target past the block's end means its last entry of any mass.
    rest = torch.minimum(target - before, torch.nextafter(cdf[..., -1:], torch.zeros_like(target)))
    token = block * width + torch.searchsorted(cdf, rest, right=True)
    return token.squeeze(-1).to(logps.device)


@dataclass
class DecodeState:
    """What a decode step reads and writes, all of it in place. Q and R shrink when rows leave; `tokens` keeps them all."""

    cache: GroupCache
    temperature: float
    noise: Tensor  # (C, completions): one uniform number a token
    tokens: Tensor  # (completions, C): what was sampled; padding behind an end token
    logps: Tensor  # (completions, C): 0 there
    lengths: Tensor  # (completions,)
    rows: Tensor  # (Q, R): which completion each running row is
    token: Tensor  # (Q, R): its last token
    done: Tensor  # (Q, R) bool
    position: Tensor  # (Q,): of the first token behind the prompt
    eos: Tensor  # ids that end a completion


class TokenScores(NamedTuple):
    """What is known of each token of a group's completions."""

    logps: Tensor  # (G, C)
    entropies: Tensor | None = None  # (G, C), in nats, of the distribution that the token was sampled from; on request


def decoder_layer(layer, hidden: Tensor, rope: tuple[Tensor, Tensor], attend: Callable) -> Tensor:
    """hidden (B, S, D) -> (B, S, D) through one of the library's decoder layers."""
    out = layer(hidden, attention_mask=None, position_embeddings=rope, attend=attend)
    return out if isinstance(out, Tensor) else out[0]  # older releases return a tuple


# --- the model --------------------------------------------------------------------------------------------------------


class VideoLM:
    """One of CLASSES with its tokenizer. `pack_tokens` bounds how many tokens go through the layers in one pass."""

    def __init__(self, hf, tokenizer, source: str, pack_tokens: int = 16384):
        self.hf, self.tokenizer, self.source, self.pack_tokens = hf, tokenizer, source, pack_tokens
        self.own_files: dict[str, bytes] = {}  # what lay beside the weights, by name
        self.visual, self.text, self.lm_head = hf.model.visual, hf.model.language_model, hf.lm_head
        self.text.config._attn_implementation = "grouped"
        kernels.use_windows(self.visual)
        kernels.use_own_forwards(hf)
        config = hf.config
        self.video_token_id, self.image_token_id = config.video_token_id, config.image_token_id
        self.geometry = geometry_of(config.to_dict())
        # A sampled placeholder would later be taken for a piece of video: never sampled, never scored.
        self.banned_ids = sorted({config.image_token_id, config.video_token_id, config.vision_start_token_id,
                                  config.vision_end_token_id})
        self.eos_ids = sorted(end_token_ids(hf, tokenizer))
        self.device = next(hf.parameters()).device
        self.is_banned = torch.zeros(self.lm_head.out_features, dtype=torch.bool, device=self.device)
        self.is_banned[self.banned_ids] = True
        on_gpu = self.device.type == "cuda"
        # bfloat16 arithmetic over float32 weights on a GPU; the same in training and evaluation. What stays float32 (softmax,
        # rotary angles) must not become TF32, so torch.backends.cuda.matmul.allow_tf32 stays off: with 11 significant bits
        # positions over 2,048 would be rounded.
        self.autocast = torch.bfloat16 if on_gpu else None
        if on_gpu:
            # From torch 2.11 SDPA asks cuDNN first, which builds a plan for every new shape, some 30 ms; here every prompt
            # and group is a new shape.
            torch.backends.cuda.enable_cudnn_sdp(False)
        # A GPU reads all weights for a step, however few the rows, and each new shape is a new recording: there rows leave
        # when three quarters are done, and are looked at every eighth step, because asking whether they are done means
        # waiting. Elsewhere a row less is time saved at once.
        self.new_graph, self.look_every, self.retire_below, self.first_width = (
            (kernels.CudaGraph, 8, 0.25, 256) if on_gpu else (lambda: None, 1, 0.75, 64))
        self.sharding: Sharding | None = None  # set where the weights are dealt out over several GPUs
        self.compile_decoding = False  # --compile: one compiled decoder layer serves all layers of a decode step

    @classmethod
    def load(cls, name: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> "VideoLM":
        """A checkpoint folder or hub id. Raises ValueError, with its name, for any architecture but CLASSES, and for a
        folder whose files are broken or whose weights are not this model's."""
        hf_folder.check_folder(Path(name))
        try:
            config = AutoConfig.from_pretrained(name, trust_remote_code=False)  # never ask, never run it
        except OSError as error:
            raise ValueError(f"--model {name}: no such folder or hub id that could be loaded "
                             f"({str(error).splitlines()[0]})") from error
        hf_folder.check_type(name, config.model_type)
        hf = hf_folder.load_whole(CLASSES[config.model_type], name, dtype)
        model = cls(hf.to(device), AutoTokenizer.from_pretrained(name, trust_remote_code=False), name)
        # Now, because at the end of a run the folder may be gone, or be another model's.
        model.own_files = hf_folder.own_files(name)
        model.geometry = geometry_of(hf.config.to_dict(), json.loads(model.own_files.get("preprocessor_config.json", "{}")))
        return model

    def save(self, folder: str | Path, weights: dict[str, Tensor] | None = None, dtype: torch.dtype | None = None) -> None:
        """`weights` (by default `full_weights`), rounded to `dtype` if there is one, in Hugging Face layout, with the config,
        tokenizer, chat template and preprocessor of the checkpoint that this model was loaded from."""
        folder = Path(folder)
        weights = self.full_weights() if weights is None else weights
        weights = hf_folder.rounded(weights, dtype) if dtype else weights
        self.hf.save_pretrained(folder, state_dict=weights)  # with a config of the library's own form
        if not self.own_files:  # not loaded from anywhere
            self.tokenizer.save_pretrained(folder)
        for name, content in self.own_files.items():
            (folder / name).write_bytes(hf_folder.with_type_of(weights, content) if name == "config.json" else content)

    def full_weights(self) -> dict[str, Tensor]:
        """The weights by name, whole: with LoRA adapters folded in, or gathered from all ranks (then {} on all but one)."""
        return self.sharding.full_weights() if self.sharding else lora.merged_state(self.hf)

    def gathered(self):
        """A context without gradients in which a sharded model has all weights in one place."""
        return self.sharding.gathered() if self.sharding else nullcontext()

    def checkpoint_activations(self) -> None:
        """From now on layers are computed again backward, and keep nothing but their input until then."""
        # The second name is that of older versions of the library.
        enable = getattr(self.hf, "activation_checkpointing_enable", None) or self.hf.gradient_checkpointing_enable
        enable({"use_reentrant": False})

    def as_reference(self):
        """A context in which this model is what GRPO is held to: with LoRA, the frozen model without its adapters."""
        return lora.adapters_off(self.hf)

    @property
    def vision_is_frozen(self) -> bool:
        """Then a video's embeddings are the same in sampling, policy and reference, and are made once."""
        return not any(p.requires_grad for p in self.visual.parameters())

    def pack(self, lengths: list[int]) -> list[list[int]]:
        """Consecutive indices, in packs of at most `pack_tokens` tokens (one at least): what shares a pass."""
        packs: list[list[int]] = []
        room = 0
        for i, length in enumerate(lengths):
            if not packs or length > room:
                packs.append([])
                room = self.pack_tokens
            packs[-1].append(i)
            room -= length
        return packs

    # --- prompt to embeddings ---

    def encode_video(self, patches: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """patches (N, 1176), grid (t, h, w) in patches -> (V, D), V = N / 4: 2 x 2 patches are merged into one token.
        With deepstack (V, (1 + n) D)."""
        return self.encode_videos([patches], [grid])[0]

    def encode_videos(self, patches: list[Tensor], grids: list[Grid | list[Grid]]) -> list[Tensor]:
        """Several videos in one pass of the vision tower; they do not see each other. -> one (V, D) each. A list of grids
        stands for the pictures of one sample, whose patches follow each other; they do not see each other either."""
        self.hf.train(torch.is_grad_enabled())  # gradient checkpointing of the library's layers looks at this flag
        sizes = [len(rows) // 4 for rows in patches]
        grid = torch.tensor([one for grid in grids for one in grids_of(grid)], device=self.device)  # (videos and pictures, 3)
        with self._compute():
            row = torch.cat(patches).to(self.device, self.visual.dtype)  # (N, 1176)
            out = self.visual(row, grid_thw=grid, attend=kernels.WindowAttention())
        merged = getattr(out, "pooler_output", out)  # older releases return the tensor itself
        merged = torch.cat([merged, *getattr(out, "deepstack_features", [])], dim=-1)
        return list(merged.split(sizes))

    def encode_prompts(self, prompts: list[Prompt]) -> list[Tensor | None]:
        """The embeddings (V, D) of each prompt's video or pictures, None where it has none, as many a pass as fit."""
        seen = [i for i, prompt in enumerate(prompts) if prompt.patches is not None]
        videos: list[Tensor | None] = [None] * len(prompts)
        for pack in self.pack([len(prompts[i].patches) // 4 for i in seen]):
            pack = [seen[i] for i in pack]
            encoded = self.encode_videos([prompts[i].patches for i in pack], [prompts[i].grid for i in pack])
            for i, video in zip(pack, encoded):
                videos[i] = video
        return videos

    def embed(self, prompt: Tensor, video: Tensor | None) -> Tensor:
        """prompt (P,) token ids, video (V, D) or None -> (1, P, D): the video's rows replace those of its placeholders."""
        return self.embed_groups([prompt], [video], [])[0][0]

    def embed_groups(self, prompts: list[Tensor], videos: list[Tensor | None],
                     tokens: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Prompts (P,) with their videos, and completions (G, C) -> (1, P, D) and (G, C - 1, D) of each.

        The last token of a completion predicts nothing that is needed. All are looked up at once: each look-up has a
        gradient of the size of the whole matrix, 1.2 GB at 3B.
        """
        fed = [t[:, :-1] for t in tokens]
        ids = [x.flatten().to(self.device) for x in (*prompts, *fed)]
        rows = self._look_up(torch.cat(ids)).split([len(x) for x in ids])
        embeds = [self._put_in(video, prompt, row) for video, prompt, row in zip(videos, ids, rows)]
        return embeds, [row.view(*t.shape, row.shape[-1]) for t, row in zip(fed, rows[len(prompts):])]

    def _put_in(self, video: Tensor | None, prompt: Tensor, row: Tensor) -> Tensor:
        """video (V, D) into the embedded prompt, row (P, D) -> (1, P, D)."""
        where = (prompt == self.video_token_id) | (prompt == self.image_token_id)  # (P,)
        num_rows = 0 if video is None else len(video)
        if int(where.sum()) != num_rows:
            raise ValueError(f"the prompt has {int(where.sum())} video placeholders, the video {num_rows} tokens")
        if video is not None:
            if video.shape[-1] > row.shape[-1]:  # deepstack, to which text adds nothing
                row = F.pad(row, (0, video.shape[-1] - row.shape[-1]))
            row = row.masked_scatter(where[:, None], video.to(row.dtype))
        return row.unsqueeze(0)

    def _look_up(self, ids: Tensor) -> Tensor:
        """ids (...) -> embeddings (..., D) in float32. What is added up from layer to layer takes its type from here: the
        same in a float32 policy and its bfloat16 reference, or they would differ before the first step."""
        return self.text.embed_tokens(ids).float()

    # --- sampling ---

    @torch.no_grad()
    def generate(self, embeds: list[Tensor], positions: list[Tensor], *, group_size: int, max_new_tokens: int,
                 temperature: float, seeds: list[int]) -> list[tuple[Tensor, Tensor]]:
        """Sample `group_size` completions of each question, all questions together.

        embeds: (1, P, D) a question; positions: (3, P) a question; temperature 0 is greedy; seeds: one a question.
        Returns (tokens (G, C), logps (G, C)) a question, C the longest completion of that question, end token included;
        behind an end token stand pad tokens with log-probability 0. Noise depends on a question's seed alone.
        """
        self.hf.eval()
        cache = GroupCache(len(self.text.layers), [p.shape[1] for p in positions], group_size, max_new_tokens,
                           self.first_width)
        # Autocast keeps its bfloat16 copies of the weights until its outermost context ends: here they are made once, in a
        # context around each step they would be made for every token.
        with self._compute(), kernels.rounded_weights(self.text.layers, self.autocast if self.compile_decoding else None):
            last = self._prefill(embeds, positions, cache)  # (Q, D): the hidden state that predicts the first token
            state = self._begin(positions, group_size, max_new_tokens, temperature, seeds, cache)
            self._sample(state, last[:, None].expand(-1, group_size, -1))
            stepper = kernels.Stepper(lambda: self.decode_step(state), self.new_graph())
            for c in range(1, max_new_tokens):
                if c % self.look_every == 0:
                    if bool(state.done.all()):
                        break
                    self._retire(state)
                cache.widen(c)
                stepper((*state.rows.shape, cache.width))
        shape = (len(seeds), group_size)
        tokens, logps, lengths = (x.unflatten(0, shape) for x in (state.tokens, state.logps, state.lengths))
        return [(tokens[q, :, :n], logps[q, :, :n]) for q, n in enumerate(lengths.amax(1).tolist())]

    def _begin(self, positions: list[Tensor], G: int, C: int, temperature: float, seeds: list[int],
               cache: GroupCache) -> DecodeState:
        """The state before the first token: nothing sampled, nothing done, the noise drawn."""
        Q, device = len(seeds), self.device
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        noise = torch.stack([torch.rand(C, G, dtype=torch.float64, generator=generator) for generator in generators], dim=1)
        return DecodeState(
            cache, temperature, noise.flatten(1).to("cpu" if device.type == "mps" else device),  # (C, Q G)
            tokens=torch.full((Q * G, C), self.tokenizer.pad_token_id, device=device),
            logps=torch.zeros(Q * G, C, device=device),
            lengths=torch.zeros(Q * G, dtype=torch.long, device=device),
            rows=torch.arange(Q * G, device=device).view(Q, G),
            token=torch.zeros(Q, G, dtype=torch.long, device=device),
            done=torch.zeros(Q, G, dtype=torch.bool, device=device),
            position=torch.stack([p.max() + 1 for p in positions]).to(device),
            eos=torch.tensor(self.eos_ids, device=device))

    def _prefill(self, embeds: list[Tensor], positions: list[Tensor], cache: GroupCache) -> Tensor:
        """Every prompt once; their keys and values go to the cache. -> (Q, D)."""
        last = []
        for pack in self.pack([e.shape[1] for e in embeds]):
            spans = [(embeds[i].shape[1], 0, 0) for i in pack]
            row = cat_rows([embeds[i] for i in pack])  # (1, L, D)
            hidden = self._layers(row, torch.cat([positions[i] for i in pack], dim=1), PackedAttention(spans, cache).of)
            ends = torch.tensor([P for P, _, _ in spans], device=self.device).cumsum(0) - 1
            last.append(hidden[0, ends])
        cache.seal()
        return torch.cat(last)

    def decode_step(self, state: DecodeState) -> None:
        """One token further, for all rows: feed the last one, sample the next. No shape, address or branch in here depends
        on how far the completions are, and nothing waits for the device: that is what lets a CUDA graph record it."""
        Q, R = state.rows.shape
        state.cache.begin_step()
        embeds = self._look_up(state.token.view(Q * R, 1))  # (Q R, 1, D)
        position = (state.position + state.cache.t)[:, None].expand(Q, R)
        position = position.reshape(1, Q * R, 1).expand(3, -1, -1)  # text: the same on all three axes
        run_layer = kernels.compiled(decoder_layer) if self.compile_decoding else decoder_layer
        hidden = self._layers(embeds, position, state.cache.of, run_layer)
        state.cache.t += 1
        self._sample(state, hidden.view(Q, R, -1))

    def _sample(self, state: DecodeState, hidden: Tensor) -> None:
        """hidden (Q, R, D) -> the next token of each row, to where it belongs; rows that are done write padding."""
        distribution = self._log_softmax(hidden, state.temperature or 1.0)  # (Q, R, W)
        t, rows, where = state.cache.t, state.rows.flatten(), state.noise.device
        u = state.noise[t.to(where), rows.to(where)].view(state.rows.shape)
        token = distribution.argmax(-1) if state.temperature == 0 else sample_tokens(distribution, u)  # (Q, R)
        logp = distribution.gather(-1, token[..., None]).squeeze(-1)
        state.tokens[rows, t] = token.masked_fill(state.done, self.tokenizer.pad_token_id).flatten()
        state.logps[rows, t] = logp.masked_fill(state.done, 0.0).flatten()
        state.lengths[rows] += (~state.done).flatten()
        state.token.copy_(token)
        state.done |= (token[..., None] == state.eos).any(-1)

    def _retire(self, state: DecodeState) -> None:
        """Drop questions that are finished, and rows once every question has some to spare; copies only when it pays."""
        left = (~state.done).sum(1)  # (Q,)
        questions, R = torch.nonzero(left).squeeze(1), int(left.max())
        if len(questions) * R > self.retire_below * state.rows.numel():
            return
        order = state.done[questions].long().argsort(dim=1, stable=True)[:, :R]  # running rows first; finished ones fill up
        state.cache.keep(questions, order)
        pick = (questions[:, None], order)
        state.rows, state.done, state.token = state.rows[pick], state.done[pick], state.token[pick]
        state.position = state.position[questions]

    # --- scoring ---

    def logprobs(self, embeds: Tensor, positions: Tensor, tokens: Tensor, temperature: float,
                 share_prefix: bool = True) -> Tensor:
        """log p(tokens) of one question: embeds (1, P, D), positions (3, P), tokens (G, C) -> (G, C), differentiable.

        `share_prefix=False` repeats the prompt for every completion, as other code does: same numbers, G times the work.
        """
        return self.logprobs_packed([embeds], [positions], [tokens], temperature, share_prefix)[0].logps

    def logprobs_packed(self, embeds: list[Tensor], positions: list[Tensor], tokens: list[Tensor], temperature: float,
                        share_prefix: bool = True, with_entropy: bool = False,
                        fed: list[Tensor] | None = None) -> list[TokenScores]:
        """The same for several questions in one pass.

        `with_entropy`: entropies too, differentiable. They cost further passes over the logits, so only on request.
        `fed`: the completions' embeddings where `embed_groups` has looked them up already.
        """
        fed = self.embed_groups([], [], tokens)[1] if fed is None else fed  # (G, C - 1, D) each
        if not share_prefix:
            return [self._logprobs_repeated(e, f, p, t, temperature, with_entropy)
                    for e, f, p, t in zip(embeds, fed, positions, tokens)]

        self.hf.train(torch.is_grad_enabled())  # gradient checkpointing of the library's layers looks at this flag
        spans, row, where = [], [], []
        for e, f, p in zip(embeds, fed, positions):
            G, own = f.shape[:2]
            row += [e, f.reshape(1, G * own, f.shape[-1])]
            after = p.max() + 1 + torch.arange(own, device=p.device)  # (C - 1,): a completion counts on from its prompt
            where += [p.to(self.device), after.repeat(G).expand(3, -1).to(self.device)]
            spans.append((e.shape[1], G, own))
        hidden = self._layers(cat_rows(row), torch.cat(where, dim=1), PackedAttention(spans).of)  # (1, L, D)
        out = []
        for (P, G, own), h, t in zip(spans, hidden[0].split([P + G * own for P, G, own in spans]), tokens):
            first = h[P - 1].expand(G, 1, -1)  # the prompt's last position predicts the first token of all G
            states = torch.cat([first, h[P:].view(G, own, h.shape[-1])], dim=1)  # (G, C, D)
            out.append(self._score_tokens(states, t.to(self.device), temperature, with_entropy))
        return out

    def _logprobs_repeated(self, embeds: Tensor, fed: Tensor, positions: Tensor, tokens: Tensor, temperature: float,
                           with_entropy: bool = False) -> TokenScores:
        """The textbook way, to compare with: G rows of prompt and completion, plain causal attention."""
        self.hf.train(torch.is_grad_enabled())
        (G, C), P = tokens.shape, embeds.shape[1]
        own = positions.max() + 1 + torch.arange(C - 1, device=positions.device)
        where = torch.cat([positions, own.expand(3, -1)], dim=1)[:, None].expand(-1, G, -1)  # (3, G, P + C - 1)
        row = cat_rows([embeds.expand(G, -1, -1), fed])  # (G, P + C - 1, D)
        hidden = self._layers(row, where, lambda layer: causal_attention)
        return self._score_tokens(hidden[:, P - 1:], tokens.to(self.device), temperature, with_entropy)

    def _score_tokens(self, states: Tensor, tokens: Tensor, temperature: float, with_entropy: bool = False,
                      rows: int = 4096) -> TokenScores:
        """states (G, C, D), tokens (G, C): the hidden states that predict them. Logits exist for `rows` tokens at a time and
        are recomputed backward: 8 completions of 1,024 tokens over 152,000 words would be 5 GB in float32."""

        def piece(h: Tensor, t: Tensor) -> tuple[Tensor, ...]:
            distribution = self._log_softmax(h, temperature)  # (rows, W)
            logps = distribution.gather(-1, t[:, None]).squeeze(-1)  # (rows,)
            return (logps, self._entropy(distribution)) if with_entropy else (logps,)

        if tokens.numel() <= rows:  # small: keep the logits
            pieces = [piece(states.flatten(0, 1), tokens.flatten())]
        else:
            pieces = [checkpoint(piece, h, t, use_reentrant=False)
                      for h, t in zip(states.flatten(0, 1).split(rows), tokens.flatten().split(rows))]
        return TokenScores(*(torch.cat(x).view(tokens.shape) for x in zip(*pieces)))

    # --- shared by sampling and scoring: the same layers, the same softmax ---

    def _layers(self, hidden: Tensor, positions: Tensor, attention_of: Callable[[int], Callable],
                run_layer: Callable | None = None) -> Tensor:
        """hidden (B, S, D) or (B, S, (1 + n) D), positions (3, S) or (3, B, S) -> (B, S, D). `attention_of` a layer's number:
        its attention."""
        run_layer = run_layer or decoder_layer
        D = self.text.config.hidden_size
        hidden, *deeper = hidden.split(D, dim=-1) if hidden.shape[-1] > D else (hidden,)
        positions = positions.to(self.device)
        positions = positions if positions.dim() == 3 else positions.unsqueeze(1)
        with self._compute():
            rope = self.text.rotary_emb(hidden, positions)  # cos, sin: (B, S, d)
            for i, layer in enumerate(self.text.layers):
                hidden = run_layer(layer, hidden, rope, attention_of(i))
                hidden = hidden + deeper[i] if i < len(deeper) else hidden
            return self.text.norm(hidden)

    def _log_softmax(self, hidden: Tensor, temperature: float) -> Tensor:
        """hidden (..., D) -> log-probabilities (..., W) in float32, at the temperature, without the banned ids."""
        with self._compute():
            logits = self.lm_head(hidden)
        logits = logits.float() / temperature
        return logits.masked_fill(self.is_banned, float("-inf")).log_softmax(-1)

    def _entropy(self, distribution: Tensor) -> Tensor:
        """log-probabilities (..., W) -> entropies (...) in nats. A banned token has p log p = 0 * -inf, which is nan in
        arithmetic and 0 in the limit."""
        return -(distribution.exp() * distribution.masked_fill(self.is_banned, 0.0)).sum(-1)

    def _compute(self):
        """Where bfloat16 is computed in. While sampling, each weight's bfloat16 copy is made once and kept (which torch does
        for weights that require a gradient: do not freeze a float32 model before `generate`). With gradients nothing is
        kept: the copies of all weights would be 14 GB at 7B, and each is needed once."""
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, self.autocast, cache_enabled=not torch.is_grad_enabled())


def cat_rows(rows: list[Tensor]) -> Tensor:
    """Rows (B, S, D) or (B, S, (1 + n) D) one behind the other, the narrower ones with zeros for deepstack."""
    width = max(row.shape[-1] for row in rows)
    return torch.cat([F.pad(row, (0, width - row.shape[-1])) if row.shape[-1] < width else row for row in rows], dim=1)


def end_token_ids(hf, tokenizer) -> set[int]:
    """Whatever ends a completion: the tokenizer's end token and those of the checkpoint's generation config."""
    ids = hf.generation_config.eos_token_id
    ids = ids if isinstance(ids, (list, tuple)) else [ids]
    return {int(i) for i in (*ids, tokenizer.eos_token_id) if i is not None}
