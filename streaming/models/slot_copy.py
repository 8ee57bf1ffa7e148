"""A slot's state taken out of all state, and put into a slot, in pieces between which steps may run.

Only what the stream can still reach is copied: of a ring of keys and values the positions that its next frame looks at,
of the codec's contexts the last one; and as much before these as a copy that can be rewound needs.

What a ring holds at a position below a stream's own never changes until the ring comes round. So a copy may be taken
while its stream goes on, for as many frames as the state can be rewound beyond the copy's own reach; it shares the
pieces that an earlier copy of the same stream holds; and whoever goes back to a copy is given the pieces alone that the
ring has lost since.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from streaming.models.attention import KeyValueRing

_BLOCK_BYTES = 1 << 20
"""Bytes of a piece, keys and values together: about a quarter of a millisecond, on a CPU and on a GPU."""
_BLOCK_POSITIONS = 64


@dataclass(frozen=True)
class Track:
    """One ring of all state and the histories of the same stream, with how a stream moves in them.

    ring: its positions are counted from behind its prefix here. history: [S, depth, N], a row for each of the last
    frames, at index frame % depth. per_frame: positions of a frame. back: how many positions before its own a frame
    looks at. late: how many of the last frame's positions are not in the ring yet. limit: all numbers in the history
    are below it; None: the history holds no indices.
    """

    name: str
    ring: KeyValueRing
    history: Tensor
    per_frame: int
    back: int
    late: int
    limit: int | None = None

    @property
    def block(self) -> int:
        """Positions of a piece."""
        each = 2 * self.ring.keys[0, :, :, 0].nbytes
        return max(1, min(_BLOCK_POSITIONS, _BLOCK_BYTES // each))

    def span(self, frames: int, reach: int) -> tuple[int, int]:
        """Return the first position that a stream of `frames` may look at, and where those that there are end, after
        it was rewound by at most `reach`.
        """
        first = max(0, self.per_frame * (frames - reach) - self.back)
        return first, max(first, self.per_frame * frames - self.late)

    def blocks(self, frames: int, reach: int) -> Iterator[tuple[int, int]]:
        """Cut this span into pieces that are contiguous in the ring, [first, end) each. Where a cut is depends on its
        position alone, so that copies of one stream are cut alike.
        """
        first, last = self.span(frames, reach)
        while first < last:
            end = min((first // self.block + 1) * self.block, (first // self.ring.size + 1) * self.ring.size, last)
            yield first, end
            first = end

    def rows(self, frames: int, reach: int) -> Tensor:
        """Return where the history of a stream's last frames is, the latest first: [k]."""
        last = torch.arange(frames - 1, frames - 1 - min(frames, reach + 1), -1, device=self.history.device)
        return last.remainder(self.history.shape[1])

    def read(self, slot: int, first: int, end: int) -> Tensor:
        """Return a copy of a piece: keys and values, [2, L, H, end - first, D], in the host's memory."""
        keys, values = self.ring.keys[slot], self.ring.values[slot]
        entries = self._entries(first, end)
        both = torch.empty((2, *keys[:, :, entries].shape), dtype=keys.dtype)
        both[0].copy_(keys[:, :, entries])
        both[1].copy_(values[:, :, entries])
        return both

    def write(self, slot: int, block: Block) -> None:
        """Put a piece back where it was."""
        entries = self._entries(block.first, block.end)
        self.ring.keys[slot, :, :, entries].copy_(block.both[0])
        self.ring.values[slot, :, :, entries].copy_(block.both[1])

    def _entries(self, first: int, end: int) -> slice:
        """Return where a piece is in the ring."""
        start = self.ring.prefix + first % self.ring.size
        return slice(start, start + end - first)


@dataclass(frozen=True)
class Block:
    """A piece of a ring, in the host's memory. both: keys and values, [2, L, H, end - first, D]."""

    first: int
    end: int
    both: Tensor


@dataclass(frozen=True)
class TrackCopy:
    """history: [k, N], the latest frame first. blocks: in the stream's order, without a gap."""

    history: Tensor
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class SlotCopy:
    """A copy of a slot, made when its stream was `frames` long, in the host's memory. It is never written to.

    identity: of the models and sizes of the state that it is a part of. reach: how many frames the copy can be rewound.
    tracks: by name.
    """

    identity: str
    frames: int
    reach: int
    tracks: dict[str, TrackCopy]

    def pieces(self) -> dict[int, int]:
        """Return the bytes of each piece of memory, by a number of its own: copies of one stream share pieces."""
        held = [part.history for part in self.tracks.values()]
        held += [block.both for part in self.tracks.values() for block in part.blocks]
        return {id(tensor): tensor.nbytes for tensor in held}


Copying = Generator[None, None, SlotCopy]
"""Yields between two pieces, and returns the copy."""


def take(
    slot: int,
    identity: str,
    frames: int,
    reach: int,
    tracks: Iterable[Track],
    base: SlotCopy | None = None,
    common: int = 0,
) -> Copying:
    """Copy a slot whose stream is `frames` long. It may go on meanwhile, by as many frames as the state can be rewound
    beyond `reach`.

    base: an earlier copy of it, whose pieces are used again as far as both streams have been the same: their first
    `common` frames.
    """
    copied = {}
    for track in tracks:
        history = track.history[slot].index_select(0, track.rows(frames, reach)).cpu()
        yield
        known = {} if base is None else {(block.first, block.end): block for block in base.tracks[track.name].blocks}
        same = track.per_frame * common - track.late
        blocks = []
        for first, end in track.blocks(frames, reach):
            block = known.get((first, end))
            if block is None or end > same:
                block = Block(first, end, track.read(slot, first, end))
                yield
            blocks.append(block)
        copied[track.name] = TrackCopy(history, tuple(blocks))
    return SlotCopy(identity, frames, reach, copied)


def put(
    slot: int, copy: SlotCopy, tracks: Iterable[Track], common: int = 0, longest: int | None = None
) -> Generator[None]:
    """Write a copy into a slot whose position is the copy's already: yield between two pieces.

    longest: None for a slot that is clean. Otherwise the slot has held the stream of the copy since that was taken: it
    was at most so long since, and its first `common` frames have never been others. What the ring has of them still is
    not written again.
    """
    for track in tracks:
        part = copy.tracks[track.name]
        rows = track.rows(copy.frames, copy.reach)
        track.history[slot].index_copy_(0, rows, part.history.to(track.history.device))
        yield
        held = range(0)
        if longest is not None:  # a step writes ahead, by one frame
            held = range(track.per_frame * (longest + 1) - track.ring.size, track.per_frame * common - track.late)
        for block in part.blocks:
            if not (held.start <= block.first and block.end <= held.stop):
                track.write(slot, block)
                yield
