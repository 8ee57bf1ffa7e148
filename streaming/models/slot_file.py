"""A slot's copy as bytes: safetensors, with what else there is to say in the header.

Such bytes come from anywhere. Nothing in them is believed: which tensors there are, of which type and shape, follows
from the reader's own state and the two numbers that say how long the stream is, and where they lie follows from that.
So the header is compared with what it must be, and no memory is taken before. No pickle is read.

The format: https://github.com/huggingface/safetensors#format. The last tensor is the place of a signature.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

import msgspec
import numpy as np
import torch
from torch import Tensor

from streaming.errors import SnapshotError
from streaming.files import AnyBytes
from streaming.models.slot_copy import Block, SlotCopy, Track, TrackCopy

VERSION = 1
SIGNATURE = "signature"
SIGNATURE_BYTES = 32
MAX_HEADER_BYTES = 8 << 20
_ALIGNMENT = 8
_MAX_FRAMES = 2**40
"""3,000 years. No arithmetic on positions overflows below it."""
_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}

_Size = Annotated[int, msgspec.Meta(ge=0, le=_MAX_FRAMES)]


class _Stream(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The stream as the header describes it. identity: of the models and sizes that it belongs to."""

    version: int
    identity: str
    frames: _Size
    reach: _Size


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    dtype: str
    shape: Annotated[list[_Size], msgspec.Meta(max_length=4)]
    data_offsets: Annotated[list[_Size], msgspec.Meta(min_length=2, max_length=2)]


def pack(copy: SlotCopy, said: dict[str, str]) -> memoryview:
    """Return a copy as bytes, in memory that is the caller's. said: what else stands in the header, by name.

    Python's other threads run meanwhile: PyTorch, which copies, does not hold the interpreter. safetensors' own `save`
    does, for as long as tens of megabytes take.
    """
    parts = {}  # each tensor in pieces, and along which dimension they follow one another
    for name, track in copy.tracks.items():
        parts[f"{name}.history"] = 0, [track.history]
        if track.blocks:
            parts[f"{name}.keys"] = 2, [block.both[0] for block in track.blocks]
            parts[f"{name}.values"] = 2, [block.both[1] for block in track.blocks]
    parts[SIGNATURE] = 0, [torch.zeros(SIGNATURE_BYTES, dtype=torch.uint8)]
    stream = _Stream(VERSION, copy.identity, copy.frames, copy.reach)
    header: dict[str, object] = {"__metadata__": {"stream": msgspec.json.encode(stream).decode(), **said}}
    laid, at = {}, 0
    # As safetensors sorts them, the largest types first: all are aligned, and the signature's bytes are the last.
    for name, (dim, pieces) in sorted(parts.items(), key=lambda part: (-part[1][1][0].itemsize, part[0])):
        shape, dtype = list(pieces[0].shape), pieces[0].dtype
        shape[dim] = sum(piece.shape[dim] for piece in pieces)
        laid[name] = at, shape
        end = at + math.prod(shape) * dtype.itemsize
        header[name] = _Entry(_NAMES.get(dtype, "U8"), shape, [at, end])
        at = end
    text = msgspec.json.encode(header)
    text += b" " * (-len(text) % _ALIGNMENT)
    start = 8 + len(text)
    whole = torch.empty(start + at, dtype=torch.uint8)
    data = whole.numpy().data
    data[:start] = len(text).to_bytes(8, "little") + text
    for name, (first, shape) in laid.items():
        dim, pieces = parts[name]
        dtype = pieces[0].dtype
        tensor = whole[start + first :][: math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
        for target, piece in zip(tensor.split([piece.shape[dim] for piece in pieces], dim), pieces, strict=True):
            target.copy_(piece)
    return data


def most_bytes(tracks: Sequence[Track]) -> int:
    """Return a bound on what `pack` makes of a copy of this state, its header included."""
    return MAX_HEADER_BYTES + sum(2 * track.ring.keys[0].nbytes + track.history[0].nbytes for track in tracks)


def unpack(
    data: AnyBytes, identity: str, tracks: Sequence[Track], rewind_frames: int
) -> tuple[SlotCopy, dict[str, str]]:
    """Return what `pack` was given. tracks, rewind_frames: of the state that the copy is to be put into.

    Raises `SnapshotError` for anything that `pack` does not make of a copy of such a state.
    """
    entries, said, start = _header(data)
    try:
        stream = msgspec.json.decode(said.pop("stream", ""), type=_Stream)
    except (msgspec.DecodeError, RecursionError) as error:
        raise SnapshotError(f"this is no saved session: {error}") from None
    if stream.version != VERSION:
        raise SnapshotError(f"the saved session has format {stream.version}, and this is format {VERSION}")
    if stream.identity != identity:
        raise SnapshotError(
            "the saved session belongs to another model, another type of numbers, or another context: load what it was "
            "saved with"
        )
    if stream.reach > min(stream.frames, rewind_frames):
        raise SnapshotError(f"the saved session is damaged: it reaches back {stream.reach} of {stream.frames} frames")
    wanted = _wanted(stream, tracks)
    _compare(entries, wanted, len(data) - start)
    copies = {}
    for track in tracks:
        history, keys, values = (
            _tensor(data, start, entries[name], wanted[name][0]) if (name := f"{track.name}.{part}") in wanted else None
            for part in ("history", "keys", "values")
        )
        assert history is not None
        if track.limit is not None and not ((history >= 0) & (history < track.limit)).all():
            raise SnapshotError("the saved session is damaged: it holds a token that there is not")
        blocks = []
        if keys is not None and values is not None:
            both = torch.stack((keys, values))
            offset, _ = track.span(stream.frames, stream.reach)
            cuts = track.blocks(stream.frames, stream.reach)
            blocks = [Block(first, end, both[:, :, :, first - offset : end - offset]) for first, end in cuts]
        copies[track.name] = TrackCopy(history, tuple(blocks))
    return SlotCopy(identity, stream.frames, stream.reach, copies), said


def _header(data: AnyBytes) -> tuple[dict[str, _Entry], dict[str, str], int]:
    """Return the entries of the tensors, what else is said, and where the tensors begin."""
    if len(data) < 8:
        raise SnapshotError("this is no saved session: it is cut off")
    size = int.from_bytes(data[:8], "little")
    if size > MAX_HEADER_BYTES or size > len(data) - 8:
        raise SnapshotError(f"this is no saved session, or it is cut off: its header says that it has {size} bytes")
    try:
        raw = msgspec.json.decode(data[8 : 8 + size], type=dict[str, msgspec.Raw])
        said = msgspec.json.decode(raw.pop("__metadata__", b"{}"), type=dict[str, str])
        entries = {name: msgspec.json.decode(entry, type=_Entry) for name, entry in raw.items()}
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise SnapshotError(f"this is no saved session: {error}") from None
    return entries, said, 8 + size


def _wanted(stream: _Stream, tracks: Sequence[Track]) -> dict[str, tuple[torch.dtype, list[int]]]:
    """Return the type and shape of each tensor that there must be."""
    wanted: dict[str, tuple[torch.dtype, list[int]]] = {}
    for track in tracks:
        rows = min(stream.frames, stream.reach + 1)
        wanted[f"{track.name}.history"] = (track.history.dtype, [rows, *track.history.shape[2:]])
        first, end = track.span(stream.frames, stream.reach)
        if end > first:
            _, layers, heads, _, head_dim = track.ring.keys.shape
            for part in ("keys", "values"):
                wanted[f"{track.name}.{part}"] = (track.ring.keys.dtype, [layers, heads, end - first, head_dim])
    wanted[SIGNATURE] = (torch.uint8, [SIGNATURE_BYTES])
    return wanted


def _compare(entries: dict[str, _Entry], wanted: dict[str, tuple[torch.dtype, list[int]]], size: int) -> None:
    """Raise `SnapshotError` unless there are these tensors, one behind another, in exactly so many bytes."""
    if entries.keys() != wanted.keys():
        names = ", ".join(sorted(name[:40] for name in entries.keys() ^ wanted.keys())[:3])
        raise SnapshotError(f"the saved session is damaged: it lacks these tensors, or has too many: {names}")
    at = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        dtype, shape = wanted[name]
        kind = _NAMES.get(dtype, "U8")
        if entry.dtype != kind or entry.shape != shape:
            raise SnapshotError(f"the saved session is damaged: {name} is {entry.dtype[:8]} {entry.shape}")
        if entry.data_offsets != [at, at + math.prod(shape) * dtype.itemsize]:
            raise SnapshotError(f"the saved session is damaged: {name} does not lie where it must")
        at = entry.data_offsets[1]
    if at != size or entries[SIGNATURE].data_offsets[1] != at:
        raise SnapshotError("the saved session is cut off, or something stands behind it")


def _tensor(data: AnyBytes, start: int, entry: _Entry, dtype: torch.dtype) -> Tensor:
    """Return a tensor in memory of its own. Raises `SnapshotError` for numbers that are not finite."""
    first, end = entry.data_offsets
    if first == end:
        return torch.zeros(entry.shape, dtype=dtype)
    tensor = torch.empty(entry.shape, dtype=dtype)
    with memoryview(data) as view, view[start + first : start + end] as part:
        # NumPy lets other threads run while it copies.
        np.copyto(tensor.view(-1).view(torch.uint8).numpy(), np.frombuffer(part, np.uint8))
    if not tensor.isfinite().all():
        raise SnapshotError("the saved session is damaged: it holds numbers that are not finite")
    return tensor
