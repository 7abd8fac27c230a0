"""The clips of tests/claims.py: the synthetic task as it was when the claims were measured, with one event in a clip.

A clip lasts 10 seconds. A small white square wanders over a grey ground; once, for 2 to 4 whole seconds, the screen is tinted
in one of four colours. The clip is crisp or noisy. The labels of the warm start come late, as those of lib/toy.py do. Nothing
here may change, or the committed figures could not be repeated.
"""

from pathlib import Path

import numpy as np

from lib import toy
from lib.toy import COLOURS

SIZE, FPS = 56, 8  # 56 x 56 pixels are 2 x 2 tokens for every second
DURATION, EVENT_LENGTHS = 10, (2, 3, 4)  # seconds
LATENESS = 2  # seconds by which the ends of a warm-start label come late, at most

# --- clips ------------------------------------------------------------------------------------------------------------


def draw_event(rng: np.random.Generator) -> tuple[str, int, int]:
    """-> colour, start, end in whole seconds; every place in the clip is as likely as any other."""
    length = int(rng.choice(EVENT_LENGTHS))
    start = int(rng.integers(0, DURATION - length + 1))
    return str(rng.choice(list(COLOURS))), start, start + length


def draw_path(rng: np.random.Generator, num_frames: int) -> np.ndarray:
    """Boxes [x0, y0, x1, y1] in [0, 1] of a square that moves on a straight line, (num_frames, 4)."""
    side = rng.uniform(0.22, 0.36)
    start, stop = rng.uniform(0, 1 - side, 2), rng.uniform(0, 1 - side, 2)
    corner = start + (stop - start) * np.linspace(0, 1, num_frames)[:, None]  # (num_frames, 2)
    return np.concatenate([corner, corner + side], axis=1)


def render(rng: np.random.Generator, event: tuple[str, int, int], boxes: np.ndarray, noisy: bool) -> np.ndarray:
    """-> frames (T, SIZE, SIZE, 3) uint8."""
    colour, start, end = event
    ground = rng.uniform(70, 130) + 6 * rng.standard_normal((SIZE, SIZE, 1), dtype=np.float32)
    frames = np.broadcast_to(ground, (DURATION * FPS, SIZE, SIZE, 3)).astype(np.float32)
    frames[start * FPS : end * FPS] = 0.3 * frames[start * FPS : end * FPS] + 0.7 * np.array(COLOURS[colour])
    for frame, box in zip(frames, boxes):
        x0, y0, x1, y1 = np.round(box * SIZE).astype(int)
        frame[y0:y1, x0:x1] = 250
    if noisy:
        frames += 25 * rng.standard_normal(frames.shape, dtype=np.float32)
    return frames.clip(0, 255).astype(np.uint8)


# --- samples ----------------------------------------------------------------------------------------------------------


def late_span(rng: np.random.Generator, start: int, end: int) -> tuple[int, int]:
    """The span as an annotator gives it who presses a key when the event begins and another when it ends."""
    while True:
        s, e = (int(x) for x in (start, end) + rng.integers(0, LATENESS + 1, 2))
        if s < min(e, DURATION):
            return s, min(e, DURATION)


def thought(span: tuple[int, int], colour: str) -> str:
    """What is seen, second by second: "0 grey1 grey2 red ...". No blank before a digit, where Qwen's tokenizer would make
    it a token of its own: two tokens a second are as many positions as a second of video spans, so that "look at the
    second I am writing about" is one fixed distance, which a tiny model learns in minutes."""
    return "".join(f"{t} {colour if span[0] <= t < span[1] else 'grey'}" for t in range(DURATION))


def make_samples(rng: np.random.Generator, name: str, event: tuple[str, int, int]) -> list[dict]:
    """When, and in which colour."""
    colour, start, end = event
    letter = "ABCD"[list(COLOURS).index(colour)]
    (s, e), other, _ = [late_span(rng, start, end) for _ in range(3)]  # annotators, each as late; the third once made a gqa sample
    samples = [
        {"task": "grounding", "question": f"the screen is {colour}", "spans": [[start, end]],
         "target": f"<think>{thought((s, e), colour)}</think><answer>{s} to {e}</answer>"},
        {"task": "qa", "question": "which colour does the screen turn?", "options": list(COLOURS), "answer": letter,
         "target": f"<think>{thought(other, colour)}</think><answer>{letter}</answer>"},
    ]
    common = {"video": f"videos/{name}.mp4", "duration": float(DURATION)}
    return [{"id": f"{name}-{sample['task']}", **sample, **common} for sample in samples]


def make_clip(rng: np.random.Generator, name: str) -> tuple[np.ndarray, list[dict]]:
    event, boxes, noisy = draw_event(rng), draw_path(rng, DURATION * FPS), bool(rng.integers(2))
    return render(rng, event, boxes, noisy), make_samples(rng, name, event)


def write_dataset(out: Path, train: int, eval: int, seed: int) -> None:
    toy.write_dataset(out, train, eval, seed, make_clip, version="one event")
