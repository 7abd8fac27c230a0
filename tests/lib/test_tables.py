"""What is printed."""

import rewards
from eval import METRICS
from lib import tables


def test_every_reason_has_its_words():
    assert set(tables.WHY_UNREADABLE) == rewards.UNREADABLE


def test_metrics_stand_in_the_order_that_is_published():
    """The first of a task is the one that its best model is chosen by, and the one by which categories are compared."""
    order = ["grounding/mIoU", "grounding/R@0.3", "grounding/R@0.5", "grounding/R@0.7", "moments/mIoU", "moments/F1@0.5",
             "moments/precision@0.5", "moments/recall@0.5", "moments/Acc@absent", "qa/accuracy", "gqa/accuracy", "gqa/mIoU",
             "gqa/mIoP", "gqa/Acc@GQA", "tracking/AO", "tracking/AO@2-7", "tracking/R@0.5",
             "tracking/R@0.7", "classification/accuracy", "captioning/F1", "captioning/recall", "captioning/precision",
             "parse_failure"]
    assert [name for name in METRICS if name in order] == order


def test_columns_and_rows_are_printed_in_that_order(capsys):
    tables.print_table(METRICS, {"model": {"parse_failure": 0.25, "qa/accuracy": 0.5, "grounding/mIoU": 1.0}})
    assert [line.split() for line in capsys.readouterr().out.splitlines()[2:]] == [
        ["grounding/mIoU", "1.000"], ["qa/accuracy", "0.500"], ["parse_failure", "0.250"]]
