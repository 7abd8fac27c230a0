"""What others need of a finished model: a card that says what it is, and on request a place on the Hugging Face hub."""

import shlex
from collections import Counter
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.utils import validate_repo_id

from lib.flags import command_of

CARD = "README.md"
KINDS = {"qwen2_5_vl": "Qwen2.5-VL", "qwen3_vl": "Qwen3-VL"}
OF_THE_MACHINE = ("out", "resume", "overwrite", "dry_run", "push_to_hub", "frame_cache", "frame_cache_gb", "num_workers")

# --- the card ---------------------------------------------------------------------------------------------------------


def card(config, results: dict, samples: dict[str, Counter], processes: int, name: str,
         model_type: str = "qwen2_5_vl") -> str:
    """README.md of the model `name` (warm_start, best, final) of a run.

    `samples`: tasks and their numbers of samples, of the training and the held-out data; `results`: those of the run.
    """
    columns = {"before": results.get("before"), "after the warm start": results.get("after_sft")}
    if name == "best" and "best" in results:
        columns[f"GRPO step {results['best']['step']}"] = results["best"]["metrics"]
    elif name == "final":
        columns["after GRPO"] = results.get("after")
    start = f"[{config.model}](https://huggingface.co/{config.model})" if is_on_hub(config.model) else f"`{config.model}`"
    licence = " The licence of the model that it was trained from applies to it, too." if config.model else ""
    selected = results.get("selected")
    lines = [
        "---", *([f"base_model: {config.model}"] if is_on_hub(config.model) else []), "library_name: transformers",
        "pipeline_tag: video-text-to-text", "tags:", "- grpo", "- video", "---", "",
        f"# {Path(config.out).name}: {name}", "",
        f"A {KINDS[model_type]}, trained from {start if config.model else 'random weights on synthetic clips'} to answer questions "
        f"about videos: {what_was_done(config)}." + licence, "",
        "## Data", "",
        f"- training: {data_of(config.train_data, samples['train'])}",
        *([f"- of these were selected: {len(selected['ids'])}"] if selected else []),
        f"- held out, for the results: {data_of(config.eval_data, samples['eval'])}", "",
        "## Settings", "",
        f"Prompt `{config.prompt}`, reward `{config.reward}`; {config.fps:g} frames a second, at most {config.max_frames}, "
        f"{config.total_pixels:,} pixels a video. {config.group_size} completions of {config.questions} questions a step, "
        f"learning rate {config.lr:g}, KL weight {config.beta:g}, seed {config.seed}, {processes} process"
        f"{'es' if processes > 1 else ''}. Ask it as it was asked in training: `asked.json` has the settings.", "",
        "```bash", command(config, processes), "```", "",
        "## Results", "", *table({title: column for title, column in columns.items() if column}), ""]
    return "\n".join(lines)


def what_was_done(config) -> str:
    stages = (["imitation of given answers (SFT)"] if config.sft_steps else []) + (
        ["GRPO, reinforcement learning with rewards that are rules"] if config.steps else [])
    adapters = f", through adapters (LoRA) of rank {config.lora_rank}, which are folded in" if config.lora_rank else ""
    return (" and ".join(stages) or "nothing was trained") + adapters


def data_of(entries: list[str], tasks: Counter) -> str:
    files = ", ".join(f"`{entry}`" for entry in entries) or "synthetic clips"
    counts = ", ".join(f"{count} {task}" for task, count in tasks.items())
    return f"{files} ({counts})" if counts else "none"


def command(config, processes: int) -> str:
    """What repeats the run; where its folder, caches and workers were does not matter."""
    several = f"torchrun --nproc_per_node={processes}" if processes > 1 else "torchrun"
    return f"{several} {command_of(config, 'train.py', leave_out=OF_THE_MACHINE)}"


def table(columns: dict[str, dict]) -> list[str]:
    """Markdown, one row a metric; a sentence where nothing was evaluated."""
    if not columns:
        return ["Not evaluated."]
    names = dict.fromkeys(name for column in columns.values() for name, value in column.items() if value is not None)
    rows = [[f"{column[name]:.3f}" if isinstance(column.get(name), float) else str(column.get(name, ""))
             for column in columns.values()] for name in names]
    return ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|",
            *(f"| {name} | " + " | ".join(row) + " |" for name, row in zip(names, rows))]


def is_on_hub(model: str) -> bool:
    return model.count("/") == 1 and not Path(model).exists() and find_problem(model) is None


# --- the hub ----------------------------------------------------------------------------------------------------------


def find_problem(repository: str) -> str | None:
    """What is wrong with a repository's name, in words."""
    try:
        validate_repo_id(repository)
    except ValueError as error:
        return str(error)
    return None


def warn_without_token() -> None:
    """Hours before it matters."""
    if not get_token():
        print("warning: --push_to_hub needs an account: log in (hf auth login) or set HF_TOKEN before the run ends")


def push(folder: Path, repository: str) -> bool:
    """Upload a model's folder; whether that worked. A failure is said and costs nothing: the folder stays.

    A new repository is private: who may read it is decided by its owner, not by a training run.
    """
    try:
        api = HfApi()
        url = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=url.repo_id, folder_path=folder, commit_message=f"{folder.name} of a training run")
    except Exception as error:  # whatever a network, an account or a server may answer: the model is on the disk
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        print(f"warning: {folder} was not pushed to {repository} ({reason}); the run is complete. Try again: "
              f"hf upload {repository} {shlex.quote(str(folder))}")
        return False
    print(f"{folder} is on the hub: {url}")
    return True
