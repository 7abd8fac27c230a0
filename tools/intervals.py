"""How sure a metric is: 95 % intervals by a bootstrap over the videos of a data set."""

import numpy as np

from eval import METRICS, metrics_of_means
from lib.samples import files_of

RESAMPLES = 1000


def resampled_means(values: list[dict[str, float]], samples: list[dict]) -> dict[str, np.ndarray]:
    """The means of RESAMPLES data sets drawn with replacement from this one: {name: (RESAMPLES,)}.

    Videos are drawn, each with all its questions: answers to questions about one clip are alike, and to count them as
    independent would make the interval too narrow. A sample without a video stands alone.

    Which are drawn depends on their number alone. So two runs over the same samples meet the same draws, and the
    differences of their means are those of one data set asked twice.
    """
    clips = [tuple(files_of(sample)) or ("no video", place) for place, sample in enumerate(samples)]
    means = {}
    for name in METRICS:
        sums: dict = {}  # clip -> [sum of the metric, number of samples that have it]
        for clip, of_sample in zip(clips, values):
            if name in of_sample:
                total, count = sums.get(clip, (0.0, 0))
                sums[clip] = (total + of_sample[name], count + 1)
        if sums:
            rng, table = np.random.default_rng(0), np.array(list(sums.values()))  # (clips, 2)
            draws = (table[rng.integers(0, len(table), len(table))].sum(0) for _ in range(RESAMPLES))
            means[name] = np.array([total / count for total, count in draws])
    return means | metrics_of_means(means)


def intervals_of(means: dict[str, np.ndarray]) -> dict[str, list[float]]:
    """95 % percentile bootstrap: {name: [low, high]}. It covers the choice of videos, not that of a training seed."""
    return {name: np.quantile(column, (0.025, 0.975)).tolist() for name, column in means.items()}
