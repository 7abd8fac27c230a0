"""The experiment behind the claims table: its questions are true, its arms are commands that exist, its table is computed."""

import json
import shlex
import statistics

import numpy as np
import pytest
from conftest import ROOT

import claims
import one_event
import rewards
import train


@pytest.fixture
def questions() -> list[dict[str, dict]]:
    """Of thirty clips, without their videos."""
    made = []
    for i in range(30):
        rng = np.random.default_rng([3, i])
        event = one_event.draw_event(rng)
        one_event.draw_path(rng, 80)
        samples = one_event.make_samples(rng, f"clip-{i}", event)
        made.append(claims.make_questions({sample["task"]: sample for sample in samples}, rng))
    return made


def test_exact_labels_earn_the_whole_reward_and_late_ones_do_not(questions):
    """SFT on exact labels is the strongest rival of GRPO: were its labels wrong, RL would win for no reason."""
    worth = {kind: {"exact": [], "target": []} for kind in ("grounding", "begin", "evidence")}
    for of_clip in questions:
        for kind, values in worth.items():
            for label, scores in values.items():
                scores.append(rewards.score({**of_clip[kind], "think": True}, of_clip[kind][label]).total)
    for kind, values in worth.items():
        assert set(values["exact"]) == {3.0 if kind == "evidence" else 2.0}
        assert statistics.fmean(values["target"]) < statistics.fmean(values["exact"]) - 0.15


def test_the_label_without_a_thought_says_the_same(questions):
    """The arm without a thought must differ in the thought alone."""
    for of_clip in questions:
        for sample in of_clip.values():
            target = claims.brief(sample)
            assert "think" not in target and sample.get("target", target).endswith(target)
            assert rewards.score({**sample, "think": False}, target).parts["format"] == 1


def test_a_letter_cannot_be_guessed(questions):
    """A kind whose commonest letter is right half of the time has no headroom to measure."""
    for kind in ("begin", "colour", "text"):
        letters = [of_clip[kind]["answer"] for of_clip in questions]
        assert max(map(letters.count, letters)) <= 0.5 * len(letters)


@pytest.mark.parametrize("name, arm", [*claims.BASES.items(), *claims.ARMS.items()])
def test_every_arm_is_a_command_that_train_accepts(name, arm, tmp_path):
    """An arm with a flag that does not exist would stop the experiment after an hour."""
    config = train.parse_config(shlex.split(f"--model {tmp_path} --train_data a.jsonl --out {tmp_path / 'x'} "
                                            f"{claims.COMMON} {arm.flags}"))
    if name not in claims.BASES and config.steps:
        completions = config.steps * config.questions * config.group_size
        assert completions == claims.STEPS * 64 * (3 if name == "joint, equal data" else 1)
        assert config.sft_steps == 0 and config.select_k == 0


def test_the_tables_are_means_and_deviations_over_the_seeds():
    results = json.loads((ROOT / "tests" / "results" / "claims.json").read_text())
    assert len(results["seeds"]) >= 3
    for claim, (arms, columns) in claims.CLAIMS.items():
        rows = claims.table(results, claim)
        assert len(rows) == 2 + len(arms) + 2  # and the blind answer, and what could have been seen
        cells = [cell.strip() for cell in rows[2 + 1].split("|")[1:-1]]
        values = [seed[columns[0]] for seed in results["arms"][arms[1]]]
        mean = sum(values) / len(values)
        deviation = (sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5
        assert cells[:2] == [arms[1], f"{mean:.3f} ± {deviation:.3f}"]


def test_what_three_seeds_could_have_shown():
    """A difference below it is no finding, and no lack of one: 4.303 sd / sqrt(3), the sd pooled over pairs of arms."""
    results = {"arms": {"a": [{"x": 0.1}, {"x": 0.2}, {"x": 0.3}], "b": [{"x": 0.2}, {"x": 0.2}, {"x": 0.2}]}}
    assert claims.visible_difference(results, ["a", "b"], "x") == pytest.approx(4.303 * 0.1 / 3**0.5)


def test_a_trained_arm_is_not_trained_again_for_its_answers(tmp_path, monkeypatch):
    """Killed while it was evaluated, it was trained once more, which wrote new weights and refused the answers that were there."""
    called = []
    monkeypatch.setattr(claims, "call", lambda out, command: called.append(command.split()[0]))
    arm = claims.Arm("grounding", "--steps 1")
    claims.run_arm(tmp_path, 0, "some arm", arm)
    claims.folder_of(tmp_path, "some arm").mkdir()
    (claims.folder_of(tmp_path, "some arm") / "summary.json").write_text("{}")
    claims.run_arm(tmp_path, 0, "some arm", arm)
    assert called == ["train.py", "eval.py", "eval.py"]


def test_what_readme_says_of_the_claims_is_what_was_measured():
    """Words outlive the numbers they were written for: what is said to hold is outside the 95 % interval of the paired
    difference, as far as three seeds have one."""
    results = json.loads((ROOT / "tests" / "results" / "claims.json").read_text())

    def per_seed(arm: str, column: str) -> list[float]:
        return [seed[column] for seed in results["arms"][arm]]

    def mean(arm: str, column: str) -> float:
        return statistics.fmean(per_seed(arm, column))

    def beats(arm: str, other: str, column: str) -> bool:
        return all(a > b for a, b in zip(per_seed(arm, column), per_seed(other, column)))

    sft = [arm for arm in claims.ARMS if arm.startswith("SFT")]
    for arm in sft:
        assert beats("grounding", arm, "grounding mIoU") == ("late" in arm)
        assert beats(arm, "grounding", "grounding mIoU") == ("exact" in arm)
        assert beats("grounding", arm, "evidence mIoU") and beats("grounding", arm, "colour acc.")
        assert mean("grounding", "text acc.") > mean(arm, "text acc.") + 0.2
    assert beats("grounding", "joint, equal compute", "grounding mIoU")
    for joint, kinds in (("joint, equal compute", ("begin", "evidence")),
                         ("joint, equal data", ("grounding", "begin", "evidence"))):
        for kind in kinds:
            column = "grounding mIoU" if kind == "grounding" else f"{kind} acc."
            assert mean(joint, column) > mean(kind, column) - 0.05
    def shown(arm: str, other: str, column: str) -> bool:
        differences = [a - b for a, b in zip(per_seed(arm, column), per_seed(other, column))]
        return statistics.fmean(differences) > claims.T_975[3] * statistics.stdev(differences) / 3**0.5

    for arm in sft:
        assert shown("grounding", arm, "grounding mIoU") if "late" in arm else shown(arm, "grounding", "grounding mIoU")
    assert shown("evidence", "continuous part only", "Acc@GQA") and shown("evidence", "discrete part only", "evidence mIoU")
    assert not shown("evidence", "discrete part only", "Acc@GQA")
    assert shown("grounding", "no thought", "grounding mIoU")
    assert not shown("selected", "random, as many", "grounding mIoU")
    assert beats("grounding", "no thought", "grounding mIoU")
    for arm in ("no KL", "token mean", "no std", "G = 4", "G = 16"):
        assert abs(mean(arm, "grounding mIoU") - mean("grounding", "grounding mIoU")) < 0.05
