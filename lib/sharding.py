"""A model dealt out over the processes: FSDP2 (PyTorch's `fully_shard`), for what one GPU cannot hold.

Every process has 1/N of the weights, gradients and optimiser state. A layer is gathered just before it is used and
forgotten behind it; its gradient is summed and dealt out as the backward pass leaves it. While sampling, all is gathered.

Inside a sharded model every pass is a chain of collective calls, so all ranks must make equally many passes through the
same parts: `equalise_passes` adds passes of weight zero.

Left out on purpose: replicas of sharded groups (one mesh spans all ranks).
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.utils._pytree import tree_map_only

from data import Prompt
from lib.distributed import World, join

BYTES_A_PARAMETER = 18  # float32 weight 4, gradient 4, AdamW 8; bfloat16 reference 2


def worth_sharding(choice: str, offload: bool, world: World, num_parameters: int, memory: float | None = None) -> bool:
    """What `--shard` on, off or auto means here; auto never shards on one GPU, where it saves nothing, or on CPUs.

    `memory`: bytes of one GPU; None asks the one that is here. tools/plan.py knows none and says what it plans for."""
    if choice != "auto" or offload:
        return choice == "on" or offload
    if world.size == 1 or world.device.type != "cuda":
        return False
    if memory is None:
        memory = torch.cuda.get_device_properties(world.device).total_memory
    return BYTES_A_PARAMETER * num_parameters > memory / 2  # the other half is for activations and keys and values


def forget_passes(hf) -> None:
    """FSDP as if no forward pass had been. Before torch 2.13, which has a name for it, that takes two private lists."""
    if hasattr(hf, "reset_iter_state"):
        return hf.reset_iter_state()
    for part in [part for part in hf.modules() if isinstance(part, FSDPModule)]:
        part.reshard()
        if group := part._get_fsdp_state()._fsdp_param_group:
            group._post_forward_indices.clear()
            group.comm_ctx.post_forward_order.clear()


class Sharding:
    """What a sharded model (model.VideoLM) can do that a replicated one need not; it is the model's `sharding`.

    Decoder layers and vision blocks are gathered one at a time. What lies between them (embeddings, head, norms,
    merger) is called outside any forward method that FSDP knows; so `hf.inside(work)` is made one, which gathers those,
    runs `work`, and sees to their gradients. Weights are float32; on a GPU, what is gathered is bfloat16. Every rank
    has loaded the whole checkpoint and keeps its part of it. `offload`: on its CPU, with the optimiser.
    """

    def __init__(self, world: World, model, *, offload: bool = False):
        if world.device.type == "mps":
            raise ValueError("--shard on: FSDP has no Apple GPUs; use --device cpu, or --shard off")
        if not dist.is_initialized():  # one process, for the sake of `offload`
            join(world.device.type, dist.HashStore(), 0, 1, timedelta(minutes=60))
        self.world, self.hf, on_gpu = world, model.hf, world.device.type == "cuda"
        self.placeholder, self.end = model.video_token_id, model.tokenizer.eos_token_id
        self.patch_width = 3 * 2 * model.geometry.patch**2
        settings = {"mesh": init_device_mesh(world.device.type, (world.size,))}
        if on_gpu:
            settings["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        if offload:
            settings["offload_policy"] = CPUOffloadPolicy(pin_memory=on_gpu)
        for part in (*model.visual.blocks, *model.text.layers, self.hf):
            fully_shard(part, **settings)
            # a sum, not a mean: the loss has the denominator of all ranks; gloo knows no other sum than the plain one
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)
        # FSDP hangs its work on the tensors that are returned: views would lose it
        self.hf.inside = lambda work: tree_map_only(Tensor, Tensor.clone, work())
        register_fsdp_forward_method(self.hf, "inside")
        with torch.no_grad():
            self.inside(list)  # no pass at all; FSDP takes the first module that runs for the root of all

    def inside(self, work: Callable[[], list]) -> list:
        """Run `work`, a forward pass in training, with what lies between the layers gathered."""
        out = self.hf.inside(work)
        if not torch.is_grad_enabled():
            # FSDP notes the order of layers for a backward pass; without one the notes pile up, and the root stays gathered
            forget_passes(self.hf)
        return out

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """All weights in one place for as long as this lasts: one gathering for a whole rollout, not one for each token.

        Inside, the model makes no collective call, so ranks may run as many passes as they like. Without gradients only:
        what an optimiser knows are the shards.
        """
        parts = [part for part in self.hf.modules() if isinstance(part, FSDPModule)]
        hooks = [(part._forward_pre_hooks, part._forward_hooks) for part in parts]
        for part in parts:
            part.unshard()
            # FSDP's hooks would find nothing to do, for every layer and token; and they note each call as one that a
            # backward pass will follow, and would prefetch by these notes, on each rank by its own: a hang
            part._forward_pre_hooks, part._forward_hooks = OrderedDict(), OrderedDict()
        try:
            yield
        finally:
            for part, (before, behind) in zip(parts, hooks):
                part._forward_pre_hooks, part._forward_hooks = before, behind
                part.reshard()

    def equalise_passes(self, packs: list[list], idle: Callable[[Prompt], object]) -> list[list]:
        """As many packs on every rank, and work for the vision tower in each if any rank has some: the same calls on all.

        `packs`: lists of grpo.Group, each list one pass through the model. `idle` makes one of weight zero of a prompt.
        """
        needs_tower = any(group.needs_tower for pack in packs for group in pack)
        passes, needs_tower = self.world.all_reduce_max(len(packs), needs_tower)
        packs = [[*pack] for pack in packs] + [[] for _ in range(int(passes) - len(packs))]
        for pack in packs:
            if not pack or (needs_tower and not any(group.needs_tower for group in pack)):
                pack.append(idle(self.idle_prompt(bool(needs_tower))))
        return packs

    def idle_prompt(self, video: bool) -> Prompt:
        """The shortest prompt there is: one token, which with `video` stands for a black frame of four patches."""
        ids = torch.tensor([self.placeholder if video else self.end])
        patches, grid = (torch.zeros(4, self.patch_width), (1, 2, 2)) if video else (None, None)
        return Prompt({"id": "idle"}, ids, patches, grid, torch.zeros(3, 1, dtype=torch.long))

    def full_weights(self) -> dict[str, Tensor]:
        """The weights by name, whole, on the first rank's CPU; {} on the others."""
        weights = {}
        for name, p in self.hf.named_parameters():  # one at a time: no GPU needs room for all of them
            whole = p.detach().to(self.world.device).full_tensor()  # offloaded shards meet where the others are
            if self.world.is_first:
                weights[name] = whole.cpu()
        return weights
