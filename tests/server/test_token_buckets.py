"""So many at once, then so many a second, and a table that does not grow."""

from __future__ import annotations

import pytest

from streaming.server.token_buckets import TokenBucket, TokenBuckets


def test_a_bucket_is_drained_and_fills_again() -> None:
    bucket = TokenBucket(3, 2.0, 10.0)
    assert [bucket.take(10.0) for _ in range(5)] == [0, 0, 0, 0.5, 0.5]
    assert bucket.missed == 2
    assert bucket.take(10.25) == pytest.approx(0.25)
    assert bucket.take(10.5) == 0
    assert bucket.take(9.0) == pytest.approx(0.5), "a clock that went back gives nothing"
    assert [bucket.take(1e6) for _ in range(4)] == [0, 0, 0, 0.5], "what was not used is not saved up"


def test_each_key_has_its_own_and_the_longest_unseen_goes_first() -> None:
    """A table of every key that ever came is memory that strangers fill."""
    buckets: TokenBuckets[str] = TokenBuckets(2)
    assert buckets.of("a", 1, 1.0, 0.0).take(0.0) == 0
    assert buckets.of("b", 1, 1.0, 0.0).take(0.0) == 0
    assert buckets.of("a", 1, 1.0, 0.0).take(0.0) == 1, "it is remembered"
    buckets.of("c", 1, 1.0, 0.0)
    assert len(buckets) == 2
    assert buckets.of("a", 1, 1.0, 0.0).missed == 1
    assert buckets.of("b", 1, 1.0, 0.0).take(0.0) == 0, "it was forgotten"
