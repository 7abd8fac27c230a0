"""How sure the numbers are: as sure as the number of videos, not of questions, lets them be."""

import pytest
from made_samples import qa, says

from eval import f1, values_of
from tools.intervals import intervals_of, resampled_means


def accuracies(*values):
    return [{"qa/accuracy": float(value), "parse_failure": 0.0} for value in values]


ALONE_EACH = [{}] * 2000  # no two samples share a video


def test_questions_about_one_video_are_drawn_together():
    """Five questions about each of 80 clips, all five right or all wrong: 80 independent numbers, not 400. As 400 the interval
    would be less than half as wide."""
    right = [clip % 2 for clip in range(80) for _ in range(5)]
    samples = [{"video": f"{clip}.mp4", "start": float(k)} for clip in range(80) for k in range(5)]
    low, high = intervals_of(resampled_means(accuracies(*right), samples))["qa/accuracy"]
    assert (high - low) / 2 == pytest.approx(1.96 * (0.25 / 80) ** 0.5, rel=0.15)


def test_clips_with_more_questions_weigh_more():
    """The mean of the clips' means is another number than the metric, which is over questions."""
    samples = [{"video": "a"}] * 9 + [{"video": "b"}]
    means = resampled_means(accuracies(*[1] * 9, 0), samples)["qa/accuracy"]
    assert set(means.round(6)) == {0.0, 0.9, 1.0}


def test_the_interval_of_a_constant_has_no_width():
    intervals = intervals_of(resampled_means(accuracies(*[0.5] * 30), ALONE_EACH))
    assert intervals == {"qa/accuracy": [0.5, 0.5], "parse_failure": [0.0, 0.0]}


@pytest.mark.parametrize("n, p", [(400, 0.3), (1000, 0.5)])
def test_the_interval_of_a_share_is_the_textbooks(n, p):
    """p +- 1.96 sqrt(p (1 - p) / n). Resampling n - 1 or 2 n, or standard deviation instead of error, is far off."""
    right = round(n * p)
    low, high = intervals_of(resampled_means(accuracies(*[1] * right, *[0] * (n - right)), ALONE_EACH))[
        "qa/accuracy"]
    half = 1.96 * (p * (1 - p) / n) ** 0.5
    assert low == pytest.approx(p - half, abs=0.15 * half) and high == pytest.approx(p + half, abs=0.15 * half)


def test_an_interval_is_over_the_samples_that_have_the_metric():
    """Averaging a task over all samples of a mixed file would narrow its interval and halve its mean."""
    values = accuracies(*[1, 0] * 50)
    alone = intervals_of(resampled_means(values, ALONE_EACH))["qa/accuracy"]
    others = [{"grounding/mIoU": 0.3, "parse_failure": 1.0}] * 200
    mixed = intervals_of(resampled_means(values + others, ALONE_EACH))
    assert mixed["qa/accuracy"] == alone and mixed["grounding/mIoU"] == pytest.approx([0.3, 0.3])


def test_completions_of_a_sample_are_averaged_before_samples_are_drawn():
    """K = 8 of 100 questions are 100 independent numbers, not 800."""
    predictions = [{"completions": [says("A"), says("B")]}] * 10
    values = values_of([qa("A")] * 10, predictions)
    assert values == accuracies(*[0.5] * 10)
    assert intervals_of(resampled_means(values, ALONE_EACH))["qa/accuracy"] == [0.5, 0.5]


def test_the_interval_of_f1_is_that_of_the_f1_of_the_means():
    pairs = [(1, 0), (0, 1)] * 20
    values = [{"captioning/recall": r, "captioning/precision": p, "parse_failure": 0.0} for r, p in pairs]
    means = resampled_means(values, ALONE_EACH)
    recall, precision = means["captioning/recall"], means["captioning/precision"]
    assert means["captioning/F1"] == pytest.approx(2 * recall * precision / (recall + precision))
    assert precision == pytest.approx(1 - recall)  # drawn together: each pair has exactly one 1
    assert f1(0.0, 0.0) == 0
