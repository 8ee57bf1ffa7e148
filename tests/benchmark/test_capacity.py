"""The search for the most sessions."""

from __future__ import annotations

import asyncio

import pytest

from streaming.benchmark.capacity import search


@pytest.mark.parametrize("most", [1, 2, 7, 8, 100])
def test_the_search_finds_every_limit_and_tries_no_level_twice(most: int) -> None:
    for limit in range(most + 2):
        tried: list[int] = []

        async def passes(sessions: int, limit: int = limit, tried: list[int] = tried) -> bool:
            tried.append(sessions)
            return sessions <= limit

        assert asyncio.run(search(passes, most)) == min(limit, most)
        assert len(set(tried)) == len(tried) and all(1 <= n <= most for n in tried)
        assert len(tried) <= 2 * most.bit_length() + 1
