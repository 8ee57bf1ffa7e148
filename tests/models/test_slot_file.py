"""A slot's copy as bytes: what is written is read again, and nothing else is."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from streaming.config import Sampling
from streaming.errors import SnapshotError
from streaming.frame_step import FrameStep
from streaming.models.llama import LlamaDecoder
from streaming.models.mimi import StreamingMimi
from streaming.models.slot_copy import SlotCopy
from tests.reference import FRAME, speech

Header = dict[str, Any]
SLOT = np.zeros(1, np.int64)


def step_of(codec: StreamingMimi, decoder: LlamaDecoder, context_frames: int = 6) -> FrameStep:
    step = FrameStep(codec, decoder, 1, context_frames, 4)
    step.open(0, Sampling(seed=3))
    return step


def copied(step: FrameStep) -> SlotCopy:
    copying = step.copy(0, step.reach(0))
    while True:
        try:
            next(copying)
        except StopIteration as done:
            copy: SlotCopy = done.value
            return copy


@pytest.fixture(scope="module")
def step(codec: StreamingMimi, decoder: LlamaDecoder) -> FrameStep:
    return step_of(codec, decoder)


@pytest.fixture(scope="module")
def saved(step: FrameStep) -> bytes:
    for frame in speech(9, seed=1).reshape(9, FRAME):
        step(SLOT, frame[None], np.array([True]), np.array([False]))
    return bytes(step.pack(copied(step), {"more": "said"}))


def parts(data: bytes) -> tuple[Header, bytes]:
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def joined(header: Header | bytes, payload: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + payload


@pytest.mark.parametrize("frames", [0, 1, 9, 20])
def test_what_is_written_is_read_again(codec: StreamingMimi, decoder: LlamaDecoder, frames: int) -> None:
    """Pins pieces that come back at another place, and an empty stream that cannot be written."""
    step = step_of(codec, decoder)
    for frame in speech(frames, seed=1).reshape(frames, FRAME):
        step(SLOT, frame[None], np.array([True]), np.array([False]))
    copy = copied(step)
    again, said = step.unpack(step.pack(copy, {"more": "said"}))
    assert said == {"more": "said"}
    assert (again.identity, again.frames, again.reach) == (copy.identity, copy.frames, copy.reach)
    for name, track in copy.tracks.items():
        assert torch.equal(again.tracks[name].history, track.history)
        for block, wanted in zip(again.tracks[name].blocks, track.blocks, strict=True):
            assert (block.first, block.end) == (wanted.first, wanted.end)
            assert torch.equal(block.both, wanted.both)


def test_the_bytes_are_safetensors_and_end_with_the_place_of_the_signature(saved: bytes) -> None:
    """Pins a format of our own, a layout that safetensors itself would not write, and a signature that is elsewhere
    once a tensor is added.
    """
    assert load(saved)["signature"].tolist() == [0] * 32
    header, payload = parts(saved)
    assert parts(save(load(saved), header["__metadata__"])) == (header, payload)
    assert (len(saved) - len(payload)) % 8 == 0
    assert header["signature"]["data_offsets"] == [len(payload) - 32, len(payload)]


def test_a_stream_that_was_trained_otherwise_or_remembers_more_is_another(
    codec: StreamingMimi, decoder: LlamaDecoder, saved: bytes
) -> None:
    """Pins a session that goes on in another model, and says nonsense."""
    with pytest.raises(SnapshotError, match="another model"):
        step_of(codec, decoder, context_frames=7).unpack(saved)


def test_no_cut_of_it_is_taken(step: FrameStep, saved: bytes) -> None:
    """Pins an upload that broke off, at any length."""
    size = int.from_bytes(saved[:8], "little")
    for length in (*range(16), size, 8 + size, len(saved) - 33, len(saved) - 1):
        with pytest.raises(SnapshotError):
            step.unpack(saved[:length])
    with pytest.raises(SnapshotError):
        step.unpack(saved + b"x")


def change(key: str, value: object) -> Callable[[Header], None]:
    def do(header: Header) -> None:
        header["decoder.keys"][key] = value

    return do


def said(**values: object) -> Callable[[Header], None]:
    def do(header: Header) -> None:
        stream = json.loads(header["__metadata__"]["stream"]) | values
        header["__metadata__"]["stream"] = json.dumps(stream)

    return do


HOSTILE: dict[str, Callable[[Header], object]] = {
    "huge shape": change("shape", [2**40, 2**40, 2**40, 2**40]),
    "shape beyond int64": change("shape", [2**70]),
    "negative shape": change("shape", [-1, 2, 3, 4]),
    "too many axes": change("shape", [1] * 1000),
    "other shape": change("shape", [1, 1, 1, 1]),
    "other type": change("dtype", "F64"),
    "no such type": change("dtype", "PICKLE"),
    "type that is none": change("dtype", None),
    "far away": change("data_offsets", [0, 2**40]),
    "overlapping": change("data_offsets", [0, 64]),
    "backwards": change("data_offsets", [64, 0]),
    "three offsets": change("data_offsets", [0, 1, 2]),
    "a word more": change("note", "x"),
    "lacks one": lambda header: header.pop("decoder.keys"),
    "one more": lambda header: header.update({"../../x": header["decoder.keys"]}),
    "no metadata": lambda header: header.pop("__metadata__"),
    "metadata that is none": lambda header: header.update({"__metadata__": [1]}),
    "numbers in the metadata": lambda header: header["__metadata__"].update({"x": 1}),
    "other version": said(version=2),
    "other model": said(identity="0" * 64),
    "long ago": said(frames=2**62),
    "longer": said(frames=1000),
    "shorter": said(frames=1),
    "negative": said(frames=-1),
    "reaches before its beginning": said(reach=10),
    "reaches far": said(reach=2**39, frames=2**40),
    "reach is a word": said(reach="4"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_header_that_is_not_what_it_must_be_is_refused(step: FrameStep, saved: bytes, name: str) -> None:
    """Pins memory that is taken on a stranger's word, and tensors that lie on each other."""
    header, payload = parts(saved)
    HOSTILE[name](header)
    with pytest.raises(SnapshotError):
        step.unpack(joined(header, payload))


@pytest.mark.parametrize(
    "text",
    [b"[" * 100_000, b'{"a":' * 100_000, b"{}", b"null", b"\xff\xfe", b'{"__metadata__":{"stream":"' + b"[" * 90_000],
    ids=["lists", "objects", "empty", "null", "no text", "unfinished"],
)
def test_a_header_that_is_no_header_is_refused(step: FrameStep, text: bytes) -> None:
    """Pins a stack that overflows over brackets."""
    with pytest.raises(SnapshotError):
        step.unpack(joined(text, b""))


def test_a_size_beyond_the_file_is_not_believed(step: FrameStep) -> None:
    """Pins a header of 2**63 bytes that is to be read first."""
    for size in (2**64 - 1, 2**40, 9 << 20, 100):
        with pytest.raises(SnapshotError):
            step.unpack(size.to_bytes(8, "little") + b"{}")


@pytest.mark.parametrize("name", ["codec_encoder.history", "codec_decoder.keys", "decoder.values"])
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7F800000], ids=["nan", "infinity"])
def test_numbers_that_are_not_finite_are_refused(step: FrameStep, saved: bytes, name: str, bits: int) -> None:
    """Pins a NaN that a slot never gets rid of."""
    header, payload = parts(saved)
    changed = bytearray(payload)
    at = header[name]["data_offsets"][0]
    changed[at : at + 4] = bits.to_bytes(4, "little")
    with pytest.raises(SnapshotError, match="not finite"):
        step.unpack(joined(header, bytes(changed)))


@pytest.mark.parametrize("token", [-1, 4 * 64 + 1, 2**62])
def test_a_token_that_there_is_not_is_refused(step: FrameStep, saved: bytes, token: int) -> None:
    """Pins an index beyond the embedding: on a GPU it ends every session of the process."""
    header, payload = parts(saved)
    changed = bytearray(payload)
    at = header["decoder.history"]["data_offsets"][0]
    changed[at : at + 8] = token.to_bytes(8, "little", signed=True)
    with pytest.raises(SnapshotError, match="token"):
        step.unpack(joined(header, bytes(changed)))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_whatever_byte_is_changed_it_is_an_error_of_ours_or_no_harm(
    step: FrameStep, saved: bytes, data: st.DataObject
) -> None:
    """Pins any other exception, out of whichever library reads the header."""
    size = 8 + int.from_bytes(saved[:8], "little")
    at = data.draw(st.one_of(st.integers(0, size - 1), st.integers(0, len(saved) - 1)))
    changed = bytearray(saved)
    changed[at] = data.draw(st.integers(0, 255))
    try:
        copy, _ = step.unpack(bytes(changed))
    except SnapshotError:
        return
    for _ in step.put(0, copy, Sampling(seed=3)):
        pass
    result = step(SLOT, np.zeros((1, FRAME), np.float32), np.array([False]), np.array([True]))
    assert result.codes.min() >= 0
