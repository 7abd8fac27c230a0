"""The benchmark compares what it says it compares: the same numbers on both sides, and bounds that are counted right."""

import json

import bench
import pytest
import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


@pytest.fixture(scope="module")
def case():
    return bench.build_case(bench.build_model("tiny", "cpu"), P=90, frames=8, G=3, C=5)


def test_one_command_measures_both_sides_and_prints_the_table(tmp_path, capsys):
    """What README shows must come out of the command beside it, and the figures must be about the same tokens."""
    bench.main(["--prompt", "90", "--frames", "8", "--group", "3", "--completion", "5", "--repeats", "1",
                "--out", str(tmp_path)])
    text, report = capsys.readouterr().out, json.loads((tmp_path / "bench.json").read_text())
    assert [row["phase"] for row in report["table"]] == [line.split("|")[0].strip() for line in text.splitlines()[5:10]]
    whole = report["table"][-1]
    for side in ("ours", "peers"):
        assert whole[side]["seconds"] == pytest.approx(sum(row[side]["seconds"] for row in report["table"][:-1]))
        assert whole[side]["tokens_per_second"] == pytest.approx(15 / whole[side]["seconds"])
    assert whole["ratio"] == pytest.approx(whole["peers"]["seconds"] / whole["ours"]["seconds"])
    assert report["differences"]["library_max"] < 1e-4 and report["differences"]["sampled_max"] < 1e-4
    assert report["case"] == {"P": 90, "V": report["case"]["V"], "G": 3, "C": 5, "grid": report["case"]["grid"]}
    assert report["scoring"]["bound"] == pytest.approx(3 * 95 / 105) and report["scoring"]["largest_difference"] < 1e-4
    assert f"ratio {report['scoring']['ratio']:.1f} x (bound by tokens 2.7 x)" in text
    assert [d["questions"] for d in report["decode"]] == [1, 4]


def test_both_sides_have_the_same_gradient(case):
    """A baseline that learns something else, or nothing, is no baseline: its backward pass would be cheaper."""
    gradients = []
    ours = bench.OurStep(case)
    ours.sample()
    peers = bench.PeersStep(case, ours.tokens)
    theirs, banned = peers.score, case.policy.banned_ids
    peers.score = lambda model: theirs(model, banned)
    for step in (ours, peers):
        case.policy.hf.zero_grad()
        step.reference()
        step.forward()
        step.backward()
        gradients.append({n: p.grad.clone() for n, p in case.policy.hf.named_parameters() if p.grad is not None})
    largest = max(g.abs().max() for g in gradients[0].values())
    assert gradients[0].keys() == gradients[1].keys() and largest > 0
    for name, gradient in gradients[0].items():
        assert (gradient - gradients[1][name]).abs().max() < 1e-4 * largest, name


@pytest.mark.parametrize("shape", ["3b", pytest.param("7b", marks=pytest.mark.slow)])
def test_published_sizes_run_on_both_sides(shape):
    """The one run that needs a large GPU must not end at a missing field of the config: here it is narrow, else whole."""
    config = bench.published_config(shape)
    text, vision = config.text_config, config.vision_config
    text.num_hidden_layers, text.num_attention_heads, text.num_key_value_heads, text.intermediate_size = 1, 2, 1, 64
    text.hidden_size = vision.out_hidden_size = 256  # two heads of the published size
    text.layer_types = text.layer_types[:1]
    vision.depth, vision.hidden_size, vision.intermediate_size, vision.num_heads = 8, 32, 32, 2
    hf = transformers.Qwen2_5_VLForConditionalGeneration(config)
    assert hf.lm_head.out_features == {"3b": 151936, "7b": 152064}[shape]
    assert (hf.lm_head.weight is hf.model.language_model.embed_tokens.weight) == (shape == "3b")
    case = bench.build_case(hf, P=40, frames=4, G=2, C=3)
    ours = bench.OurStep(case)
    ours.sample()
    peers = bench.PeersStep(case, ours.tokens)
    peers.sample()
    assert bench.compare_sides(case, peers, ours)["library_max"] < 1e-4


def test_the_bounds_count_what_the_modules_do(case):
    """An operation counted twice makes every code look twice as good; the counter of torch has no such interest."""
    ours = bench.OurStep(case)
    ours.sample()
    peers, counted = bench.PeersStep(case, ours.tokens), bench.flops_of(case)
    for side, step in (("ours", ours), ("peers", peers)):
        for phase, expected in (("reference", counted[side]["forward"]),
                                ("sample", counted[side]["prefill"] + counted[side]["decode"])):
            with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # the only one that it counts
                getattr(step, phase)()
            assert expected == pytest.approx(counter.get_total_flops(), rel=0.02), (side, phase)


def test_a_decode_step_reads_weights_once_and_every_prompt(case):
    """Bytes by hand, float32: the other code reads G copies of the prompt, we read one."""
    layers = 6 * (256 * 256 + 2 * 256 * 128 + 256 * 256 + 3 * 256 * 768)  # q, k and v of two key heads, o; the MLP
    head = 256 * case.policy.lm_head.out_features
    kv = 6 * 2 * 2 * 64 * 4  # layers, keys and values, heads, size of a head, float32
    assert bench.decode_bytes(case, 1, 1) == 4 * (layers + head) + kv * (90 + 3 * 5 / 2)
    assert bench.decode_bytes(case, 3, 1) - bench.decode_bytes(case, 1, 1) == kv * 2 * 90
    rates = {"flops": 1e30, "bytes": 1e9}  # nothing but memory counts
    assert bench.bounds_of(case, rates)["ours"]["sample"] == pytest.approx(4 * bench.decode_bytes(case, 1, 1) / 1e9, rel=1e-6)


def test_a_side_without_room_is_reported_and_costs_the_other_nothing(case):
    """Full logits of eight long prompts fit no card: the table must say so, hours of measurements must not be lost."""
    ours = bench.OurStep(case)
    figures = bench.measure_step(case, ours, 1)
    peers = bench.PeersStep(case, ours.tokens)

    def forward():
        raise torch.OutOfMemoryError

    peers.forward = forward
    theirs = bench.measure_step(case, peers, 1)
    assert theirs["reference"]["seconds"] > 0 and theirs["forward"] is theirs["backward"] is None
    rates = {"flops": 1e9, "bytes": 1e9}
    rows = bench.table_of(case, figures, theirs, bench.bounds_of(case, rates))
    assert [row["ratio"] is None for row in rows] == [False, False, True, True, True]
    assert rows[-1]["ours"]["seconds"] > 0 and rows[-1]["bound_ratio"] > 1


@pytest.mark.parametrize("arguments, remedy", [(["--completion", "1"], "at least 2"),
                                               (["--prompt", "20", "--frames", "64"], "fewer frames")])
def test_sizes_that_cannot_be_are_refused(arguments, remedy, capsys):
    with pytest.raises(SystemExit) as refusal:
        bench.main(arguments)
    assert remedy in str(refusal.value) + capsys.readouterr().err


@pytest.mark.parametrize("P, frames", [(90, 8), (2000, 32), (1300, 16), (20, 2)])
def test_a_prompt_has_exactly_its_length_and_time_never_leads(case, P, frames):
    """Where time is the largest axis, the library's positions differ from those of the published checkpoints."""
    prompt = bench.build_prompt(case.policy, P, frames)
    t, h, w = prompt.grid
    assert len(prompt.ids) == P and len(prompt.patches) == t * h * w and t == frames // 2
    first = int((prompt.ids == case.policy.video_token_id).nonzero()[0])
    assert int(prompt.positions[:, -1].max()) == first + h // 2 + P - first - t * h * w // 4 - 1
