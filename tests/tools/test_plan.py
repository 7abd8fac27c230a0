"""A prediction is worth what its counts are: each is held against what torch, the reader and the library really do."""

import dataclasses
import functools
import json
import math

import pytest
import torch
import torch.distributed as dist
from conftest import ALONE, ROOT, TEXTS
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2_5_VLForConditionalGeneration
from video_files import pictures, read_sample, write_video

import data
import train
from lib import lora, toy
from lib.checkpoints import save_checkpoint, training_state
from lib.distributed import World
from lib.run import KEEP_CHECKPOINTS
from lib.sharding import Sharding
from model import CLASSES, GroupCache, VideoLM
from tools import plan

# --- the model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, parameters, vision", [("3b", 3_754_622_976, 668_684_288),
                                                      ("7b", 8_292_166_656, 676_550_144)])
def test_published_sizes_are_counted_to_the_last_parameter(name, parameters, vision):
    """Twice these numbers is the size of the published checkpoints in bfloat16. A head that is tied and counted twice
    would be off by 8 %."""
    model = plan.count(plan.load_shape(name))
    assert (model.parameters, model.vision) == (parameters, vision)
    assert model.layers < model.parameters - model.vision and model.blocks + model.merger < model.vision


def test_a_folder_is_counted_like_the_model_that_is_loaded_from_it(model, model_folder):
    counted = plan.count(plan.load_shape(str(model_folder)))
    assert counted.parameters == sum(p.numel() for p in model.hf.parameters())
    assert counted.vision == sum(p.numel() for p in model.visual.parameters())
    with pytest.raises(ValueError, match="9b.*3b.*config.json"):
        plan.load_shape("9b")


# --- the video --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size, sample", [((320, 240), {"task": "grounding"}), ((640, 96), {"task": "tracking"}),
                                          ((64, 48), {"task": "qa"})])
def test_video_tokens_are_those_of_the_file_as_training_reads_it(tmp_path, size, sample):
    """A second formula for frames and sizes would agree until the budget or the least size of a frame matters."""
    write_video(tmp_path / "a.mp4", pictures(45, *size), fps=30)
    settings = data.VideoSettings(total_pixels=200_000)
    clip = read_sample({"id": "a", "video": str(tmp_path / "a.mp4"), **sample}, settings)
    grid = data.patchify(clip.frames)[1]
    job = plan.Job(seconds=1.5, width=size[0], height=size[1], frames=8 if sample["task"] == "tracking" else 0,
                   total_pixels=200_000)
    assert plan.video_grid(job) == grid
    assert plan.tokens_of(job)[:2] == (data.num_video_tokens(grid), data.num_video_tokens(grid) + job.text_tokens)


def test_the_budget_of_a_frame_is_the_published_one():
    assert data.frame_budget(60, 3584 * 784, 16 * 784) == pytest.approx(2 * 3584 * 784 / 60)
    assert data.frame_budget(768, 3584 * 784, 16 * 784) == int(1.05 * 16 * 784)
    assert data.frame_budget(2, 3584 * 784, 16 * 784) == 768 * 784


# --- bytes ------------------------------------------------------------------------------------------------------------


def size_of(tensors) -> int:
    return sum(t.nbytes for t in tensors)


@pytest.mark.parametrize("freeze", [False, True])
def test_weights_gradients_and_optimiser_take_what_is_predicted(model, model_folder, prompts, freeze):
    """Held against the tensors of a real step. Only the counters of AdamW, one number a tensor, are not predicted."""
    optimizer = train.make_optimizer(train.Config(freeze_vision=freeze), model, 1e-3)
    video = model.encode_video(prompts[0].patches, prompts[0].grid)
    logps = model.logprobs(model.embed(prompts[0].ids, video), prompts[0].positions, torch.randint(20, 99, (2, 4)), 1.0)
    logps.sum().backward()
    gradients = size_of(p.grad for p in model.hf.parameters() if p.grad is not None)
    optimizer.step()
    moments = size_of(t for state in optimizer.state.values() for name, t in state.items() if name != "step")
    counted = plan.count(plan.load_shape(str(model_folder)))
    part = plan.memory(counted, plan.Job(freeze_vision=freeze))
    assert part["weights"] == size_of(model.hf.parameters()) == 2 * part["reference"]
    assert part["gradients"] == gradients and part["optimiser"] == moments
    assert (part["gradients"] < part["weights"]) == freeze


def test_keys_and_values_take_what_is_predicted(model, model_folder, prompts):
    """A prompt once, and room for every completion up to the limit; here in float32, so twice the bytes of a card."""
    P, G, room = len(prompts[2].ids), 3, 11
    cache = GroupCache(len(model.text.layers), [P], G, room)
    with torch.no_grad():
        model._prefill([model.embed(prompts[2].ids, None)], [prompts[2].positions], cache)
    taken = size_of(t for layer in (*cache.prompt, *cache.own) for t in layer)
    counted = plan.count(plan.load_shape(str(model_folder)))
    text = P - plan.tokens_of(plan.Job())[0]
    job = plan.Job(group_size=G, max_new_tokens=room, gpus=2, questions=3, text_tokens=text)
    assert plan.memory(counted, job)["keys and values"] == 2 * taken / 2  # two questions on the fuller card


def test_no_phase_holds_what_another_has_freed():
    """The sum of all parts is more than any moment needs: gradients are gone while the next completions are sampled."""
    model, whole = plan.count(plan.load_shape("3b")), plan.Job(shard="off")
    part, peaks = plan.memory(model, whole), plan.peak_bytes(model, whole)
    assert max(peaks.values()) < sum(part.values()) and list(peaks) == ["sampling", "learning", "stepping"]
    learning = ("weights", "optimiser", "reference", "gradients", "copies, to learn", "activations", "logits")
    assert peaks["learning"] == sum(part[name] for name in learning)
    assert {name for name, value in part.items() if not value} == {name for name in part if "gathered" in name
                                                                   or "whole" in name}
    assert part["activations"] > 4 * 36 * 3490 * 2048  # at least the input of every layer for every token of the prompt
    assert peaks["stepping"] == 18 * model.parameters  # 4 + 4 + 8 + 2: a fused step needs nothing beside them
    assert part["copies, to sample"] == 2 * (model.layers + model.head) > 5 * part["copies, to learn"] > 2 * model.head
    answering, tuning = plan.Job(stage="answer"), plan.Job(stage="sft", shard="off")
    assert list(plan.peak_bytes(model, answering)) == ["sampling"] and plan.memory(model, answering)["optimiser"] == 0
    assert "sampling" not in plan.peak_bytes(model, tuning) and plan.memory(model, tuning)["reference"] == 0
    assert plan.memory(model, tuning)["copies, to sample"] == plan.memory(model, answering)["copies, to learn"] == 0
    assert plan.memory(model, plan.Job(beta=0.0))["reference"] == 0


def test_adapters_are_counted_as_lora_adds_them(model, model_folder, tmp_path):
    """Parameters, gradients, moments, and what is written to the disk: of A and B alone, and merged in float32."""
    model.hf.bfloat16()  # as train.load_model does on a GPU
    lora.add_adapters(model.hf, 3, 8.0, list(lora.TARGETS), seed=0)
    learned = [p for p in model.hf.parameters() if p.requires_grad]
    counted, job = plan.count(plan.load_shape(str(model_folder))), plan.Job(lora_rank=3)
    part = plan.memory(counted, job)
    assert plan.trained(counted, job) == sum(p.numel() for p in learned) > 0
    assert part["weights"] == size_of(model.hf.parameters())
    assert part["gradients"] == size_of(learned) and part["optimiser"] == 2 * size_of(learned)
    assert part["reference"] == 0 and part["whole, while it loads"] == 0
    written = size_of({t.data_ptr(): t for t in lora.merged_state(model.hf).values()}.values())
    assert plan.disk(counted, job)["models"] == written
    optimizer = torch.optim.AdamW(learned)
    for p in learned:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    state = training_state(model, optimizer)
    moments = size_of(t for name, t in state.items() if not name.endswith("/step"))
    assert plan.disk(counted, job)["checkpoints"] == (KEEP_CHECKPOINTS + 1) * moments


@pytest.mark.parametrize("name, numbers", [("3b", 29_933_568), ("7b", 40_370_176)])
def test_rank_16_of_the_published_sizes(name, numbers):
    """By hand, 7B: 28 layers of 16 * (2 * 7168 + 2 * 4096 + 3 * 22528)."""
    assert plan.trained(plan.count(plan.load_shape(name)), plan.Job(lora_rank=16)) == numbers


@pytest.mark.parametrize("name", ["3b", "7b"])
@pytest.mark.parametrize("stage", ["grpo", "sft"])
def test_shards_add_up_to_a_replica(name, stage):
    """A share that was forgotten, or taken twice, makes 7B fit where it does not."""
    model = plan.count(plan.load_shape(name))
    whole = plan.memory(model, plan.Job(stage=stage, shard="off"))
    for gpus in (2, 4, 8):
        part = plan.memory(model, plan.Job(stage=stage, gpus=gpus, shard="on"))
        for kind in ("weights", "gradients", "optimiser", "reference"):
            assert gpus * part[kind] == pytest.approx(whole[kind])
        assert part["activations"] == whole["activations"]
        assert part["copies, to sample"] == part["copies, to learn"] == 0 < whole["copies, to learn"]
        assert part["whole, while it loads"] == whole["weights"]
    away = plan.memory(model, plan.Job(stage=stage, gpus=1, offload=True))
    assert away["weights"] == away["optimiser"] == away["reference"] == 0 < away["gathered, to learn"]


def test_a_shard_is_as_large_as_fsdp_makes_it(model, model_folder):
    """One of four ranks, the others pretended. FSDP divides first dimensions: of small tensors a rank has more."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    try:
        Sharding(World(0, 4, torch.device("cpu")), model)
        local = size_of(p.to_local() for p in model.hf.parameters())
        parts = [sum(p.numel() for p in part.parameters())
                 for part in (*model.visual.blocks, *model.text.layers)]
        rest = sum(p.numel() for p in model.hf.parameters()) - sum(parts)
    finally:
        dist.destroy_process_group()
    counted = plan.count(plan.load_shape(str(model_folder)))
    assert plan.memory(counted, plan.Job(gpus=4, shard="on"))["weights"] == pytest.approx(local, rel=0.03)
    assert (counted.together, counted.largest) == (rest, max(parts))


@pytest.mark.parametrize("billions, gpus, card_gb, expected", [(8.3, 8, 80, True), (3.75, 8, 80, True),
                                                               (3.75, 8, 141, False), (8.3, 1, 80, False)])
def test_auto_shards_by_the_rule_of_training(billions, gpus, card_gb, expected):
    """lib.sharding.worth_sharding itself, asked about a card that is not here."""
    model = dataclasses.replace(plan.count(plan.load_shape("3b")), parameters=int(billions * 1e9))
    job = plan.Job(gpus=gpus, card_gb=card_gb)
    assert plan.sharded(model, job) is expected
    for change in ({"stage": "answer"}, {"lora_rank": 8}, {"shard": "off"}):
        assert not plan.sharded(model, dataclasses.replace(job, **change))
    assert plan.sharded(model, dataclasses.replace(job, shard="on"))


@pytest.mark.parametrize("name, card_gb", [("7b", 48.0), ("3b", 24.0)])
@pytest.mark.parametrize("stage", ["grpo", "sft"])
def test_lora_fits_the_cards_it_is_said_to_fit(name, card_gb, stage):
    """At the published budget, all eight questions on one card. By arithmetic: not measured on such a card."""
    model, job = plan.count(plan.load_shape(name)), plan.Job(gpus=1, lora_rank=16, card_gb=card_gb, stage=stage)
    assert plan.verdict(model, job).startswith(f"fits a card of {card_gb:g} GB (needs ")
    assert plan.verdict(model, dataclasses.replace(job, lora_rank=0)).startswith("does not fit")


def test_the_verdict_names_only_what_helps():
    """A remedy is a plan of its own that was made and fits; when none does, those that bring it nearer."""
    model = plan.count(plan.load_shape("7b"))
    text = plan.verdict(model, plan.Job(gpus=1))
    assert text == ("does not fit: needs 158 GB, more than a card of 80 GB; what helps: --gpus 8 --shard on (37), or "
                    "--offload (33), or --lora_rank 16 (24)")
    for flags in ("--gpus 8 --shard on", "--gpus 1 --offload", "--gpus 1 --lora_rank 16"):
        assert plan.verdict(model, plan.parse_arguments(flags.split())).startswith("fits a card of 80 GB")
    assert "nothing alone, but some --gpus 8 --shard on (37), " in plan.verdict(model, plan.Job(gpus=1, card_gb=20))
    answering = plan.verdict(model, plan.Job(stage="answer", card_gb=40, gpus=1))
    assert answering.startswith("does not fit: needs 53 GB") and "--offload" not in answering
    assert "--shard" not in plan.verdict(model, plan.Job(lora_rank=16, card_gb=20))


def test_a_checkpoint_is_as_large_as_predicted(model, model_folder, tmp_path):
    """Weights and both moments; the largest item on a disk, and one more of it than stay."""
    optimizer = train.make_optimizer(train.Config(), model, 1e-3)
    for p in model.hf.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    state = training_state(model, optimizer)
    save_checkpoint(ALONE, tmp_path / "checkpoint-1", state)
    counted = plan.count(plan.load_shape(str(model_folder)))
    predicted = plan.disk(counted, plan.Job())["checkpoints"] / (KEEP_CHECKPOINTS + 1)
    written = sum(file.stat().st_size for file in (tmp_path / "checkpoint-1").iterdir())
    assert predicted < written < predicted + 2048 * len(state)  # a header for each tensor: nothing beside real ones
    assert plan.disk(counted, plan.Job(stage="answer"))["checkpoints"] == 0
    files = [plan.disk(counted, plan.Job(samples=10, videos=videos, seconds=3.0))["videos"] for videos in (0, 5)]
    assert files == [30 * 60e3, 15 * 60e3]


# --- operations -------------------------------------------------------------------------------------------------------

JOB = plan.Job(width=168, height=280, frames=6, min_pixels=784, text_tokens=40, completion_tokens=30, group_size=4)


@pytest.fixture(scope="module")
def counted():
    """A model with windows in its vision tower, which the toy's only block has not, and the plan's count of it."""
    tokenizer = toy.build_tokenizer(TEXTS)
    config = toy.build_model(tokenizer, 0, layers=4).config
    config.vision_config.depth, config.vision_config.fullatt_block_indexes = 3, [1]
    hf = Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation="sdpa")
    model = VideoLM(hf, tokenizer, "")
    model.checkpoint_activations()
    model.eos_ids = [len(tokenizer)]  # never sampled: all completions run to the end
    return model, plan.count(config)


def operations(work, grad: bool) -> int:
    """As torch counts them. MATH: the fused kernels of a CPU are not in its list."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.set_grad_enabled(grad):
        work()
    return counter.get_total_flops()


def embed(model):
    grid, (V, P, _, _) = plan.video_grid(JOB), plan.tokens_of(JOB)
    generator = torch.Generator().manual_seed(0)
    video = model.encode_video(torch.randn(grid[0] * grid[1] * grid[2], 1176, generator=generator), grid)
    return torch.cat([video, model.text.embed_tokens(torch.zeros(P - V, dtype=torch.long))])[None]


def test_forward_operations_are_those_that_torch_counts(counted):
    """To the last one, windows at the edge of a frame included: 20 x 12 patches are no multiple of 8. Decoding has a few
    more, because a completion's keys have room in whole slots, and what is still empty is masked, not left out."""
    (model, size), (_, P, G, C) = counted, plan.tokens_of(JOB)
    positions, tokens = torch.arange(P).expand(3, -1), torch.randint(20, 99, (G, C))
    predicted = plan.flops(size, JOB)

    def sample(length):
        model.generate([embed(model)], [positions], group_size=G, max_new_tokens=length, temperature=1.0, seeds=[0])

    assert operations(lambda: embed(model), False) == plan.vision_flops(size, plan.video_grid(JOB))
    # releases of transformers differ in whether the angles of the rotation are a product of matrices: 4 in 100,000
    exactly = functools.partial(pytest.approx, rel=1e-4)
    assert operations(lambda: model.logprobs(embed(model), positions, tokens, 1.0), False) == exactly(predicted["reference"])
    first = operations(lambda: sample(1), False)
    assert first == exactly(predicted["prefill"])
    decode = operations(lambda: sample(C), False) - first
    assert predicted["decode"] <= decode <= 1.05 * predicted["decode"]


def test_the_operations_of_a_qwen3_are_those_that_torch_counts():
    """Its heads are wider than its hidden size says, its tower has no windows, and each layer of deepstack is a merger."""
    tokenizer = toy.build_tokenizer(TEXTS)
    config = toy.build_model(tokenizer, 0, layers=4, family="qwen3").config
    config.text_config.head_dim = 32
    config.vision_config.depth, config.vision_config.deepstack_visual_indexes = 3, [0, 1]
    model, size = VideoLM(CLASSES["qwen3_vl"]._from_config(config, attn_implementation="sdpa"), tokenizer, ""), plan.count(config)
    grid, (P, G, C) = (2, 6, 10), (40, 3, 5)
    video = torch.randn(math.prod(grid), 1536)
    assert operations(lambda: model.encode_video(video, grid), False) == plan.vision_flops(size, grid)
    embeds, positions = torch.randn(1, P, 3 * 96), torch.arange(P).expand(3, -1)
    expected = plan.decoder_flops(size, P + G * (C - 1), P**2 + G * (C - 1) * (P + C - 1)) + 2 * size.head * G * C
    scoring = operations(lambda: model.logprobs(embeds, positions, torch.ones(G, C, dtype=torch.long), 1.0), False)
    assert scoring == pytest.approx(expected, rel=1e-3)  # the angles of the rotation: 2,000 of 35 million


@pytest.mark.parametrize("name, parameters", [("2b", 2_127_532_032), ("4b", 4_437_815_808), ("8b", 8_767_123_696),
                                              ("32b", 33_357_390_064)])
def test_sizes_of_qwen3_vl(name, parameters):
    """A wrong number of a config is a wrong plan: the shapes give what the models' names say."""
    assert plan.count(plan.load_shape(f"qwen3-{name}")).parameters == parameters
    job = plan.Job(model=f"qwen3-{name}")
    t, h, w = plan.video_grid(job)
    V, P, _, _ = plan.tokens_of(job)
    assert V == t * h * w / 4 and P == V + 9 * t + job.text_tokens  # times are text


@pytest.mark.parametrize("stage", ["grpo", "sft"])
def test_operations_with_gradient_are_close_to_what_torch_counts(counted, stage):
    """Within an eighth: the first layer of the tower needs no gradient of its input, which weighs more the smaller a
    model is. Without the recomputation of checkpointing the prediction would be a quarter too low."""
    model, size = counted
    job = dataclasses.replace(JOB, stage=stage)
    _, P, G, C = plan.tokens_of(job)
    positions, tokens = torch.arange(P).expand(3, -1), torch.randint(20, 99, (G, C))
    real = operations(lambda: model.logprobs(embed(model), positions, tokens, 1.0).sum().backward(), True)
    assert plan.flops(size, job)["learn"] == pytest.approx(real, rel=0.125)


def test_operations_with_adapters_are_close_to_what_torch_counts(counted):
    """Frozen matrices have no gradient of their own: a quarter of the learning that full training does is spared."""
    model, size = counted
    job = dataclasses.replace(JOB, lora_rank=4)
    _, P, G, C = plan.tokens_of(job)
    positions, tokens = torch.arange(P).expand(3, -1), torch.randint(20, 99, (G, C))
    video = embed(model).detach()
    saved = {name: p.requires_grad for name, p in model.hf.named_parameters()}
    lora.add_adapters(model.hf, 4, 8.0, list(lora.TARGETS), seed=0)
    try:
        real = operations(lambda: model.logprobs(video, positions, tokens, 1.0).sum().backward(), True)
        forward = operations(lambda: model.logprobs(video, positions, tokens, 1.0), False)
    finally:
        remove_adapters(model.hf, saved)
    predicted = plan.flops(size, job)
    assert predicted["learn"] == pytest.approx(real, rel=0.1)
    assert predicted["reference"] + 2 * plan.trained(size, job) * (P + G * (C - 1)) == pytest.approx(forward, rel=1e-4)


def remove_adapters(hf, trains: dict[str, bool]) -> None:
    """What `add_adapters` did is undone, for the tests behind."""
    for name, layer in lora.adapters(hf).items():
        parent, _, child = name.rpartition(".")
        linear = torch.nn.Linear(*reversed(layer.weight.shape), bias=layer.bias is not None, device="meta")
        linear.weight, linear.bias = layer.weight, layer.bias
        setattr(hf.get_submodule(parent), child, linear)
    for name, p in hf.named_parameters():
        p.requires_grad_(trains[name])
        p.grad = None


def test_a_frozen_tower_is_passed_once():
    model = plan.count(plan.load_shape("3b"))
    whole, frozen = (plan.flops(model, plan.Job(freeze_vision=freeze)) for freeze in (False, True))
    seeing = plan.vision_flops(model, plan.video_grid(plan.Job()))
    assert whole["prefill"] == frozen["prefill"] and whole["reference"] - frozen["reference"] == pytest.approx(seeing)
    assert 3 * seeing < whole["learn"] - frozen["learn"] < 4 * seeing
    tuned = [plan.flops(model, plan.Job(stage="sft", freeze_vision=freeze))["learn"] for freeze in (False, True)]
    assert 2 * seeing < tuned[0] - tuned[1] < 3 * seeing  # forward remains


# --- hours, and the command line --------------------------------------------------------------------------------------


def test_hours_follow_the_work():
    model = plan.count(plan.load_shape("3b"))
    one = plan.hours(model, plan.Job())
    assert plan.steps(plan.Job()) == 1551  # VideoChat-R1's number for Charades: 12,408 questions, 8 a step
    assert plan.hours(model, plan.Job(epochs=3.0)) == pytest.approx(3 * one, rel=1e-3)
    assert plan.hours(model, plan.Job(gpus=1)) > 3 * one  # not 8: the eight questions are decoded together
    parts = plan.step_seconds(model, plan.Job(shard="off"))
    assert set(parts) == {"prefill", "decode", "learn", "reference", "step"} and min(parts.values()) > 0
    alone = plan.step_seconds(model, plan.Job(gpus=1, questions=1))  # no gradients to be summed
    assert parts["step"] - alone["step"] == pytest.approx(8 * model.parameters / plan.LINK_BYTES)
    assert plan.step_seconds(model, plan.Job(completion_tokens=1))["decode"] == 0
    assert set(plan.step_seconds(model, plan.Job(stage="sft", shard="off"))) == {"learn", "step"}
    assert set(plan.step_seconds(model, plan.Job(stage="answer"))) == {"prefill", "decode"}


def test_decoding_takes_its_layers_and_its_bytes_or_its_arithmetic():
    """The small kernels of the layers, and the bytes of weights and keys; or the arithmetic of many rows."""
    model, card = plan.count(plan.load_shape("7b")), plan.CARDS["a100"]
    jobs = [plan.Job(group_size=2), plan.Job(group_size=2, text_tokens=200_000), plan.Job(group_size=4000)]
    few, long, many = (plan.step_seconds(model, job)["decode"] / 149 for job in jobs)
    prompts = [plan.tokens_of(job)[1] for job in jobs]
    for found, P in ((few, prompts[0]), (long, prompts[1])):
        read = 2 * (model.layers + model.head) + (P + 2 * 75) * plan.key_value_bytes(model)
        assert found == pytest.approx(28 * plan.LAYER_SECONDS + read / (card.memory_bytes * plan.MEMORY_SHARE))
    assert few < long < many
    assert many == pytest.approx(plan.flops(model, jobs[2])["decode"] / 149 / (card.matrix_flops * plan.MATRIX_SHARE))


def test_what_was_measured_on_a_card_is_what_is_planned():
    """Decode steps and memory of an H200 (tests/results/h200): a plan that is wrong by half is worse than none."""
    rows = {}
    for name in ("first", "second"):
        lines = (ROOT / "tests" / "results" / "h200" / f"{name}.jsonl").read_text().splitlines()
        rows |= {row["what"]: row for row in map(json.loads, lines)} | rows  # of what was measured twice the first
    for shape in ("3b", "7b"):
        model = plan.count(plan.load_shape(shape))
        for questions in (1, 4):
            job = plan.Job(model=shape, gpus=1, questions=questions, completion_tokens=256, card="h200")
            job = dataclasses.replace(job, text_tokens=3800 - plan.tokens_of(job)[0])
            planned = 1e3 * plan.step_seconds(model, job)["decode"] / 255
            assert planned == pytest.approx(rows[f"decode {shape}, {8 * questions} rows: a step"]["value"], rel=0.2)
    assert rows["rate of a large product"]["value"] == pytest.approx(plan.CARDS["h200"].matrix_flops / 1e12, rel=0.01)
    assert rows["rate of a large copy"]["value"] == pytest.approx(plan.CARDS["h200"].memory_bytes / 1e12, rel=0.01)
    measured = [row for what, row in rows.items() if what.startswith("memory of a step")]
    assert len(measured) == 4 and all(row["value"] == pytest.approx(row["expected"], rel=0.02) for row in measured)


@pytest.mark.parametrize("name, gigabytes, flops, bandwidth", [("a100", 80, 312e12, 2.0e12), ("h100", 80, 800e12, 3.0e12),
                                                               ("h200", 141, 770e12, 4.08e12)])
def test_a_card_decides_memory_and_seconds(name, gigabytes, flops, bandwidth, capsys):
    """Rates of one kind of card beside the memory of another would be a plan for neither."""
    model = plan.count(plan.load_shape("3b"))
    job = plan.parse_arguments(["--card", name, "--model", "3b", "--gpus", "1", "--questions", "1", "--group_size", "2",
                                "--text_tokens", "200000"])
    assert job.card_gb == gigabytes and plan.parse_arguments(["--card", name, "--card_gb", "48"]).card_gb == 48
    seconds, work = plan.step_seconds(model, job), plan.flops(model, job)
    assert seconds["learn"] == pytest.approx(work["learn"] / (flops * plan.MATRIX_SHARE))
    assert seconds["step"] == pytest.approx(28 * model.parameters / (bandwidth * plan.MEMORY_SHARE))
    plan.print_plan(model, job)
    text = capsys.readouterr().out
    assert f"a card of {gigabytes} GB" in text and f"--card {name} multiplies {flops / 1e12:g} Tflop/s" in text
    assert f"{bandwidth / 1e12:g} TB/s (60%)" in text and plan.CARDS[name].source in text


def test_auto_shards_by_the_memory_of_the_card():
    """3B fills more than half of 80 GB, and less than half of 141."""
    model = plan.count(plan.load_shape("3b"))
    assert [plan.sharded(model, plan.Job(card=name)) for name in plan.CARDS] == [True, True, False]


def test_flags_that_train_py_has_too_mean_the_same():
    """A plan for another budget than the run's is no plan: names and published values are train.py's."""
    published = {f.name: f.metadata["with_model"] for f in dataclasses.fields(train.Config)}
    shared = {f.name: f.default for f in dataclasses.fields(plan.Job) if f.name in published and f.name != "model"}
    assert len(shared) >= 9 and all(published[name] == value for name, value in shared.items())


def test_the_command_prints_the_plan(capsys):
    plan.main(["--model", "3b", "--total_pixels", "1605632", "--min_pixels", "3136", "--shard", "off"])
    text = capsys.readouterr().out
    for words in ("3,754,622,976 parameters", "30 x 7 x 9 = 1890 tokens", "copies, to sample", "1551 steps on 8 cards"):
        assert words in text
    assert "fits a card of 80 GB (needs 73)" in text
    assert "5.5 times fewer tokens" in text and "every card holds the whole model" in text  # 8 * 2290 / (2140 + 1200)
    plan.main(["--model", "7b"])
    text = capsys.readouterr().out
    assert "fits a card of 80 GB (needs 37)" in text and "sharded: every card holds 1/8 of the model" in text
    plan.main(["--model", "7b", "--gpus", "1", "--offload"])
    assert "own memory, all processes: 149.3 GB" in capsys.readouterr().out
    plan.main(["--model", "7b", "--shard", "off"])
    assert "does not fit: needs 158 GB, more than a card of 80 GB; what helps: --shard on (3" in capsys.readouterr().out


@pytest.mark.parametrize("arguments, message", [(["--gpus", "0"], "--gpus: 0 is not a whole number from 1"), (["--stage", "x"], "invalid choice"),
                                                (["--samples", "-1"], "--samples: -1 is not"),
                                                (["--card_gb", "-1"], "--card_gb: -1 is not"),
                                                (["--card", "b200"], "invalid choice"),
                                                (["--lora_rank", "-1"], "--lora_rank: -1 is not"),
                                                (["--stage", "answer", "--shard", "on"], "--stage answer")])
def test_wrong_settings_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        plan.parse_arguments(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("flags", ["--lora_rank 8 --shard on", "--lora_rank 8 --offload", "--offload --shard off"])
def test_what_train_py_refuses_has_no_plan(flags, capsys):
    """LoRA is never sharded: a plan that divided its frozen model would promise a run that does not start."""
    for parse, more in ((plan.parse_arguments, []), (train.parse_config, ["--model", "x", "--train_data", "y"])):
        with pytest.raises(SystemExit):
            parse([*flags.split(), *more])
        assert flags.split()[0] in capsys.readouterr().err


def test_every_flag_is_explained(capsys):
    with pytest.raises(SystemExit):
        plan.parse_arguments(["--help"])
    text = capsys.readouterr().out
    assert all(f"--{f.name}" in text and f.metadata["help"] for f in dataclasses.fields(plan.Job))
