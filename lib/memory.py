"""Out of memory, said so that one knows what to change: which samples, how long, how much was taken, which flag helps.

The function that was at work adds a note to the error (`note_if_out_of_memory`); whoever ends the run makes one message
of them (`message`).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

# What lowers the peak, by what the memory was wanted for.
REMEDIES = {
    "sampling": "--total_pixels, --max_new_tokens, --group_size, or fewer questions sampled together (--questions; in evaluations "
                "and the selection --eval_batch; eval.py: --batch)",
    "scoring": "--pack_tokens 1, --gradient_checkpointing, --total_pixels, --max_new_tokens or --freeze_vision",
    "the optimiser's step": "--lora_rank, --freeze_vision, and on several GPUs --shard on or --offload",
}


@contextmanager
def note_if_out_of_memory(doing: str, with_what: Callable[[], str] = str) -> Iterator[None]:
    """`doing` is one of REMEDIES; `with_what` describes the samples, and is asked only when it is needed."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        error.add_note(" ".join(filter(None, [doing, with_what()])))
        raise


def sizes(prompts: list, completions: str, most: int = 3) -> str:
    """Samples (data.Prompt) with the lengths of their prompts, longest first."""
    longest = sorted(prompts, key=lambda prompt: -len(prompt.ids))
    named = [f"{prompt.sample['id']} (prompt of {len(prompt.ids)} tokens)" for prompt in longest[:most]]
    more = f" and {len(prompts) - most} shorter ones" if len(prompts) > most else ""
    return f"{', '.join(named)}{more}, {completions}"


def message(error: torch.OutOfMemoryError, device: torch.device, where: str = "") -> str:
    """One paragraph: where it happened, with what, how much was allocated, and the flags that lower it."""
    notes = getattr(error, "__notes__", [])
    doing = next((name for note in notes for name in REMEDIES if note.startswith(name)), None)
    lines = [f"out of memory{where}" + (f", in {'; '.join(notes)}" if notes else "")]
    if device.type == "cuda":
        taken, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
        card = torch.cuda.get_device_properties(device).total_memory
        lines.append(f"{taken / 1e9:.1f} GB were allocated, {reserved / 1e9:.1f} GB reserved, of {card / 1e9:.1f} GB")
    lines.append(f"what lowers it: {REMEDIES[doing] if doing else '; '.join(REMEDIES.values())}")
    return ".\n".join(lines) + f".\n({str(error).split(chr(10))[0]})"
