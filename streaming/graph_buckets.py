"""The sizes in which steps are captured as CUDA graphs. A step of any other size is filled up to the next one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

_WIDTHS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
"""Numbers of rows that are captured as graphs; a step in between is filled up with rows that belong to no session."""


@dataclass(frozen=True)
class Bucket:
    """The static part of a step: all that its shapes and its sequence of operations depend on.

    width: rows that are computed. columns: entries of the decoder's ring that are looked at. listening, speaking:
    whether any row does; neither: the encoder hears what was spoken, and that is all. few: whether ranking the few
    likeliest tokens is enough (`sampler.FEW`). ends: whether any row's frame may not be whole. first: the first row of
    which the encoder may hear something.
    """

    width: int
    columns: int
    listening: bool
    speaking: bool
    few: bool
    ends: bool = True
    first: int = 0


def following(width: int, first: int = 0) -> Bucket:
    """Return the bucket in which the encoder hears what rows first .. width - 1 have spoken."""
    return Bucket(width, 0, listening=False, speaking=False, few=True, ends=False, first=first)


class Buckets:
    """All buckets that steps of `num_slots` slots are captured in.

    columns: entries of the decoder's ring that are looked at, by the frames of the longest context, the shortest first;
    the last one fits any context.
    """

    def __init__(self, num_slots: int, columns: Mapping[int, int]) -> None:
        self._num_slots, self._columns = num_slots, columns

    def all(self) -> list[Bucket]:
        """Return all of them. The widest comes first: the others share its memory."""
        widths = sorted({min(width, self._num_slots) for width in _WIDTHS} | {self._num_slots}, reverse=True)
        columns = sorted(set(self._columns.values()), reverse=True)
        kinds = [(True, False, True), (False, True, True), (True, True, True)]
        found = [Bucket(width, held, *kind) for width in widths for held in columns for kind in kinds]
        # Ranking all tokens is rarely asked for: at one length of context.
        rare = [Bucket(width, columns[0], heard, True, few=False) for width in widths for heard in (False, True)]
        return found + rare + [following(width) for width in widths]

    def smallest(self, width: int, longest: int, *, listening: bool, speaking: bool, few: bool) -> Bucket:
        """Return the smallest bucket that fits so many rows, the longest of whose contexts has so many frames.

        Any frame in it may end early, since looking at the lengths takes four launches only.
        """
        width = next((w for w in _WIDTHS if width <= w <= self._num_slots), self._num_slots)
        length = next(length for length in self._columns if longest <= length) if few else max(self._columns)
        return Bucket(width, self._columns[length], listening, speaking, few)


class Graphs:
    """A CUDA graph for each bucket, all in one pool of memory. `work` runs a bucket's step from host to host.

    Blocks of a pool belong to the stream on which they were taken, so all are captured on one: the graphs, of which one
    runs at a time, then share the memory of the largest, and cuBLAS' workspace.
    """

    def __init__(self, work: Callable[[Bucket], None], device: torch.device) -> None:
        self._work, self._device = work, device
        self._graphs: dict[Bucket, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def capture(self, bucket: Bucket) -> None:
        """Run the work twice, to warm up, record it, and replay it once, which loads it onto the device. No row may
        listen or speak meanwhile.
        """
        with torch.cuda.device(self._device):
            torch.cuda.synchronize()  # zeroing of state may still be under way, on another stream
            with torch.cuda.stream(self._stream):
                for _ in range(2):
                    self._work(bucket)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                self._work(bucket)
            torch.cuda.synchronize()
            self._graphs[bucket] = graph
            self.replay(bucket)
            torch.cuda.synchronize()

    def __contains__(self, bucket: Bucket) -> bool:
        return bucket in self._graphs

    def replay(self, bucket: Bucket) -> None:
        """Start a captured step."""
        with torch.cuda.device(self._device):
            self._graphs[bucket].replay()
