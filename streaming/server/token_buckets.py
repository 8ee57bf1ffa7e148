"""Token buckets: so many at once, then so many a second. A bounded table holds one for each key."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)


class TokenBucket:
    """A bucket that is full with `burst` tokens and gets `per_s` each second. `now` is in seconds, of one clock."""

    __slots__ = ("_at", "_burst", "_level", "_per_s", "missed")

    def __init__(self, burst: float, per_s: float, now: float) -> None:
        self._burst, self._per_s = burst, per_s
        self._level, self._at = burst, now
        self.missed = 0
        """How often no token was left. Whoever reports the number sets it back to 0."""

    def take(self, now: float) -> float:
        """Take a token. Return 0, or in how many seconds there will be one if there is none. A clock that went back
        gives nothing.
        """
        refilled = self._level + max(0.0, now - self._at) * self._per_s
        self._level, self._at = min(self._burst, refilled), now
        if self._level < 1:
            self.missed += 1
            return (1 - self._level) / self._per_s
        self._level -= 1
        return 0.0


class TokenBuckets(Generic[Key]):
    """Token buckets by key, `capacity` of them at most. The one that was not asked for for longest goes first."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._buckets: OrderedDict[Key, TokenBucket] = OrderedDict()

    def __len__(self) -> int:
        """Return how many keys are remembered."""
        return len(self._buckets)

    def of(self, key: Key, burst: float, per_s: float, now: float) -> TokenBucket:
        """Return the bucket of `key`. It is a full one, with this `burst` and `per_s`, where there was none."""
        bucket = self._buckets.get(key)
        if bucket is None:
            while len(self._buckets) >= self._capacity:
                self._buckets.popitem(last=False)
            bucket = self._buckets[key] = TokenBucket(burst, per_s, now)
        self._buckets.move_to_end(key)
        return bucket
