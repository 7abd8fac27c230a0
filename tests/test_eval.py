"""What the reported numbers must be, counted by hand or by plain Python that shares no code with the metrics."""

import doctest
import json
import random
import time
from fractions import Fraction
from itertools import combinations, permutations

import pytest
from conftest import ALONE, ASKING
from hypothesis import given, settings, strategies as st
from made_samples import BOX, captioning, gqa, grounding, moments, qa, quality, says, slid, tracking

import eval as evaluation
from data import PromptTooLong
from eval import METRICS, answer_all, answer_twice, best_constant_span, blind_baselines, compute_metrics
from lib.answers import SamplingSettings, append_lines
from lib.questions import load_prompts
from rewards import score


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


# ---- moments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer, spans, precision, recall", [
    ("[(5, 10), (20, 25)]", [[5, 10], [20, 25]], 1, 1),
    ("[(5, 10)]", [[5, 10], [20, 25]], 1, 1 / 2),
    ("[(5, 10), (5, 10)]", [[5, 10]], 1 / 2, 1),  # named twice, found once
    ("[(5, 10), (5, 9), (6, 10)]", [[5, 10], [20, 25]], 1 / 3, 1 / 2),
    ("[(5, 7.5)]", [[5, 10]], 1, 1),  # on the threshold
    ("[(5, 7.49)]", [[5, 10]], 0, 0),
    ("[(5, 25)]", [[5, 10], [20, 25]], 0, 0),  # one window over both is neither of them
    ("[(0, 20)]", [[0, 10], [10, 20]], 1, 1),  # annotated windows that touch are one
    ("[(0, 10), (10, 20)]", [[0, 20]], 1 / 2, 1),  # those that are named count as they are written
    ("[(0, 10)]", [[10, 0]], 1, 1),  # annotated backwards
    ("[(7, 7)]", [[5, 10]], 0, 0),
    ("[]", [[5, 10]], 0, 0),
    ("[]", [], 1, 1),
    ("[(5, 10)]", [], 0, 0),
    ("[(10, 5)]", [[5, 10]], 0, 0),
    ("[(10, 5)]", [], 0, 0),  # cannot be read, and so does not say "not in this video"
])
def test_windows_that_are_found(answer, spans, precision, recall):
    metrics = compute_metrics([moments(spans)], [says(answer)])
    f1 = 2 * precision * recall / (precision + recall) if precision else 0
    assert [metrics[f"moments/{name}"] for name in ("F1@0.5", "precision@0.5", "recall@0.5")] == pytest.approx([f1, precision, recall])


def test_the_accuracy_of_not_in_this_video_is_over_the_samples_that_are_not():
    """Over all of them, a model that never says so would look nearly right in a file that has few."""
    samples = [moments([]), moments([]), moments([]), moments([[5, 9]]), moments([[5, 9]])]
    completions = [says("[]"), says("[(5, 9)]"), None, says("[]"), says("[(5, 9)]")]
    assert compute_metrics(samples, completions) == pytest.approx({
        "moments/mIoU": 2 / 5, "moments/F1@0.5": 2 / 5, "moments/precision@0.5": 2 / 5, "moments/recall@0.5": 2 / 5,
        "moments/Acc@absent": 1 / 3, "parse_failure": 1 / 5, "n": 5})
    assert "moments/Acc@absent" not in compute_metrics(samples[3:], completions[3:])


def most_pairs(windows, truths):
    """The largest one-to-one matching at an IoU of one half, found by trying all of them, in exact fractions."""
    def fits(window, truth):
        shared = max(0, min(window[1], truth[1]) - max(window[0], truth[0]))
        union = window[1] - window[0] + truth[1] - truth[0] - shared
        return union > 0 and Fraction(shared, union) >= Fraction(1, 2)

    slots = [*windows, *[None] * len(truths)]
    return max(sum(window is not None and fits(window, truth) for window, truth in zip(order, truths))
               for order in permutations(slots, len(truths)))


TENTHS = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 20)).map(lambda pair: (pair[0], sum(pair))), min_size=1, max_size=4)


@settings(max_examples=200, deadline=None)
@given(TENTHS, TENTHS)
def test_windows_found_are_the_most_that_any_matching_finds(predicted, annotated):
    """Counting hits of either side alone pays twice for one window, or for a window twice."""
    apart = []
    for start, end in sorted(annotated):  # what overlaps or touches is one, as in the reward
        if apart and start <= apart[-1][1]:
            apart[-1] = (apart[-1][0], max(end, apart[-1][1]))
        else:
            apart.append((start, end))
    pairs = most_pairs(predicted, apart)
    sample = moments([[start / 10, end / 10] for start, end in annotated])
    metrics = compute_metrics([sample], [says([(start / 10, end / 10) for start, end in predicted])])
    assert metrics["moments/precision@0.5"] == pytest.approx(pairs / len(predicted))
    assert metrics["moments/recall@0.5"] == pytest.approx(pairs / len(apart))
    assert metrics["moments/F1@0.5"] == pytest.approx(2 * pairs / (len(predicted) + len(apart)))


def test_the_reward_of_moments_is_its_first_metric():
    """The best model is chosen by it."""
    for spans in ([], [[5, 9]], [[5, 9], [20, 25]]):
        for answer in ("[]", "[(5, 9)]", "[(4, 21)]", "x", "[(9, 5)]", "[(5, 9), (5, 9)]"):
            metrics = compute_metrics([moments(spans)], [says(answer)])
            assert metrics["moments/mIoU"] == score(moments(spans), says(answer)).parts["temporal_iou"]


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
        [BOX] * 5 + [far, half, [0.4, 0.0, 0.0, 0.5]],  # 5.5 / 8, short of 0.7, and 3.5 / 6: swapped corners are no box
    ]
    completions = [says(json.dumps(boxes)) for boxes in answers] + [says(json.dumps(truth[:7]))]  # seven boxes: none
    assert compute_metrics([tracking(truth)] * 5, completions) == pytest.approx({
        "tracking/AO": (8 + 2 + 3 + 5.5) / 8 / 5,
        "tracking/AO@2-7": (6 + 0 + 3 + 3.5) / 6 / 5,
        "tracking/R@0.5": 2 / 5,
        "tracking/R@0.7": 1 / 5,
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
    """A caption that says whatever could happen shows in precision. F1 is that of
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


def test_the_best_constant_caption_is_the_one_that_earns_most():
    """Without a blind answer the recall of a model that says the same of every video looks like sight."""
    samples = [captioning("a dog barks", "it rains"), captioning("it rains"), captioning("it snows", "it rains")]
    blind = blind_baselines(samples)
    assert blind["best_constant_caption"] == pytest.approx(compute_metrics(samples, [says("It rains.")] * 3))
    assert not any(name.startswith("captioning") for name in blind["most_frequent_letter"])


def test_the_blind_caption_is_judged_by_who_judges_the_models():
    """A judge that is easier than the word rules lifted the model above a blind answer that they had judged."""
    samples = [captioning("a dog barks"), captioning("it rains")]

    def says_yes(events, caption):
        return [True] * len(events)

    assert blind_baselines(samples)["best_constant_caption"]["captioning/recall"] == 0.5
    assert blind_baselines(samples, says_yes)["best_constant_caption"]["captioning/recall"] == 1.0


# ---- denominators and failures --------------------------------------------------------------------------------------

ONE_OF_EACH = [
    (grounding([5, 9]), says("5 to 9")),
    (moments([[5, 9], [20, 25]]), says("[(5, 9), (20, 25)]")),
    (moments([]), says("[]")),
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
    assert metrics == {name: 1.0 for name in METRICS} | {"parse_failure": 0.0, "n": 9}
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
    of_others = {"moments/Acc@absent"} if sample.get("spans") else set()
    assert names == {name for name in METRICS if name.startswith(sample["task"] + "/")} - of_others


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
        (moments([[5, 9]]), says("[]"), 0),  # wrong, but an answer
        (moments([]), says("[(5, 9)]"), 0),
        (moments([]), says("none"), 1),
        (moments([]), says("[(9, 5)]"), 1),
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


def test_blind_answers_to_moments():
    """Where half of the events are not there, never looking and always saying so is paid half: it has to stand in the table."""
    samples = [moments([[0, 5]], duration=10), moments([[0, 2], [8, 10]], duration=10), moments([], duration=10), moments([])]
    blind = blind_baselines(samples)
    none = {"mIoU": 0.5, "F1@0.5": 0.5, "precision@0.5": 0.5, "recall@0.5": 0.5, "Acc@absent": 1.0}
    assert blind["not_in_video"] == {f"moments/{name}": value for name, value in none.items()} | {"parse_failure": 0.0, "n": 4}
    assert blind["whole_video"]["moments/mIoU"] == pytest.approx((0.5 + 0.4) / 4)
    assert blind["whole_video"]["moments/F1@0.5"] == 1 / 4 and blind["whole_video"]["moments/Acc@absent"] == 0
    assert best_constant_span(samples, 10.0) == (0.0, 0.5)  # 1 and 2 / 7: (0, 1) is worse on both, (0, 0.2) on the sum
    assert blind["best_constant_span"]["moments/mIoU"] == pytest.approx((1 + 2 / 7) / 4)
    for metrics in blind_baselines([moments([])]).values():
        assert metrics["n"] == 0 or metrics["parse_failure"] == 0


def test_a_blind_answer_of_another_task_is_no_row():
    """The four that every result has are a contract; the fifth comes with its task."""
    assert "not_in_video" not in blind_baselines([grounding([0, 1], duration=9), gqa("A", [[0, 1]], duration=9)])


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
        "tracking/R@0.7": 0.0,
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
    [text] = evaluation.say_letter_and_span([sample], 0.0, choose=lambda samples, fallback: (0.0, 0.5))
    assert score(sample, text).parts == {"temporal_iou": 0.25, "accuracy": 1.0, "format": 1.0}


# ---- every question once, whatever is killed -------------------------------------------------------------------------


def test_what_is_written_down_is_not_asked_again(model, loader, samples, tmp_path):
    """Resuming that asks everything anew is none; one that returns the answers in another order scores them against
    other truths. Without a model, any question that is asked raises."""
    first = answer_all(model, loader, samples, ALONE, ASKING, score, "", tmp_path / "partial")
    assert [p["id"] for p in first] == [s["id"] for s in samples]
    assert answer_all(None, loader, samples, ALONE, ASKING, score, "", tmp_path / "partial") == first
    assert answer_all(None, loader, samples[::-1], ALONE, ASKING, score, "", tmp_path / "partial") == first[::-1]
    with pytest.raises(AttributeError):
        answer_all(None, loader, samples, ALONE, ASKING, score, "", tmp_path / "elsewhere")


def test_half_of_the_answers_and_a_torn_line_lead_to_the_same_result(model, loader, samples, tmp_path):
    """The kill comes at any byte. What was answered stays as it was (marked here), the torn answer is given anew, and
    the new lines do not run into the torn one, so that the next resume reads them too."""
    whole = answer_all(model, loader, samples, ALONE, ASKING, score, "")
    folder = tmp_path / "partial"
    folder.mkdir()
    marked = [{**p, "completions": ["as it was"] * 2} for p in whole]
    append_lines(folder / "rank0.jsonl", marked[:1])
    append_lines(folder / "rank1.jsonl", marked[2:4])
    with open(folder / "rank0.jsonl", "a") as file:
        file.write("\n" + json.dumps(marked[4])[:-7])
    expected = [marked[i] if i in (0, 2, 3) else whole[i] for i in range(len(whole))]
    assert answer_all(model, loader, samples, ALONE, ASKING, score, "", folder) == expected
    assert answer_all(None, loader, samples, ALONE, ASKING, score, "", folder) == expected


def test_a_prompt_that_is_too_long_costs_its_own_sample(model, loader, samples):
    """One long question used to end an evaluation of thousands; in training it still says that a setting is wrong."""
    long = {**samples[0], "id": "long", "question": samples[0]["question"] * 400}
    limit = 1200
    prompts, _ = load_prompts(model, loader, samples, "think", limit)
    assert max(len(prompt.ids) for prompt in prompts) < limit
    asking = SamplingSettings("think", 6, limit, num_samples=2, temperature=1.0, batch=3)
    predictions = answer_all(model, loader, [samples[0], long, samples[1]], ALONE, asking, score, "")
    failed = predictions.pop(1)
    assert failed["reasons"] == ["prompt_too_long"] * 2 and failed["rewards"] == [0.0] * 2
    assert failed["completions"] == ["", ""] and f"more than {limit}" in failed["problem"]
    assert failed["parts"] == [{"accuracy": 0.0, "format": 0.0}] * 2
    assert predictions == answer_all(model, loader, samples[:2], ALONE, asking, score, "")
    with pytest.raises(PromptTooLong, match="more than 1200"):
        load_prompts(model, loader, [long], "think", limit)


# ---- a second look ---------------------------------------------------------------------------------------------------

ONCE = SamplingSettings("think", max_new_tokens=6, batch=2)


@pytest.mark.parametrize("sample, completion, windows", [
    (grounding([5, 9], duration=20), says("6 to 12.5"), [[6, 12.5]]),
    (gqa("C", [[5, 9]], duration=20), says("A", "[(1, 3), (8, 30)]"), [[1, 3], [8, 30]]),
    (gqa("C", [[5, 9]], duration=20), says("A", "[(1, 1), (18, 21), (20, 25)]"), [[18, 21]]),
    (qa("C", duration=20, video="v.mp4"), says("A", "[(1, 3)]"), [[1, 3]]),
    (qa("C", duration=20, start=15.0, end=20.0, video="v.mp4"), says("A", "[(5, 9)]"), None),  # five seconds are shown
    (qa("C", video="v.mp4"), says("A", "[(500, 900)]"), [[500, 900]]),  # nobody knows better
    (qa("C", duration=20, video="v.mp4"), says("A"), None),
    (grounding([5, 9], duration=20), says("12 to 6"), None),
    (grounding([5, 9], duration=20), says("7 to 7"), None),
    (grounding([5, 9], duration=20), "", None),
])
def test_the_windows_of_a_first_answer(sample, completion, windows):
    """A window that is empty or outside the video would make a second look that is none, and be counted as one."""
    found = evaluation.windows_of(sample, completion)
    assert found == windows


def look_twice(model, loader, samples, said, monkeypatch, folder=None, density=3.0):
    """The answers of two looks where the model says in the first what `said` has for a sample; and all that was asked."""
    asked = []

    def answer_batch(model, loader, samples, *rest):
        asked.extend(samples)
        lines = REAL_BATCH(model, loader, samples, *rest)
        for line in lines:
            if line["task"] == "gqa":  # the first look at a qa sample
                line["completions"] = [said.get(line["id"], "nothing")]
        return lines

    monkeypatch.setattr(evaluation, "answer_batch", answer_batch)
    return answer_twice(model, loader, samples, ALONE, ONCE, score, "", folder, density=density), asked


REAL_BATCH = evaluation.answer_batch


def test_the_second_look_is_closer_where_the_first_answer_points_and_its_answer_counts(model, loader, samples, monkeypatch):
    """A qa sample is asked for windows first, in the words of gqa, and for the letter then. Without a window it sees the same
    frames again, and the line says so. The rest of a line is that of the second look."""
    questions = [sample for sample in samples if sample["task"] == "qa"]
    said = {questions[0]["id"]: says("A", "[(2, 4)]"), questions[1]["id"]: says("A", "[(40, 50)]")}
    answers, asked = look_twice(model, loader, questions, said, monkeypatch)
    first, second = asked[:3], asked[3:]
    assert [sample["task"] for sample in first] == ["gqa"] * 3 and not any("dense_windows" in s for s in first)
    assert second == [{**questions[0], "dense_windows": [[2, 4]], "density": 3.0}, *questions[1:]]
    assert [line.pop("first") for line in answers] == [
        {"completions": [said[questions[0]["id"]]], "windows": [[2, 4]]},
        {"completions": [said[questions[1]["id"]]], "windows": None}, {"completions": ["nothing"], "windows": None}]
    assert answers == answer_all(model, loader, second, ALONE, ONCE, score, "")
    assert answers[1:] == answer_all(model, loader, questions[1:], ALONE, ONCE, score, "")


def test_a_kill_in_either_look_costs_no_answer(model, loader, samples, tmp_path, monkeypatch):
    """The second look stands on the answers of the first: asked again in another batch, they might be others."""
    questions = [sample for sample in samples if sample["task"] == "qa"]
    said = {questions[0]["id"]: says("A", "[(2, 4)]")}
    whole, asked = look_twice(model, loader, questions, said, monkeypatch, tmp_path / "partial")
    assert len(asked) == 6
    for look, name in (("first", "rank0.jsonl"), ("second", "rank0.jsonl")):
        file = tmp_path / "partial" / look / name
        lines = [line for line in file.read_text().split("\n") if line]
        file.write_text("\n".join(lines[:2]) + "\n" + lines[2][:-9])
        again, asked = look_twice(model, loader, questions, {}, monkeypatch, tmp_path / "partial")
        assert [sample["id"] for sample in asked] == [questions[2]["id"]] and again == whole, look


def test_a_video_that_cannot_be_read_is_looked_at_twice_and_counts_zero(model, loader, samples, tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    broken = {**samples[0], "id": "broken", "video": str(tmp_path / "broken.mp4")}
    (line,) = answer_twice(model, loader, [broken], ALONE, ONCE, score, "")
    assert line["reasons"] == ["unreadable_video"] and line["first"] == {"completions": [""], "windows": None}
