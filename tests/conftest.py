"""What several test files share: a tiny Qwen2.5-VL that is real in everything but its size, and prompts with video."""

import contextlib
import json
import os
import shutil
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for the network
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402
import torch  # noqa: E402
from small_runs import CLIPS, SMALL  # noqa: E402
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration  # noqa: E402

import train  # noqa: E402
from data import Clip, VideoSettings, prepare  # noqa: E402
from lib import toy  # noqa: E402
from lib.answers import SamplingSettings  # noqa: E402
from lib.distributed import World  # noqa: E402
from lib.loader import VideoLoader  # noqa: E402
from lib.questions import with_style  # noqa: E402
from lib.samples import load_samples  # noqa: E402
from model import VideoLM  # noqa: E402

ALONE = World(0, 1, torch.device("cpu"))  # one process
ASKING = SamplingSettings("think", max_new_tokens=6, num_samples=2, temperature=1.0, batch=2)

torch.set_num_threads(1)  # the same sums in the same order on every machine

TEXTS = ["Answer the question: which colour does the screen turn first? Provide your answer within the <answer> </answer>",
         "<think>0123456789</think><answer>3 to 7</answer><glue>[(3, 7)]</glue> A B C D"] * 3


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    """A checkpoint folder of the toy's kind, with weights large enough that its predictions differ from uniform."""
    folder = tmp_path_factory.mktemp("checkpoint")
    toy.write_model(folder, TEXTS, seed=0)
    model = VideoLM.load(str(folder))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.hf.parameters():
            if p.dim() > 1:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.15)
    model.save(folder)
    return folder


@pytest.fixture(scope="session")
def qwen3_folder(tmp_path_factory) -> Path:
    """The same of a Qwen3-VL, with two layers of deepstack."""
    folder = tmp_path_factory.mktemp("qwen3")
    toy.write_model(folder, TEXTS, seed=0, family="qwen3")
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"] |= {"depth": 3, "deepstack_visual_indexes": [0, 1]}
    hf = Qwen3VLForConditionalGeneration(Qwen3VLConfig.from_dict(json.loads(json.dumps(config))))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in hf.parameters():
            if p.dim() > 1:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.15)
    hf.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def qwen3(qwen3_folder) -> VideoLM:
    return VideoLM.load(str(qwen3_folder))


@pytest.fixture
def model(model_folder) -> VideoLM:
    return VideoLM.load(str(model_folder))


def make_prompts(model) -> list:
    """Three questions of different lengths: two about videos of different sizes and rates, one without a video."""
    generator = torch.Generator().manual_seed(2)

    def clip(T: int, tokens: int, fps: float) -> Clip:
        side = tokens * model.geometry.factor
        frames = torch.randint(0, 256, (T, 3, side, side), generator=generator, dtype=torch.uint8)
        return Clip(frames, torch.arange(T) / fps, fps)

    qa = {"task": "qa", "options": ["red", "green"], "answer": "A"}
    samples = [
        ({"id": "a", "question": "which colour first?", "video": "a.mp4", **qa}, clip(6, 2, 2.0)),
        ({"id": "b", "question": "which colour does the screen turn last, and why?", "video": "b.mp4", **qa}, clip(4, 3, 1.3)),
        ({"id": "c", "question": "is there a colour?", **qa}, None),
    ]
    return [prepare(sample, clip, model.tokenizer, "answer", geometry=model.geometry) for sample, clip in samples]


@pytest.fixture
def gpu() -> str:
    """The device of tests marked `gpu`. GPU_TESTS_ON=cpu runs them without one, which shows that they run, and little more."""
    device = os.environ.get("GPU_TESTS_ON", "cuda")
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return device


@pytest.fixture
def prompts(model) -> list:
    return make_prompts(model)


@pytest.fixture(scope="session")
def clips(tmp_path_factory) -> Path:
    """A folder with four held-out clips of the toy, its questions in two categories."""
    folder = tmp_path_factory.mktemp("clips")
    toy.write_dataset(folder, train=1, eval=4, seed=0)
    lines = [json.loads(line) for line in open(folder / "eval.jsonl")]
    lines = [{**line, "category": "easy" if "0" in line["id"][-9:] else "hard"} for line in lines]
    (folder / "eval.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="session")
def samples(tmp_path_factory):
    """Questions about three real clips, two for each."""
    folder = tmp_path_factory.mktemp("clips")
    toy.write_dataset(folder, train=1, eval=3, seed=0)
    return with_style(load_samples([str(folder / "eval.jsonl")], tasks=["qa", "tracking"]), "think")


@pytest.fixture
def loader():
    """Decodes for the samples above, in this process."""
    with VideoLoader(VideoSettings(min_pixels=3136), num_workers=0) as loader:
        yield loader


# ---- runs of train.py -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory) -> Path:
    """One run of all four stages in miniature, with a warm start long enough that groups have spread."""
    folder = tmp_path_factory.mktemp("whole")
    with contextlib.chdir(folder):
        train.main([*SMALL, *CLIPS, "--out", "run", "--sft_steps", "90", "--sft_questions", "6", "--sft_lr", "3e-3",
                    "--save_every", "25", "--num_workers", "1", "--select_k", "3", "--select_min_std", "0.01",
                    "--select_min_mean", "0", "--group_size", "8", "--eval_every", "2", "--entropy_bonus", "0.001",
                    "--frame_cache", "frames", "--frame_cache_gb", "0.1"])
    return folder / "run"


def copy_start(whole_run: Path, folder: Path) -> Path:
    """A folder with the clips and, as `start`, a model that has learned enough for the rewards of a group to differ."""
    shutil.copytree(whole_run / "warm_start", folder / "start")
    shutil.copytree(whole_run.parent / "toy" / "seed0-6-4", folder / "toy")
    return folder


@pytest.fixture
def started(whole_run, tmp_path) -> Path:
    return copy_start(whole_run, tmp_path)
