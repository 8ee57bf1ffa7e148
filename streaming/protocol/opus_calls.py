"""Encode and decode Opus for many streams in one call, where there is a C compiler: `opus_calls.c` calls libopus.

With a call of its own for each stream, a thread asks for the interpreter's lock after each millisecond, and finds all
that Python needs pushed out of the processor's caches by libopus. Where nothing can be compiled, it is done like that.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from streaming import compiler
from streaming.audio import Pcm16
from streaming.protocol.libopus import (
    MAX_PACKET_BYTES,
    Decoder,
    Encoder,
    LibopusError,
    OpusMissingError,
    decode_error,
    error_of,
    library,
)

_LOG = logging.getLogger(__name__)
_SOURCE = Path(__file__).with_name("opus_calls.c")
_FLAGS = ("-O2", "-fPIC", "-shared")


class Block(NamedTuple):
    """What is to be a packet. pcm: [n] int16, as `Encoder.encode` takes it."""

    encoder: Encoder
    pcm: Pcm16


class Packet(NamedTuple):
    """What is to be audio. samples: how many it holds."""

    decoder: Decoder
    data: bytes
    samples: int


def encode(blocks: Sequence[Block]) -> list[bytes | LibopusError]:
    """Return each block's packet, or why there is none. They are encoded in this order."""
    calls = _calls()
    if calls is None:
        return [_encoded(block) for block in blocks]
    encoders = np.array([block.encoder.state for block in blocks], np.uintp)
    samples = np.array([len(block.pcm) for block in blocks], np.int64)
    pcm = np.concatenate([block.pcm for block in blocks])
    assert pcm.dtype == np.int16
    packets, sizes = np.empty((len(blocks), MAX_PACKET_BYTES), np.uint8), np.empty(len(blocks), np.int64)
    calls.encode(
        calls.opus_encode,
        len(blocks),
        encoders.ctypes.data,
        pcm.ctypes.data,
        samples.ctypes.data,
        packets.ctypes.data,
        MAX_PACKET_BYTES,
        sizes.ctypes.data,
    )
    return [
        packet[:size].tobytes() if size >= 0 else error_of(size)
        for packet, size in zip(packets, sizes.tolist(), strict=True)
    ]


def decode(packets: Sequence[Packet]) -> list[Pcm16 | LibopusError]:
    """Return each packet's samples, or why they cannot be had. They are decoded in this order; none may be empty."""
    assert all(packet.data for packet in packets)
    calls = _calls()
    if calls is None:
        return [decode_one(packet) for packet in packets]
    decoders = np.array([packet.decoder.state for packet in packets], np.uintp)
    sizes = np.array([len(packet.data) for packet in packets], np.int64)
    lengths = [packet.samples for packet in packets]
    samples, found = np.array(lengths, np.int64), np.empty(len(packets), np.int64)
    pcm = np.empty(sum(lengths), np.int16)
    calls.decode(
        calls.opus_decode,
        len(packets),
        decoders.ctypes.data,
        b"".join([packet.data for packet in packets]),
        sizes.ctypes.data,
        pcm.ctypes.data,
        samples.ctypes.data,
        found.ctypes.data,
    )
    outcomes: list[Pcm16 | LibopusError] = []
    at = 0
    for length, result in zip(lengths, found.tolist(), strict=True):
        outcomes.append(pcm[at : at + length] if result == length else decode_error(length, result))
        at += length
    return outcomes


def _encoded(block: Block) -> bytes | LibopusError:
    try:
        return block.encoder.encode(block.pcm)
    except LibopusError as error:
        return error.with_traceback(None)


def decode_one(packet: Packet) -> Pcm16 | LibopusError:
    """Return what `decode` returns of one packet; nothing is compiled for it."""
    try:
        return packet.decoder.decode(packet.data, packet.samples)
    except LibopusError as error:
        return error.with_traceback(None)


class _Calls:
    """The functions of `opus_calls.c`, and where those of libopus are, which they call."""

    def __init__(self, path: Path) -> None:
        """Raises `OSError` and `AttributeError`, and `OpusMissingError`."""
        opened, opus = ctypes.CDLL(str(path)), library()
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        self.encode, self.decode = opened.opus_calls_encode, opened.opus_calls_decode
        self.encode.argtypes = (pointer, number, pointer, pointer, pointer, pointer, number, pointer)
        self.decode.argtypes = (pointer, number, pointer, ctypes.c_char_p, pointer, pointer, pointer, pointer)
        self.encode.restype = self.decode.restype = None
        self.opus_encode = ctypes.cast(opus.opus_encode, pointer).value
        self.opus_decode = ctypes.cast(opus.opus_decode, pointer).value


@functools.cache
def _calls() -> _Calls | None:
    """Return the compiled functions, or None where they cannot be had. Raises `OpusMissingError`."""
    if os.environ.get(compiler.SWITCH) == "0":
        return None
    try:
        command = compiler.compiler()
        parts = (_SOURCE.read_text(encoding="utf-8"), compiler.run(*command, "--version"), *_FLAGS)
        return compiler.kept(
            "opus-calls",
            (*parts, compiler.processor()),
            lambda built: compiler.run(*command, *_FLAGS, str(_SOURCE), "-o", str(built)),
            _Calls,
        )
    except compiler.FAILURES as error:
        _LOG.info("libopus is called for each session by itself, slower: %s", compiler.reason(error))
        return None


def prepare() -> None:
    """Compile what is to be compiled, once on each machine, so that no session waits for it."""
    with suppress(OpusMissingError):
        _calls()
