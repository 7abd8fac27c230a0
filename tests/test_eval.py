"""What the reported numbers must be, counted by hand or by plain Python that shares no code with the metrics."""

import doctest
import hashlib
import json
import os
import random
import socket
import subprocess
import sys
import time
from itertools import combinations
from pathlib import Path

import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

import eval as evaluation
from eval import METRICS, best_constant_span, blind_baselines, compute_metrics
from lib import toy
from rewards import score

OPTIONS = ["share it", "approach a lady", "unwrap it", "play", "gesture"]
BOX = [0.0, 0.0, 0.4, 0.5]


def grounding(span, **extra):
    return {"id": "g", "task": "grounding", "question": "it falls", "spans": [span], **extra}


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


# ---- independent measures -------------------------------------------------------------------------------------------


def seconds_shared_and_covered(spans, others):
    """Length of the intersection and of the union of two sets of windows, summed over the pieces between endpoints."""
    points = sorted({time for span in [*spans, *others] for time in span})
    shared = covered = 0.0
    for low, high in zip(points, points[1:]):
        inside = [any(min(span) <= low and high <= max(span) for span in group) for group in (spans, others)]
        shared += (high - low) * all(inside)
        covered += (high - low) * any(inside)
    return shared, covered


def set_iou(spans, others):
    shared, covered = seconds_shared_and_covered(spans, others)
    return shared / covered if covered else 0.0


# ---- grounding ------------------------------------------------------------------------------------------------------


def test_the_examples_in_the_docstrings_are_true():
    results = doctest.testmod(evaluation)
    assert results.failed == 0 and results.attempted >= 4


def test_a_miniature_of_charades_counted_by_hand():
    """All kinds of answers at once, so that a wrong denominator or a dropped sample cannot cancel out."""
    samples = [
        grounding([24.3, 30.4], duration=30.96),
        grounding([0.0, 6.9], duration=33.75),
        grounding([10.0, 20.0], duration=25.0),
        grounding([20.9, 12.0], duration=31.0),  # reversed in the annotation, as four of Charades-STA are
        grounding([5.0, 15.0], duration=20.0),
        grounding([2.0, 4.0], duration=9.0),
    ]
    completions = [
        says("20.00 to 30.00"),  # 5.7 / 10.4 = 0.548
        says("0.00 to 10.00"),  # 6.9 / 10 = 0.69
        says('{"start_time": "12.0", "end_time": "18.0"}'),  # 0.6
        says("12 to 20.9"),  # 1, because the truth is sorted
        says("15 to 5"),  # reversed: 0, and nothing that can be read
        None,  # the video could not be decoded
    ]
    metrics = compute_metrics(samples, completions)
    assert metrics == pytest.approx({
        "grounding/mIoU": (5.7 / 10.4 + 0.69 + 0.6 + 1) / 6,
        "grounding/R@0.3": 4 / 6,
        "grounding/R@0.5": 4 / 6,
        "grounding/R@0.7": 1 / 6,
        "parse_failure": 2 / 6,
        "n": 6,
    })


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7])
def test_an_iou_on_the_threshold_counts(threshold):
    """Time-R1 counts > and VideoChat-R1 >=: on whole seconds that moves R@0.5 by several points."""
    end = 10 * threshold
    metrics = compute_metrics([grounding([0, 10])] * 2, [says(f"0 to {end:.2f}"), says(f"0 to {end - 0.01:.2f}")])
    assert metrics[f"grounding/R@{threshold}"] == 0.5


def test_a_threshold_met_in_decimals_is_met():
    """1.2 to 1.9 in 1.2 to 2.2 is 0.7, but 0.6999999999999998 in binary; so are 40 % of such borderline cases."""
    starts = [tenth / 10 for tenth in range(200)]
    samples = [grounding([start, round(start + 1.0, 1)]) for start in starts]
    for part in (0.3, 0.5, 0.7):
        completions = [says(f"{start:.2f} to {start + part:.2f}") for start in starts]
        assert compute_metrics(samples, completions)[f"grounding/R@{part}"] == 1.0


# ---- grounded questions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "glue, spans, miou, miop",
    [
        ("[(5, 10), (20, 25)]", [[5, 10], [20, 25]], 1.0, 1.0),
        ("[(0, 30)]", [[5, 10], [20, 25]], 10 / 30, 5 / 30),  # one annotated window, not both together
        ("[(20, 25), (2, 10)]", [[5, 10], [20, 25]], 10 / 13, 5 / 8),  # the longest, though the other would be better
        ("[(0, 4), (6, 10)]", [[6, 10]], 4 / 8, 0.0),  # equally long: the first
        ("[(0.1, 0.3), (5.1, 5.3)]", [[5, 6]], 0.2 / 1.2, 0.0),  # equal in decimals, the second longer in binary
        ("[(0, 3), (3, 6), (7, 11)]", [[7, 11]], 4 / 10, 1.0),  # as written: 0-3-6 is not one window of 6
        ("[(4, 6)]", [[5, 9]], 1 / 5, 0.5),
        ("[(7, 7)]", [[5, 9]], 0.0, 0.0),  # a point inside would be 1 in the official script
        ("[(5, 6)]", [[9, 5]], 1 / 4, 1.0),  # annotated backwards
        ("[(20, 30)]", [[5, 9]], 0.0, 0.0),
        ("[]", [[5, 9]], 0.0, 0.0),
    ],
)
def test_windows_of_a_grounded_answer(glue, spans, miou, miop):
    """mIoU is over sets of windows; mIoP over one window on either side."""
    metrics = compute_metrics([gqa("C", spans)], [says("C", glue)])
    assert metrics == pytest.approx({
        "gqa/accuracy": 1.0,
        "gqa/mIoU": miou,
        "gqa/mIoP": miop,
        "gqa/Acc@GQA": float(miop >= 0.5),
        "parse_failure": 0.0,
        "n": 1,
    })


def test_acc_at_gqa_needs_letter_and_window_of_the_same_sample():
    """The product of two means (here 0.5 * 0.5) is not the share of samples that have both."""
    samples = [gqa("C", [[5, 10]])] * 4
    right, beside = "[(5, 10)]", "[(11, 19)]"
    both_or_none = [says("C", right), says("C", right), says("A", beside), says("A", beside)]
    never_both = [says("C", beside), says("C", beside), says("A", right), says("A", right)]
    for completions, expected in [(both_or_none, 0.5), (never_both, 0.0)]:
        metrics = compute_metrics(samples, completions)
        assert metrics["gqa/Acc@GQA"] == expected
        assert metrics["gqa/accuracy"] == metrics["gqa/mIoP"] == 0.5


def test_iop_of_one_half_in_decimals_counts():
    """0.4 to 1.4 lies half in 0.9 to 20, but only by 0.49999999999999994 in binary."""
    starts = [tenth / 10 for tenth in range(100)]
    samples = [gqa("C", [[round(start + 0.5, 1), start + 20]]) for start in starts]
    completions = [says("C", f"[({start:.1f}, {start + 1:.1f})]") for start in starts]
    assert compute_metrics(samples, completions)["gqa/Acc@GQA"] == 1.0


def test_an_unreadable_glue_costs_the_windows_but_not_the_letter():
    """A published script reuses the previous sample's IoU here; another drops the sample."""
    samples = [gqa("C", [[5, 10]])] * 3
    completions = [says("C", "[(5, 10)]"), says("C", "from 5 to 10"), says("C", "[(10, 5)]")]
    assert compute_metrics(samples, completions) == pytest.approx({
        "gqa/accuracy": 1.0,
        "gqa/mIoU": 1 / 3,
        "gqa/mIoP": 1 / 3,
        "gqa/Acc@GQA": 1 / 3,
        "parse_failure": 2 / 3,
        "n": 3,
    })


# ---- tracking, choices, labels --------------------------------------------------------------------------------------


def test_tracking_counted_by_hand():
    """Boxes 0 and 1 are as good as given: AO@2-7 must not see them, AO must."""
    truth = [BOX] * 8
    half = slid(BOX, 1 / 3)  # IoU 0.5
    far = [0.8, 0.8, 0.9, 0.9]
    answers = [
        truth,  # 1 and 1
        [BOX, BOX] + [far] * 6,  # 2 / 8 and 0
        [far, far] + [half] * 6,  # 3 / 8 and 0.5
        [BOX] * 5 + [far, half, [0.4, 0.0, 0.0, 0.5]],  # 5.5 / 8 and 3.5 / 6: swapped corners are no box
    ]
    completions = [says(json.dumps(boxes)) for boxes in answers] + [says(json.dumps(truth[:7]))]  # seven boxes: none
    assert compute_metrics([tracking(truth)] * 5, completions) == pytest.approx({
        "tracking/AO": (8 + 2 + 3 + 5.5) / 8 / 5,
        "tracking/AO@2-7": (6 + 0 + 3 + 3.5) / 6 / 5,
        "tracking/R@0.5": 2 / 5,
        "parse_failure": 1 / 5,
        "n": 5,
    })


def test_a_sequence_of_which_half_is_right_counts_for_r_at_one_half():
    """R@0.5 is over sequences, on their mean: 4 of 8 boxes right is 0.5 and counts."""
    answer = [BOX] * 4 + [[0.8, 0.8, 0.9, 0.9]] * 4
    assert compute_metrics([tracking([BOX] * 8)], [says(json.dumps(answer))])["tracking/R@0.5"] == 1.0


def test_letters_and_labels():
    samples = [qa("C"), qa("C"), qa("C"), quality("high quality"), quality("high quality")]
    completions = [says("(C) unwrap it"), says("Answer: A"), says("Dancing"), says(" High Quality\n"), says("high")]
    assert compute_metrics(samples, completions) == pytest.approx({
        "qa/accuracy": 1 / 3,
        "classification/accuracy": 1 / 2,
        "parse_failure": 1 / 5,  # "Dancing" names no letter; A and "high" are answers, if wrong ones
        "n": 5,
    })


def test_captions_are_measured_by_what_they_tell_and_by_what_they_add():
    """Recall is all that training pays for; a caption that says whatever could happen shows in precision. F1 is that of
    the means: the mean of the samples' F1 is another number."""
    samples = [captioning("a dog barks", "a man leaves"), captioning("it rains"), captioning("it snows")]
    captions = ["A dog barks. A cat sleeps. A girl sings. The man leaves.", "It rains.", "It is dark."]
    completions = [says(caption) for caption in captions]
    metrics = compute_metrics(samples, completions)
    recall, precision = 2 / 3, (2 / 4 + 1 + 0) / 3
    assert metrics == pytest.approx({"captioning/F1": 2 * precision * recall / (precision + recall), "parse_failure": 0,
                                     "captioning/recall": recall, "captioning/precision": precision, "n": 3})
    assert compute_metrics(samples[:1], [says("It.")])["captioning/F1"] == 0
    assert compute_metrics(samples[:1], [says("?!")])["parse_failure"] == 1


def test_published_caption_scores_are_f1_of_the_means():
    """VideoChat-R1's rows for Dream-1k (F1, precision, recall), each rounded to 0.1."""
    for f1, precision, recall in ((30.6, 33.8, 27.9), (31.4, 32.6, 30.2), (38.2, 45.4, 33.1), (37.9, 44.4, 33.0)):
        assert 2 * precision * recall / (precision + recall) == pytest.approx(f1, abs=0.1)


def test_nothing_is_guessed_about_captions_without_a_look():
    for metrics in blind_baselines([captioning("it rains")]).values():
        assert not any(name.startswith("captioning") for name in metrics)


# ---- denominators and failures --------------------------------------------------------------------------------------

ONE_OF_EACH = [
    (grounding([5, 9]), says("5 to 9")),
    (qa("C"), says("C")),
    (gqa("C", [[5, 9]]), says("C", "[(5, 9)]")),
    (tracking([BOX] * 8), says(json.dumps([BOX] * 8))),
    (quality("low quality"), says("low quality")),
    (captioning("a dog barks"), says("A dog barks.")),
]


def test_each_task_has_its_own_denominator():
    """A mean over all samples would halve a task's score when another task joins the file."""
    samples, completions = zip(*ONE_OF_EACH, *ONE_OF_EACH[:1])
    metrics = compute_metrics(list(samples), list(completions))
    assert metrics == {name: 1.0 for name in METRICS} | {"parse_failure": 0.0, "n": 7}
    assert list(metrics) == [*METRICS, "n"]


@pytest.mark.parametrize("sample, completion", ONE_OF_EACH)
def test_a_missing_completion_counts_zero_in_everything(sample, completion):
    """Dropping samples that raise makes a model look better the more often it breaks."""
    perfect = compute_metrics([sample], [completion])
    for failed in (None, ""):
        metrics = compute_metrics([sample, sample], [completion, failed])
        assert metrics == {name: value / 2 for name, value in perfect.items()} | {"parse_failure": 0.5, "n": 2}


@pytest.mark.parametrize("sample, completion", ONE_OF_EACH)
def test_a_task_that_is_not_in_the_data_has_no_names(sample, completion):
    """accuracy 0 for a task without samples would read as a result."""
    names = set(compute_metrics([sample], [completion])) - {"parse_failure", "n"}
    assert names == {name for name in METRICS if name.startswith(sample["task"] + "/")}


def test_no_samples_are_no_numbers():
    assert compute_metrics([], []) == {"n": 0}


@pytest.mark.parametrize(
    "sample, completion, fails",
    [
        (grounding([5, 9]), says("50 to 90"), 0),  # readable and wrong
        (grounding([5, 9]), "<answer>5 to 9</answer>", 0),  # no thought
        (grounding([5, 9]), "well, " + says("5 to 9") + " I think", 0),  # no format, but an answer
        (grounding([5, 9]), says("5 to 5"), 0),  # a point is an interval
        (grounding([5, 9]), says("9 to 5"), 1),
        (grounding([5, 9]), says("at noon"), 1),
        (grounding([5, 9]), "<think>so</think><answer>5 to 9", 1),  # never closed
        (qa("C"), says("A"), 0),
        (qa("C"), says("A or C"), 1),
        (gqa("C", [[5, 9]]), says("A", "[(50, 90)]"), 0),
        (gqa("C", [[5, 9]]), says("A", "[]"), 0),
        (gqa("C", [[5, 9]]), says("C"), 1),  # no glue at all
        (gqa("C", [[5, 9]]), says("nobody", "[(5, 9)]"), 1),
        (tracking([BOX] * 8), says(json.dumps([[0.6, 0.6, 0.7, 0.7]] * 8)), 0),
        (tracking([BOX] * 8), says("[[0.1, 0.2]]"), 1),
        (quality("low quality"), says("awful"), 0),
        (quality("low quality"), says(" "), 1),
    ],
)
def test_a_parse_failure_is_an_answer_that_cannot_be_read(sample, completion, fails):
    """Counting wrong answers as unreadable, or the reverse, hides which of the two a prompt must fix."""
    assert compute_metrics([sample], [completion])["parse_failure"] == fails


def test_a_completion_for_each_sample_is_required():
    """zip would silently score the first ten of a hundred samples."""
    with pytest.raises(ValueError, match="2 samples but 1 completions"):
        compute_metrics([qa("A"), qa("B")], [says("A")])


def test_a_malformed_truth_is_an_error_and_no_zero():
    with pytest.raises(ValueError, match="spans"):
        compute_metrics([{"id": "g", "task": "grounding", "spans": []}], [says("1 to 2")])


NONSENSE = st.text(max_size=60) | st.text("0123456789.,-()[] toC<>/answerglue", max_size=80)


@settings(max_examples=150, deadline=None)
@given(NONSENSE, NONSENSE)
def test_whatever_is_answered_the_names_stay_and_the_values_are_in_range(answer, glue):
    """One missing name in one line makes a mean over fewer samples than its neighbours."""
    for sample, perfect in ONE_OF_EACH:
        metrics = compute_metrics([sample], [says(answer, glue)])
        assert set(metrics) == set(compute_metrics([sample], [perfect]))
        assert all(0 <= metrics[name] <= 1 for name in metrics)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 9)), max_size=4),
       st.lists(st.tuples(st.integers(0, 20), st.integers(1, 9)), min_size=1, max_size=3))
def test_window_metrics_match_a_count_of_pieces(predicted, annotated):
    """The same two numbers from the definitions: split time at every endpoint and add up the pieces."""
    predicted, annotated = ([(start, start + length) for start, length in pairs] for pairs in (predicted, annotated))
    metrics = compute_metrics([gqa("B", [list(span) for span in annotated])], [says("B", predicted)])
    assert metrics["gqa/mIoU"] == pytest.approx(set_iou(predicted, annotated), abs=1e-9)
    longest, iop = None, 0.0
    for start, end in predicted:
        if longest is None or end - start > longest[1] - longest[0]:
            longest = (start, end)
    if longest and longest[1] > longest[0]:
        shared = [seconds_shared_and_covered([longest], [truth])[0] for truth in annotated]
        iop = max(shared) / (longest[1] - longest[0])
    assert metrics["gqa/mIoP"] == pytest.approx(iop, abs=1e-9)
    assert metrics["gqa/Acc@GQA"] == float(iop >= 0.5)


# ---- blind baselines ------------------------------------------------------------------------------------------------


def random_samples(seed, timed=12):
    """A mixed file; some annotations end after the video; gqa has one window or two, overlapping or apart."""
    rng = random.Random(seed)
    samples = []
    for number in range(timed):
        duration = round(rng.uniform(8, 90), 2)
        cuts = sorted(round(rng.uniform(0, 1.04 * duration), 1) for _ in range(4))
        samples.append(grounding(cuts[1:3] if number else cuts[2:0:-1], duration=duration))
        spans = [[cuts[:3], cuts[1:]], [cuts[:2], cuts[2:]], [cuts[1:3]]][number % 3]
        spans = [[span[0], span[-1]] for span in spans]
        samples.append(gqa(rng.choice("ABBCDE"), spans, duration=duration))
        samples.append(qa(rng.choice("ACDDE")))
        samples.append(quality(rng.choice(["low quality", "high quality", "high quality"])))
        samples.append(tracking([slid(BOX, share / 10) for share in range(rng.randint(0, 3), 11)][:8]))
    return samples


def windows_of(samples, task):
    return [(s["spans"], s["duration"]) for s in samples if s["task"] == task]


def constant_mean(windows, first, last):
    return sum(set_iou([(first * t, last * t)], spans) for spans, t in windows) / len(windows)


def share_of_the_commonest(samples, task):
    answers = [s["answer"] for s in samples if s["task"] == task]
    return max(answers.count(answer) for answer in answers) / len(answers)


def test_whole_video_answers_from_zero_to_the_end():
    samples = random_samples(0)
    metrics = blind_baselines(samples)["whole_video"]
    for task in ("grounding", "gqa"):
        assert metrics[f"{task}/mIoU"] == pytest.approx(constant_mean(windows_of(samples, task), 0, 1), abs=1e-6)
    ious = [set_iou([(0, t)], spans) for spans, t in windows_of(samples, "grounding")]
    for threshold in (0.3, 0.5, 0.7):
        assert metrics[f"grounding/R@{threshold}"] == sum(iou >= threshold for iou in ious) / len(ious)
    assert metrics["parse_failure"] == 0 and metrics["n"] == 24
    assert not any(name.startswith(("qa", "tracking", "classification")) for name in metrics)


def test_the_best_constant_span_is_the_best_of_all_pairs_on_the_grid():
    """One pair for both tasks, or a search on anything but the set IoU, gives a baseline that is too easy to beat."""
    samples = random_samples(1, timed=3)
    found = blind_baselines(samples)["best_constant_span"]
    for task in ("grounding", "gqa"):
        windows = windows_of(samples, task)
        pairs = list(combinations([step / 100 for step in range(101)], 2))
        best = max(constant_mean(windows, *pair) for pair in pairs)
        assert len(pairs) == 5050
        assert found[f"{task}/mIoU"] == pytest.approx(best, abs=1e-6)


def test_the_search_names_the_pair():
    """Events in the second quarter of every video, whatever its length."""
    samples = [grounding([0.25 * t, 0.5 * t], duration=t) for t in (8.0, 30.96, 120.0)]
    samples.append(grounding([20.0, 10.0], duration=40.0))  # reversed in the annotation
    assert best_constant_span(samples, fallback=0.0) == (0.25, 0.5)
    assert blind_baselines(samples)["best_constant_span"]["grounding/mIoU"] == pytest.approx(1.0, abs=1e-6)


def test_a_window_annotated_three_times_counts_once_in_the_search():
    """Without merging, the first sample alone would outvote the two others."""
    samples = [gqa("A", [[0, 3]] * 3, duration=10), gqa("A", [[5, 10]], duration=10), gqa("B", [[5, 10]], duration=10)]
    assert best_constant_span(samples, fallback=0.0) == (0.5, 1.0)


@pytest.mark.parametrize("seed", range(5))
def test_the_best_constant_is_at_least_the_whole_video(seed):
    baselines = blind_baselines(random_samples(seed))
    for task in ("grounding", "gqa"):
        whole, best = (baselines[name][f"{task}/mIoU"] for name in ("whole_video", "best_constant_span"))
        assert best >= whole > 0


def test_the_whole_video_can_be_the_best_constant():
    samples = [grounding([0, 30], duration=30), gqa("A", [[0, 5], [5, 12]], duration=12)]
    baselines = blind_baselines(samples)
    assert baselines["best_constant_span"] == baselines["whole_video"]
    assert baselines["whole_video"]["grounding/mIoU"] == baselines["whole_video"]["gqa/mIoU"] == 1.0


def test_grounded_baselines_name_the_commonest_letter_too():
    """Acc@GQA of a blind guesser: the letter is B, and the window lies half in the annotation, once with a B."""
    samples = [
        gqa("B", [[0, 5]], duration=10),  # whole video: IoP 0.5
        gqa("B", [[0, 4]], duration=10),  # 0.4
        gqa("C", [[0, 8]], duration=10),  # 0.8, but C
        gqa("A", [[9, 10]], duration=10),
    ]
    baselines = blind_baselines(samples)
    for name in ("whole_video", "most_frequent_letter"):
        assert baselines[name] == pytest.approx({
            "gqa/accuracy": 0.5,
            "gqa/mIoU": (0.5 + 0.4 + 0.8 + 0.1) / 4,
            "gqa/mIoP": (0.5 + 0.4 + 0.8 + 0.1) / 4,
            "gqa/Acc@GQA": 0.25,
            "parse_failure": 0.0,
            "n": 4,
        })
    assert baselines["best_constant_span"]["gqa/accuracy"] == 0.5
    assert baselines["best_constant_span"]["gqa/Acc@GQA"] == 0.5  # 0 to 0.5: both B samples now reach IoP 0.5


def test_the_start_box_copied_eight_times():
    """Box 0 is free and box 1 nearly: the copy must be visible next to any tracking result."""
    boxes = [slid(BOX, share) for share in (0, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2)]
    metrics = blind_baselines([tracking(boxes), *random_samples(2)[:4]])["start_box_copied"]
    unseen = [0.8 / 1.2, 0.6 / 1.4, 0.4 / 1.6, 0.2 / 1.8, 0, 0]
    assert metrics == pytest.approx({
        "tracking/AO": (1 + 0.9 / 1.1 + sum(unseen)) / 8,
        "tracking/AO@2-7": sum(unseen) / 6,
        "tracking/R@0.5": 0.0,
        "parse_failure": 0.0,
        "n": 1,
    })


def test_the_most_frequent_answer_is_counted_for_each_task():
    """One count over all tasks would let the letters of gqa decide about qa."""
    samples = random_samples(3)
    metrics = blind_baselines(samples)["most_frequent_letter"]
    for task in ("qa", "gqa", "classification"):
        assert metrics[f"{task}/accuracy"] == pytest.approx(share_of_the_commonest(samples, task))
    assert metrics["n"] == 36 and metrics["parse_failure"] == 0


def test_equally_frequent_answers_are_decided_by_the_alphabet():
    """The order of the file must not change the baseline: here A and B are equally common."""
    samples = [gqa("B", [[0, 1]], duration=10), gqa("A", [[0, 9]], duration=10)]
    for order in (samples, samples[::-1]):
        assert blind_baselines(order)["whole_video"]["gqa/Acc@GQA"] == 0.5  # with B it would be 0


def test_unknown_durations_take_the_mean_of_the_known_ones():
    """The sample's own last second would tell a blind guesser half of the truth."""
    samples = [grounding([0, 10], duration=20), grounding([0, 30], duration=40), grounding([0, 15])]
    metrics = blind_baselines(samples)["whole_video"]
    assert metrics["grounding/mIoU"] == pytest.approx((10 / 20 + 30 / 40 + 15 / 30) / 3)


def test_without_any_duration_the_latest_annotated_second_stands_in():
    samples = [grounding([0, 10]), grounding([30, 40])]
    assert blind_baselines(samples)["whole_video"]["grounding/mIoU"] == pytest.approx(10 / 40)


def test_a_part_of_a_file_is_as_long_as_the_part():
    """Times count from `start`, so the video that is shown ends at `end` - `start`, not at the file's duration."""
    samples = [
        grounding([0, 10], start=20.0, end=40.0, duration=100.0),  # 20 s
        grounding([0, 10], start=60.0, duration=100.0),  # 40 s
        grounding([0, 10], end=50.0),  # 50 s
        grounding([0, 10], start=60.0, end=120.0, duration=100.0),  # the file ends first: 40 s
    ]
    whole = blind_baselines(samples)["whole_video"]["grounding/mIoU"]
    assert whole == pytest.approx((10 / 20 + 10 / 40 + 10 / 50 + 10 / 40) / 4)


def test_a_video_of_no_length_does_not_stop_the_search():
    samples = [grounding([0, 1], duration=0), grounding([4, 8], duration=8)]
    baselines = blind_baselines(samples)
    assert baselines["whole_video"]["grounding/mIoU"] == pytest.approx(0.25)
    assert baselines["best_constant_span"]["grounding/mIoU"] == pytest.approx(0.5)


def test_baselines_of_an_empty_file_are_empty():
    assert blind_baselines([]) == {name: {"n": 0} for name in (
        "whole_video", "best_constant_span", "start_box_copied", "most_frequent_letter")}


def test_prompts_without_thinking_get_completions_without_a_thought():
    """A baseline that breaks its own format would be the only one whose completions do not look like the model's."""
    with_thought, without = grounding([0, 1], duration=8), grounding([0, 1], duration=8, think=False)
    for sample in (with_thought, without):
        assert score(sample, evaluation.write(sample, "0 to 1")).parts["format"] == 1
    sample = gqa("A", [[0, 1]], duration=8)
    text = evaluation.write_span(sample, (0.0, 0.5), 0.0, {"gqa": "A"})
    assert score(sample, text).parts == {"temporal_iou": 0.25, "accuracy": 1.0, "format": 1.0}


# ---- a model's answers, by the command line -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def answered(model_folder, tmp_path_factory):
    """eval.py as a user starts it, on two processes, three completions each; one of the five videos is broken."""
    folder = tmp_path_factory.mktemp("answered")
    toy.write_dataset(folder, train=1, eval=5, seed=0)
    (folder / "videos" / "eval-0003.mp4").write_bytes(b"no video")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(ROOT / "eval.py"),
               "--model", str(model_folder), "--data", "eval.jsonl", "--out", "out", "--num_samples", "3", "--batch", "2",
               "--max_new_tokens", "6", "--min_pixels", "3136", "--tasks", "qa", "tracking", "--device", "cpu",
               "--num_workers", "1"]
    result = subprocess.run(command, cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
                            timeout=240)
    assert result.returncode == 0, result.stderr[-3000:]
    return folder, result.stdout


def test_every_sample_is_answered_once_whatever_the_number_of_processes(answered):
    """A sampler that pads the last batch, as usual in distributed evaluation, counts some samples twice."""
    folder, _ = answered
    predictions = [json.loads(line) for line in open(folder / "out" / "predictions.jsonl")]
    wanted = [s["id"] for s in map(json.loads, open(folder / "eval.jsonl")) if s["task"] in ("qa", "tracking")]
    assert [p["id"] for p in predictions] == wanted and len(wanted) == 10
    for p in predictions:
        assert {len(p[name]) for name in ("completions", "rewards", "parts", "reasons")} == {3}
        assert set(p["parts"][0]) == ({"accuracy", "format"} if p["task"] == "qa" else {"box_iou", "format"})


def test_an_unreadable_video_counts_zero_and_is_named(answered):
    """Samples that raise and are dropped from the denominator make a broken data set look good."""
    folder, printed = answered
    predictions = {p["id"]: p for p in map(json.loads, open(folder / "out" / "predictions.jsonl"))}
    broken = predictions["eval-0003-qa"]
    assert broken["reasons"] == ["unreadable_video"] * 3 and broken["rewards"] == [0.0] * 3
    assert "eval-0003.mp4" in broken["problem"] and "eval-0003.mp4" in printed
    metrics = json.loads((folder / "out" / "metrics.json").read_text())
    assert metrics["n"] == 10 and metrics["parse_failure"] >= 0.2
    assert "start_box_copied" in metrics["baselines"] and metrics["config"]["num_samples"] == 3


def test_one_process_gives_the_same_completions(answered, model_folder):
    """Noise belongs to the question: neither the batch nor the rank may decide what is sampled."""
    folder, _ = answered
    by_two = [json.loads(line)["completions"] for line in open(folder / "out" / "predictions.jsonl")]
    old = Path.cwd()
    os.chdir(folder)
    try:
        evaluation.main(["--model", str(model_folder), "--data", "eval.jsonl", "--out", "alone", "--num_samples", "3", "--batch", "7",
                   "--max_new_tokens", "6", "--min_pixels", "3136", "--tasks", "qa", "tracking", "--device", "cpu",
                   "--num_workers", "0"])
    finally:
        os.chdir(old)
    assert [json.loads(line)["completions"] for line in open(folder / "alone" / "predictions.jsonl")] == by_two


def test_style_decides_whether_a_thought_is_asked_for_and_scored():
    """Prompt and format reward must agree: else a model is punished for doing what it was told."""
    sample = {"id": "a", "task": "qa", "question": "?", "options": ["x", "y"], "answer": "A"}
    for style, think in (("think", True), ("answer", False), ("temporal_r1", True)):
        (styled,) = evaluation.with_style([sample], style)
        assert styled["think"] is think and "think" not in sample
    assert evaluation.with_style([{**sample, "think": False}], "think")[0]["think"] is False


# ---- how sure, and for which kind of question -----------------------------------------------------------------------


def accuracies(*values):
    return [{"qa/accuracy": float(value), "parse_failure": 0.0} for value in values]


def test_the_interval_of_a_constant_has_no_width():
    intervals = evaluation.intervals_of(evaluation.resampled_means(accuracies(*[0.5] * 30)))
    assert intervals == {"qa/accuracy": [0.5, 0.5], "parse_failure": [0.0, 0.0]}


@pytest.mark.parametrize("n, p", [(400, 0.3), (1000, 0.5)])
def test_the_interval_of_a_share_is_the_textbooks(n, p):
    """p +- 1.96 sqrt(p (1 - p) / n). Resampling n - 1 or 2 n, or standard deviation instead of error, is far off."""
    right = round(n * p)
    low, high = evaluation.intervals_of(evaluation.resampled_means(accuracies(*[1] * right, *[0] * (n - right))))[
        "qa/accuracy"]
    half = 1.96 * (p * (1 - p) / n) ** 0.5
    assert low == pytest.approx(p - half, abs=0.15 * half) and high == pytest.approx(p + half, abs=0.15 * half)


def test_an_interval_is_over_the_samples_that_have_the_metric():
    """Averaging a task over all samples of a mixed file would narrow its interval and halve its mean."""
    values = accuracies(*[1, 0] * 50)
    alone = evaluation.intervals_of(evaluation.resampled_means(values))["qa/accuracy"]
    others = [{"grounding/mIoU": 0.3, "parse_failure": 1.0}] * 200
    mixed = evaluation.intervals_of(evaluation.resampled_means(values + others))
    assert mixed["qa/accuracy"] == alone and mixed["grounding/mIoU"] == pytest.approx([0.3, 0.3])


def test_completions_of_a_sample_are_averaged_before_samples_are_drawn():
    """K = 8 of 100 questions are 100 independent numbers, not 800."""
    predictions = [{"completions": [says("A"), says("B")]}] * 10
    values = evaluation.values_of([qa("A")] * 10, predictions)
    assert values == accuracies(*[0.5] * 10)
    assert evaluation.intervals_of(evaluation.resampled_means(values))["qa/accuracy"] == [0.5, 0.5]


def test_the_interval_of_f1_is_that_of_the_f1_of_the_means():
    pairs = [(1, 0), (0, 1)] * 20
    values = [{"captioning/recall": r, "captioning/precision": p, "parse_failure": 0.0} for r, p in pairs]
    means = evaluation.resampled_means(values)
    recall, precision = means["captioning/recall"], means["captioning/precision"]
    assert means["captioning/F1"] == pytest.approx(2 * recall * precision / (recall + precision))
    assert precision == pytest.approx(1 - recall)  # drawn together: each pair has exactly one 1
    assert evaluation.f1(0.0, 0.0) == 0


def test_categories_counted_by_hand():
    """Video-MME: the macro mean weighs the lengths alike, the mean over samples the questions."""
    samples = [*[qa("A", category="short")] * 2, qa("B", category="short"), qa("A", category="long"), qa("A"),
               grounding([1, 2])]
    completions = [says("A"), says("B"), says("A"), says("B"), says("B"), says("1 to 2")]
    values = evaluation.values_of(samples, [{"completions": [c]} for c in completions])
    tables = evaluation.by_category(samples, values)
    assert list(tables) == ["qa"] and list(tables["qa"]) == ["short", "long", "macro mean"]
    # A blind answer is always A, which is right in two of the three short ones.
    assert tables["qa"]["short"] == pytest.approx({"qa/accuracy": 1 / 3, "parse_failure": 0, "n": 3, "blind": 2 / 3})
    assert tables["qa"]["long"] == {"qa/accuracy": 0, "parse_failure": 0, "n": 1, "blind": 1}
    assert tables["qa"]["macro mean"] == pytest.approx({"qa/accuracy": 1 / 6, "parse_failure": 0, "n": 4, "blind": 5 / 6})


def test_next_qa_is_summed_up_by_the_first_letter_and_tp_is_tn():
    """NExT-QA's own table has C, T and D, and no row for the few questions about what came before."""
    types = ["CW", "CH", "TN", "TP", "TP", "TC", "DL"]
    samples = [qa("A", category=name) for name in types]
    right = [1, 0, 1, 1, 0, 0, 1]
    table = evaluation.by_category(samples, accuracies(*right))["qa"]
    assert {name: (row["qa/accuracy"], row["n"]) for name, row in table.items()} == {
        "CW": (1, 1), "CH": (0, 1), "TN": (pytest.approx(2 / 3), 3), "TC": (0, 1), "DL": (1, 1),
        "Acc@C": (0.5, 2), "Acc@T": (0.5, 4), "Acc@D": (1, 1),
        "macro mean": (pytest.approx((1 + 0 + 2 / 3 + 0 + 1) / 5), 7)}
    other = evaluation.by_category([qa("A", category="TP"), qa("A", category="counting")], accuracies(1, 0))["qa"]
    assert list(other) == ["TP", "counting", "macro mean"]


def test_a_probe_is_compared_on_its_own_samples():
    """Text-only questions cannot lose their video: with them in the mean the drop would be too small. And the same
    draws on both sides: two runs that agree in every sample differ by 0, surely."""
    samples = [qa("A", id=name, video=name) for name in "abc"] + [qa("A", id="text")]
    values = accuracies(1, 1, 0, 1)
    result = evaluation.compare(samples, values, samples[:3], [
        {"completions": [says(letter)], "reasons": ["ok"]} for letter in "ABA"], evaluation.rewards.words_judge)
    assert result["n"] == {"qa": 3} and result["intact"]["qa/accuracy"] == result["score"]["qa/accuracy"] == 2 / 3
    assert result["drop"]["qa/accuracy"] == 0 and result["drop_intervals"]["qa/accuracy"][0] < 0
    same = evaluation.compare(samples, values, samples[:2], [{"completions": [says("A")], "reasons": ["ok"]}] * 2,
                              evaluation.rewards.words_judge)
    assert same["drop_intervals"]["qa/accuracy"] == [0, 0]
    worse = evaluation.compare(samples, values, samples[:2], [
        {"completions": [says(letter)], "reasons": ["ok"]} for letter in "AB"], evaluation.rewards.words_judge)
    assert worse["drop"]["qa/accuracy"] == 0.5 and worse["drop_intervals"]["qa/accuracy"] == [0, 1]  # lost is positive
    none = evaluation.compare(samples, values, [], [], evaluation.rewards.words_judge)
    assert none["drop"] == {} and none["score"] == {"n": 0}


# ---- a data set, killed and asked again -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    toy.write_dataset(folder, train=1, eval=4, seed=0)
    lines = [json.loads(line) for line in open(folder / "eval.jsonl")]
    lines = [{**line, "category": "easy" if "0" in line["id"][-9:] else "hard"} for line in lines]
    (folder / "eval.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def arguments(clips, model_folder, out, *more):
    return ["--model", str(model_folder), "--data", str(clips / "eval.jsonl"), "--out", str(out),
            "--max_new_tokens", "6", "--min_pixels", "3136", "--tasks", "qa", "tracking", "--device", "cpu", "--num_workers", "0", *more]


def read_lines(file):
    return [json.loads(line) for line in open(file)]


@pytest.fixture(scope="module")
def probed(clips, model_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("probed") / "out"
    evaluation.main(arguments(clips, model_folder, out, "--probe"))
    return out


def test_metrics_json_says_what_it_is_about(probed, clips):
    """A number without data, versions and settings cannot be compared with next year's."""
    metrics = json.loads((probed / "metrics.json").read_text())
    assert metrics["n"] == 8 and set(metrics["intervals"]) == {name for name in METRICS if name in metrics}
    file = clips / "eval.jsonl"
    assert metrics["data"] == {str(file): hashlib.sha256(file.read_bytes()).hexdigest()}
    assert {"python", "torch", "transformers"} <= set(metrics["versions"])
    assert metrics["config"]["max_new_tokens"] == 6 and metrics["config"]["prompt"] == "think"
    assert set(metrics["categories"]) == {"qa", "tracking"}
    assert sum(metrics["reasons"].values()) == 8
    assert not list(probed.glob("partial*"))


def test_probes_are_answers_to_the_same_questions_about_spoilt_videos(probed, clips):
    metrics = json.loads((probed / "metrics.json").read_text())
    intact = read_lines(probed / "predictions.jsonl")
    assert list(metrics["probes"]) == ["shuffled", "one_frame", "black", "another_video"]
    for probe, result in metrics["probes"].items():
        lines = read_lines(probed / f"predictions.{probe}.jsonl")
        assert [line["id"] for line in lines] == [line["id"] for line in intact]
        assert [line["completions"] for line in lines] != [line["completions"] for line in intact], probe
        assert result["n"] == {"qa": 4, "tracking": 4}
        for name, drop in result["drop"].items():
            assert drop == pytest.approx(metrics[name] - result["score"][name])
            assert result["drop_intervals"][name][0] <= drop + 1e-9


def test_complete_answers_are_not_asked_for_again(probed, clips, model_folder, monkeypatch, capsys):
    """Metrics may be computed anew where no GPU is; and other settings do not pass as these."""
    before = (probed / "metrics.json").read_text()
    (probed / "metrics.json").unlink()
    monkeypatch.setattr(evaluation.VideoLM, "load", lambda *_: pytest.fail("the model is not needed"))
    evaluation.main(arguments(clips, model_folder, probed, "--probe", "--benchmark", "got10k"))
    printed = capsys.readouterr().out
    assert "is complete" in printed and "blind: start box copied" in printed and "macro mean" in printed
    after = json.loads((probed / "metrics.json").read_text())
    assert {**after, "config": 0} == {**json.loads(before), "config": 0}
    with pytest.raises(ValueError, match=r"max_new_tokens 6, not 7.*--overwrite"):
        evaluation.main(arguments(clips, model_folder, probed, "--max_new_tokens", "7"))
    with pytest.raises(ValueError, match="samples '8 with sha256"):
        evaluation.main(arguments(clips, model_folder, probed, "--tasks", "qa"))
    assert len(read_lines(probed / "predictions.jsonl")) == 8


def test_overwrite_asks_again_and_touches_no_other_file(clips, model_folder, tmp_path):
    (tmp_path / "predictions.jsonl").write_text("")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="no settings.json"):
        evaluation.main(arguments(clips, model_folder, tmp_path))
    (tmp_path / "predictions.black.jsonl").write_text("old")
    evaluation.main(arguments(clips, model_folder, tmp_path, "--overwrite"))
    assert len(read_lines(tmp_path / "predictions.jsonl")) == 8 and (tmp_path / "notes.txt").read_text() == "mine"
    assert not (tmp_path / "predictions.black.jsonl").exists()
    lines = (tmp_path / "predictions.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "predictions.jsonl").write_text("".join(lines[:-1]))
    with pytest.raises(ValueError, match="its 7 answers are not those of the 8 samples"):
        evaluation.main(arguments(clips, model_folder, tmp_path))


def test_a_killed_evaluation_goes_on_with_another_number_of_processes(clips, model_folder, probed, tmp_path):
    """Two processes are killed as soon as an answer is on disk; one process finishes with the answers of a run that was
    never interrupted. Hours of inference lost at the last question are the commonest loss of all."""
    out = tmp_path / "out"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    # Without torchrun between: its workers would outlive it.
    ranks = [subprocess.Popen(
        [sys.executable, str(ROOT / "eval.py"), *arguments(clips, model_folder, out, "--batch", "1")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost",
             "MASTER_PORT": port}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for rank in range(2)]
    deadline = time.time() + 120
    while not any(file.stat().st_size for file in out.glob("partial/rank*.jsonl")) and time.time() < deadline:
        time.sleep(0.001)
    for process in ranks:
        process.kill()
        process.wait()
    assert list(out.glob("partial/rank*.jsonl")) or (out / "predictions.jsonl").exists()
    evaluation.main(arguments(clips, model_folder, out))
    assert read_lines(out / "predictions.jsonl") == read_lines(probed / "predictions.jsonl")
    assert not (out / "partial").exists()


def test_prompts_that_are_too_long_are_counted_and_named(clips, model_folder, tmp_path, capsys):
    evaluation.main(arguments(clips, model_folder, tmp_path, "--max_prompt_tokens", "10", "--probe"))
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["reasons"] == {"prompt_too_long": 8} and metrics["parse_failure"] == 1
    assert all(result["n"] == {} for result in metrics["probes"].values())
    assert "prompt_too_long: eval-0000-qa: sample eval-0000-qa: the prompt has" in capsys.readouterr().out


# ---- one question about one video -----------------------------------------------------------------------------------


def ask(model_folder, video, *more):
    command = [sys.executable, str(ROOT / "eval.py"), "--model", str(model_folder), "--video", str(video),
               "--device", "cpu", "--min_pixels", "3136", "--max_new_tokens", "6", "--num_workers", "0", *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_one_question_is_answered_and_read(clips, model_folder):
    """What everybody tries first: no data file, no output folder, no truth."""
    result = ask(model_folder, clips / "videos" / "eval-0000.mp4", "--task", "tracking", "--question", "white square",
                 "--box", "0.1", "0.1", "0.3", "0.4", "--num_samples", "2")
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.count("read as: ") == 2 and "(cut at --max_new_tokens 6)" in result.stdout


def test_a_video_that_cannot_be_read_is_one_line_and_status_1(model_folder, tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"no video")
    result = ask(model_folder, tmp_path / "a.mp4", "--task", "grounding", "--question", "a man falls")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "error: " in result.stderr.splitlines()[-1] and "a.mp4" in result.stderr.splitlines()[-1]


def test_each_task_is_asked_with_its_flags_and_read_from_its_tags(clips, model_folder, monkeypatch, capsys):
    """The model is real; only its completion is replaced, by one that can be read."""
    base = ["--model", str(model_folder), "--video", str(clips / "videos" / "eval-0000.mp4"), "--device", "cpu",
            "--min_pixels", "3136", "--num_workers", "0", "--question", "the screen is red"]
    for more, said, words in [
        (["--task", "grounding"], says("3 to 6"), "read as: 3.00 s to 6.00 s"),
        (["--task", "qa", "--options", "red", "blue"], says("B"), "read as: (B) blue"),
        (["--task", "gqa", "--options", "red", "blue"], says("A", "[(3, 6)]"),
         "read as: (A) red, seen in 3.00 s to 6.00 s"),
        (["--task", "classification", "--options", "low quality", "high quality"], says("low quality"),
         "read as: low quality"),
        (["--task", "captioning"], says("The screen turns red."), "read as: The screen turns red."),
        (["--task", "grounding"], "I do not know", "read as: nothing: there is no closed <answer>"),
    ]:
        monkeypatch.setattr(evaluation, "complete", lambda model, prompt, asking: [(said, True)])
        evaluation.main([*base, *more])
        assert words in capsys.readouterr().out


ONE = ["--model", "m", "--video", "a.mp4", "--question", "who?"]
MANY = ["--model", "m", "--data", "a.jsonl", "--out", "o"]


@pytest.mark.parametrize("flags, complaint", [
    (["--model", "m"], "give --data and --out"),
    (MANY[:4], "give --data and --out"),
    ([*MANY, "--task", "qa"], "--task needs --video"),
    ([*MANY, "--temperature", "-1"], "--temperature is -1.0"), ([*MANY, "--fps", "0"], "--fps is 0.0"),
    ([*MANY, "--num_workers", "-1"], "--num_workers is -1"),
    ([*MANY, "--num_samples", "8", "--temperature", "0"], "is one answer 8 times"),
    ([*MANY, "--probe", "--num_samples", "8"], "--probe compares greedy answers"),
    ([*MANY, "--probe", "--temperature", "1"], "--probe compares greedy answers"),
    ([*MANY, "--num_samples", "0"], "--num_samples is 0"),
    (ONE, "--video needs --task and --question"),
    ([*ONE, "--task", "qa"], "--task qa needs --options"),
    ([*ONE, "--task", "grounding", "--options", "a"], "--task grounding has no --options"),
    ([*ONE, "--task", "tracking"], "--task tracking needs --box"),
    ([*ONE, "--task", "tracking", "--box", "0.5", "0", "0.2", "1"], "is no box"),
    ([*ONE, "--task", "tracking", "--box", "1", "2", "30", "40"], "is no box"),
    ([*ONE[:-1], " ", "--task", "grounding"], "'question' is ' '"),
    ([*ONE, "--task", "grounding", "--out", "o"], "--out is for a data set"),
    ([*ONE, "--task", "grounding", "--probe"], "--probe is for a data set"),
])
def test_flags_that_do_not_fit_are_named(flags, complaint, capsys):
    """A flag that is ignored without a word is a wrong number later."""
    with pytest.raises(SystemExit):
        evaluation.parse_arguments(flags)
    assert complaint in capsys.readouterr().err


def test_flags_that_fit_are_accepted():
    assert evaluation.parse_arguments([*MANY, "--probe", "--temperature", "0"]).probe
    args = evaluation.parse_arguments([*ONE, "--task", "qa", "--options", "a", "b"])
    assert evaluation.question_of(args)["options"] == ["a", "b"] and args.min_pixels == 16 * 784
