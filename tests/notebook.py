"""Write docs/toy.ipynb: the default run step by step, made of README's commands and of a few lines that look at what it left.

    python tests/notebook.py

A test keeps the file in step with this one, and a slow one runs all of it.
"""

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "docs" / "toy.ipynb"
README = (ROOT / "README.md").read_text(encoding="utf-8")
(RUN,) = re.findall(r"\.venv/bin/(torchrun train\.py)\n", README)  # the main job
(AGAIN,) = re.findall(r"\.venv/bin/(torchrun eval\.py --model runs/toy/final .*)\n", README)

CELLS = [
    """# Reinforcement fine-tuning of a video language model, in minutes

A tiny Qwen2.5-VL with random weights learns to say *when* something happens in a clip: first by imitation of labels that come late, then
by GRPO with rewards that are rules. On a free Colab machine, with or without a GPU, as on a laptop. What the words mean is in docs/glossary.md,
how it works in README.md.""",
    """## 1. The code and its packages

In Colab, get the repository first: `!git clone ADDRESS repository` and `%cd repository`.""",
    """import os
from pathlib import Path

while not Path("train.py").exists() and Path.cwd() != Path("/"):
    os.chdir("..")  # opened from docs/
assert Path("train.py").exists(), "change into the repository first (%cd)"
# Colab's own torch, numpy and pillow will do.
wanted = [line.split("#")[0].strip() for line in open("requirements.txt") if line.startswith(("transformers", "av", "tqdm"))]
%pip install -q {" ".join(wanted)} matplotlib""",
    """## 2. The run

Clips are written, the model is built, and six stages follow: evaluate, imitate, evaluate, select, GRPO, evaluate. It takes about 5 minutes on
two CPU cores. The table at the end has the answers on held-out clips, beside what blind answers get.""",
    f"!{RUN} --overwrite 2>&1 | tail -n 60",
    """## 3. The curve

Rewards compare with exact labels, which imitation has never seen.""",
    """import json
import matplotlib.pyplot as plt

steps = [json.loads(line) for line in open("runs/toy/metrics.jsonl")]
grpo = [step for step in steps if step["phase"] == "grpo"]
figure, axes = plt.subplots(1, 3, figsize=(13, 3))
for axis, name in zip(axes, ("temporal_iou", "dead_groups", "kl")):
    axis.plot([step["step"] for step in grpo], [step.get(name) for step in grpo])
    axis.set(title=name, xlabel="GRPO step")
plt.show()""",
    """## 4. A group

One question, its completions, and how each compares with its siblings: that is all GRPO learns from.""",
    """lines = [json.loads(line) for line in open("runs/toy/completions.jsonl")]
first = [line for line in lines if line["step"] == 1 and line["id"].endswith("grounding")]
for line in [line for line in first if line["id"] == first[0]["id"]][:8]:
    print(f"reward {line['reward']:.2f}  advantage {line['advantage']:+.2f}  {line['completion'][-60:]}")""",
    """## 5. What the model sees, and what it says

The frames of one held-out clip, two a second; then the trained model is asked about it.""",
    """from data import read_video

clip = read_video("toy/seed0-600-200/videos/eval-0000.mp4", min_pixels=784, total_pixels=12 * 784)
figure, axes = plt.subplots(2, 12, figsize=(13, 2.6))
for axis, frame, second in zip(axes.flat, clip.frames, clip.seconds):
    axis.imshow(frame.permute(1, 2, 0)); axis.set_title(f"{second:.1f} s", fontsize=8); axis.axis("off")
plt.show()""",
    """sample = next(sample for sample in map(json.loads, open("toy/seed0-600-200/eval.jsonl")) if sample["task"] == "grounding")
print(sample["question"], sample["spans"])
!python -m tools.ask --model runs/toy/final --video toy/seed0-600-200/videos/eval-0000.mp4 "{sample['question']}\"""",
    """## 6. Once more, from the saved model

The same questions, asked of `runs/toy/final` by eval.py: the numbers are those of the table.""",
    f"!{AGAIN} 2>&1 | tail -n 30",
    """## 7. Further

`runs/toy/report.html` shows all of it to walk through: download it, or open it from the folder. `python grpo.py` goes through one step with numbers
that can be followed by hand:""",
    "!python grpo.py",
]


def notebook() -> dict:
    """Prose is Markdown, everything else a code cell; no outputs."""
    cells = []
    for number, text in enumerate(CELLS):
        is_code = not text.startswith("#")
        source = text.splitlines(keepends=True)
        cell = {"cell_type": "code" if is_code else "markdown", "id": f"cell-{number}", "metadata": {}, "source": source}
        cells.append(cell | ({"execution_count": None, "outputs": []} if is_code else {}))
    return {"cells": cells, "metadata": {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
                                         "language_info": {"name": "python"}}, "nbformat": 4, "nbformat_minor": 5}


if __name__ == "__main__":
    NOTEBOOK.write_text(json.dumps(notebook(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
