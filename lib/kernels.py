"""Faster, same numbers: what the model computes in another way than the library would. A first reader may skip it.

    WindowAttention           the vision tower's many short rows of attention, as a few batches
    use_own_forwards          its patch embedding as a matrix product, its MLP of a padded width, norms as one operation
    flash_with_mass           attention of many rows to the few heads of one long prompt
    CudaGraph, Stepper        a decode step recorded once and replayed
    compiled, rounded_weights one decoder layer compiled by torch.compile (--compile)

Shapes: N patches or keys, M queries, Q questions, H heads, K key/value heads, d head size, D hidden size.
"""

import copy
import functools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lib.lora import LoRALinear

try:  # only where a CUDA compiler could build it
    from flash_attn import flash_attn_varlen_func
except ImportError:
    flash_attn_varlen_func = None

# --- attention of the vision tower: many short rows -------------------------------------------------------------------


class WindowAttention:
    """One pass of the vision tower, N patches of all its videos in one row, cut into segments that see only themselves:
    windows of at most 8 x 8 patches in most blocks, the h w patches of two frames in the others (Qwen3-VL: in all).

    The library calls SDPA once a segment, hundreds of times a block for one video. Segments of equal length, of
    whatever video, are a batch here: videos of one size have at most four lengths of windows, and one of whole frames.
    """

    def __init__(self):
        self.known: list[tuple] = []  # (boundaries, order, its inverse, groups), one for each kind of block

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, bounds: Tensor,
                 longest: int) -> Tensor:
        """query, key, value (1, H, N, d); bounds (segments + 1,) int32, 0 first, N last -> (1, N, H, d)."""
        rows = [x[0].transpose(0, 1) for x in (query, key, value)]  # (N, H, d) each
        if flash_attn_varlen_func is not None and query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
            return flash_attn_varlen_func(*rows, bounds, bounds, longest, longest, softmax_scale=scaling)[None]
        order, inverse, groups = self._plan(bounds)
        if order is not None:
            rows = [x.index_select(0, order) for x in rows]
        outputs, sizes = [], [many * length for many, length in groups]
        for group, *parts in zip(groups, *(x.split(sizes) for x in rows)):
            q, k, v = (x.unflatten(0, group).transpose(1, 2) for x in parts)  # (segments, H, length, d)
            out = F.scaled_dot_product_attention(q, k, v, scale=scaling)
            outputs.append(out.transpose(1, 2).flatten(0, 1))  # (segments length, H, d)
        out = torch.cat(outputs)  # (N, H, d)
        return (out if order is None else out.index_select(0, inverse))[None]

    def _plan(self, bounds: Tensor) -> tuple[Tensor | None, Tensor | None, list[tuple[int, int]]]:
        """The order that puts segments of equal length side by side (None: they are), and (segments, length) of each
        group. Made at the first block of a kind: each time the lengths come to the CPU, a GPU has to be waited for."""
        for seen, *plan in self.known:
            if seen is bounds:
                return tuple(plan)
        lengths = bounds.diff().long()  # (segments,)
        values, counts = lengths.unique(return_counts=True)
        groups = list(zip(counts.tolist(), values.tolist()))
        order = inverse = None
        if len(groups) > 1:
            order = lengths.repeat_interleave(lengths).argsort(stable=True)  # (N,): patches by length of segment
            inverse = order.argsort()
        self.known.append((bounds, order, inverse, groups))
        return order, inverse, groups


def _windowed_attention(module, query, key, value, attention_mask, *, scaling, attend, cu_seq_lens_q, max_length_q,
                        **unused):
    """The function the library's vision blocks call."""
    query, key = query.to(value.dtype), key.to(value.dtype)
    return attend(query, key, value, scaling, cu_seq_lens_q, max_length_q), None


# To a name with "flash" in it the library hands over the whole row and its boundaries, to others a segment at a time.
WINDOWED = "windowed_like_flash"
ALL_ATTENTION_FUNCTIONS.register(WINDOWED, _windowed_attention)


def use_windows(tower) -> None:
    """In a config of the tower's own: a model that is built from the checkpoint's would look for flash attention."""
    config = copy.deepcopy(tower.config)
    config._attn_implementation = WINDOWED
    for module in tower.modules():
        if hasattr(module, "config"):
            module.config = config


# --- three of the library's modules, the same numbers at less cost -------------------------------------------------------


def _patch_embedding(self, patches: Tensor) -> Tensor:
    """patches (N, 1176 or 1536) -> (N, D of the tower). The library has a convolution whose kernel is as large as its stride, so
    each output sees one patch: a matrix product, and cuDNN's three-dimensional convolutions are slow in bfloat16."""
    weight = self.proj.weight  # (D, 3, 2, 14, 14), or 16 for 14
    return F.linear(patches.to(weight.dtype), weight.flatten(1), self.proj.bias)


ALIGNED = 8  # numbers of 2 bytes: rows that begin at multiples of 16 bytes, which fast matrix products need


def _padded_mlp(self, hidden: Tensor) -> Tensor:
    """hidden (N, D) -> (N, D). Qwen2.5-VL's tower is 3,420 wide inside, 4 numbers short of a multiple of 8. As many columns of zeros
    change no number: they come out as silu(0) 0 = 0, and are multiplied by 0."""
    pad = -self.gate_proj.out_features % ALIGNED
    gate, up = (F.linear(hidden, F.pad(layer.weight, (0, 0, 0, pad)), F.pad(layer.bias, (0, pad)))
                for layer in (self.gate_proj, self.up_proj))  # (N, width + pad)
    return F.linear(self.act_fn(gate) * up, F.pad(self.down_proj.weight, (0, pad)), self.down_proj.bias)


def _rms_norm(self, hidden: Tensor) -> Tensor:
    """hidden (..., D) -> (..., D): one kernel where the library starts six, and this is called 2 or 3 times a layer."""
    return F.rms_norm(hidden, self.weight.shape, self.weight.to(hidden.dtype), self.variance_epsilon).to(hidden.dtype)


def use_own_forwards(hf) -> None:
    """As bound methods, not lambdas: in a deep copy of the model they belong to the copy."""
    hf.model.visual.patch_embed.forward = types.MethodType(_patch_embedding, hf.model.visual.patch_embed)
    for module in hf.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = types.MethodType(_rms_norm, module)
    for block in hf.model.visual.blocks:
        if hasattr(block.mlp, "gate_proj") and block.mlp.gate_proj.out_features % ALIGNED:
            block.mlp.forward = types.MethodType(_padded_mlp, block.mlp)


# --- attention of many rows to few heads of a long prompt ----------------------------------------------------------------


def has_flash(query: Tensor) -> bool:
    return query.is_cuda and query.dtype == torch.bfloat16 and query.shape[-1] % 8 == 0 and query.shape[-1] <= 256


def flash_with_mass(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """query (Q, K, M, d), key and value (Q, K, N, d) -> attention (Q, K, M, d), and (Q, K, M): the logarithm of the sum of
    e^score, which SDPA's public function keeps to itself. Flash attention cuts N into parts, so that few heads fill a GPU.
    It knows no mask of padding."""
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, scale=scaling)[:2]


# --- one decode step as one launch ------------------------------------------------------------------------------------


@functools.cache
def _graph_stream() -> torch.cuda.Stream:
    """One for the process: cuBLAS keeps a workspace of 32 MB for every stream that it has seen."""
    return torch.cuda.Stream()


class CudaGraph:
    """A step recorded once and replayed by one launch: started one by one from Python, the small kernels of a token keep
    a GPU waiting many times longer than they keep it busy.

    The recording refers to memory, not to values: all that it reads must outlive it, the bfloat16 copies of the weights
    that autocast keeps among it. They exist since the prefill and go when `generate` leaves its context, after the graph.
    """

    def __init__(self):
        self.stream, self.graph = _graph_stream(), None

    def warm_up(self, step: Callable[[], None]) -> None:
        """An ordinary step, on the stream that will record: libraries set up there what must not be recorded."""
        self.graph = None  # frees the memory of the last recording
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            step()
        torch.cuda.current_stream().wait_stream(self.stream)

    def record(self, step: Callable[[], None]) -> None:
        """Nothing is computed: the kernels of `step` are written down. Other threads may go on using the GPU."""
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
            step()

    def replay(self) -> None:
        self.graph.replay()


class Stepper:
    """Does `step` once a call, recorded where there is a graph: the first step of a shape is an ordinary one, the second
    is recorded, and from then on the recording runs until the shape changes, because rows left or completions grew."""

    def __init__(self, step: Callable[[], None], graph: CudaGraph | None):
        self.step, self.graph, self.shape, self.is_recorded = step, graph, None, False

    def __call__(self, shape: tuple) -> None:
        if self.graph is None:
            self.step()
        elif shape != self.shape:
            self.shape, self.is_recorded = shape, False
            self.graph.warm_up(self.step)
        else:
            if not self.is_recorded:
                self.graph.record(self.step)
                self.is_recorded = True
            self.graph.replay()


# --- one decoder layer, compiled --------------------------------------------------------------------------------------


@functools.cache
def compiled(layer: Callable, backend: str = "inductor") -> Callable:
    """`layer` (model.decoder_layer) compiled by torch.compile: neighbouring small operations become one kernel. Weights and
    caches are its arguments and no layer knows its number, so it is compiled once for all layers, and again when shapes
    change."""
    return torch.compile(layer, backend=backend, dynamic=True)


@contextmanager
def rounded_weights(layers, dtype: torch.dtype | None) -> Iterator[None]:
    """The matrices of `layers` in `dtype`, for as long as this lasts. A compiled layer knows nothing of autocast's copies:
    it would read the float32 weights and round them for every token. None: no change."""
    matrices = [p for module in layers.modules() if isinstance(module, (torch.nn.Linear, LoRALinear))
                for p in (module.weight, module.bias) if p is not None and dtype]
    whole = [p.data for p in matrices]
    for p in matrices:
        p.data = p.data.to(dtype)
    try:
        yield
    finally:
        for p, data in zip(matrices, whole):
            p.data = data
