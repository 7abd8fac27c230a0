"""What is printed."""

import rewards
from lib import tables


def test_every_reason_has_its_words():
    assert set(tables.WHY_UNREADABLE) == rewards.UNREADABLE
