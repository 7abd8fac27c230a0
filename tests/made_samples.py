"""Samples, and completions of them, that several test files share."""

import json

# One of each task.
GROUNDING = {"id": "a", "task": "grounding", "question": " A man opens the Door. ", "spans": [[12, 18.5]]}
QA = {"id": "b", "task": "qa", "question": "why?", "options": ["to eat", "it's late"], "answer": "B"}
GQA = {**QA, "id": "c", "task": "gqa", "spans": [[5, 10.25], [20, 25]]}
TRACKING = {"id": "d", "task": "tracking", "question": "sloth",
            "boxes": [[0.0931, 0, 0.8, 0.7974]] + [[0.1, 0.2, 0.3, 1]] * 7}
LABELS = {"id": "e", "task": "classification", "question": "How good? Choice one answer from ['low', 'high'].",
          "options": ["low", "high"], "answer": "low"}
CAPTIONING = {"id": "f", "task": "captioning", "question": "What happens? ", "events": [" a dog barks", "He leaves!"]}
MOMENTS = {**GROUNDING, "id": "h", "task": "moments", "spans": [[20, 25.5], [10.25, 5]]}
ALL = [GROUNDING, QA, GQA, TRACKING, LABELS, CAPTIONING, MOMENTS]

# The same with a truth of one's own.
OPTIONS = ["share it", "approach a lady", "unwrap it", "play", "gesture"]
BOX = [0.0, 0.0, 0.4, 0.5]


def grounding(span, **extra):
    return {"id": "g", "task": "grounding", "question": "it falls", "spans": [span], **extra}


def moments(spans, **extra):
    return {"id": "s", "task": "moments", "question": "it falls", "spans": spans, **extra}


def gqa(answer, spans, **extra):
    return {"id": "q", "task": "gqa", "question": "why?", "options": OPTIONS, "answer": answer, "spans": spans, **extra}


def qa(answer, **extra):
    return {"id": "m", "task": "qa", "question": "why?", "options": OPTIONS, "answer": answer, **extra}


def tracking(boxes, **extra):
    return {"id": "t", "task": "tracking", "question": "sloth", "boxes": boxes, **extra}


def quality(answer):
    labels = ["low quality", "high quality"]
    return {"id": "c", "task": "classification", "question": "how good?", "options": labels, "answer": answer}


def captioning(*events):
    return {"id": "k", "task": "captioning", "question": "what happens?", "events": list(events)}


def says(answer, glue=None):
    return f"<think>so</think><answer>{answer}</answer>" + (f"<glue>{glue}</glue>" if glue is not None else "")


def slid(box, share):
    """The box moved right by a share of its width: IoU (1 - share) / (1 + share) with where it was."""
    step = share * (box[2] - box[0])
    return [box[0] + step, box[1], box[2] + step, box[3]]


def write_lines(path, samples):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples), encoding="utf-8")
    return path


# Samples with K answers, whose bin a hand can tell.
LETTERS = {"task": "qa", "question": "?", "options": ["a", "b"], "answer": "A"}
SPAN = {"task": "grounding", "video": "v.mp4", "question": "?", "spans": [[0, 1]]}


def group(name, sample, scores, part="accuracy", formats=None, reasons=None):
    """A sample, and the prediction of its K completions with these task scores."""
    formats = formats or [1.0] * len(scores)
    parts = [{part: float(score), "format": float(f)} for score, f in zip(scores, formats)]
    prediction = {"id": name, "task": sample["task"], "completions": [""] * len(scores), "parts": parts,
                  "rewards": [sum(p.values()) for p in parts], "reasons": reasons or ["ok"] * len(scores)}
    return {**sample, "id": name}, prediction


DISCRETE = [group("wrong", LETTERS, [0] * 8), group("one", LETTERS, [0] * 7 + [1]), group("right", LETTERS, [1] * 8),
            group("seven", LETTERS, [1] * 7 + [0])]
CONTINUOUS = [group(name, SPAN, scores, "temporal_iou") for name, scores in [
    ("poor", [0.0] * 8),
    ("good", [0.95, 1.0] * 4),  # std 0.027
    ("varied", [0.2, 0.6] * 4),  # mean 0.4, std 0.214
    ("lucky", [0.0] * 7 + [0.3]),  # mean 0.0375, std 0.106
]]
