"""Call libopus itself, through ctypes: packets have no container, and the interpreter's lock is free meanwhile.

The library is the one in the package `opuslib-next-bundled`, of which nothing else is used, or else the system's.
`opus_calls` makes the calls of many streams one.
Signatures and constants: https://opus-codec.org/docs/opus_api-1.5/, `opus_encoder` and `opus_decoder`.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
import importlib.util
import weakref
from pathlib import Path

import numpy as np

from streaming.audio import SAMPLE_RATE, Pcm16
from streaming.errors import StreamingError

COMPLEXITY = 6
"""The least complexity that PESQ does not tell from 10: 4.32 and 4.31, and 4.27 with 5 (13 clips, 34,000 bits/s)."""
BITS_PER_S = 34_000
"""Bits a second, at most, on average. A voice takes 29,000 of them."""

_FILES = ("libopus.so", "libopus.dylib", "opus.dll")
_APPLICATION_VOIP = 2048
_SET_BITRATE, _SET_COMPLEXITY = 4002, 4010
MAX_PACKET_BYTES = 1_275 * 6 + 14
"""More than any packet of 120 ms takes: six frames, each with its length (RFC 6716, section 3.2.5)."""


class OpusMissingError(StreamingError):
    """libopus is not installed."""

    code = "opus_missing"


class LibopusError(StreamingError):
    """libopus refused what it was given."""

    code = "libopus"


@functools.cache
def library_path() -> str | None:
    """Return where libopus is, or None if it is nowhere."""
    package = importlib.util.find_spec("opuslib_next")  # found and not imported: it would load the library by itself
    if package is not None and package.origin is not None:
        for name in _FILES:
            bundled = Path(package.origin).parent / "_native" / name
            if bundled.is_file():
                return str(bundled)
    return ctypes.util.find_library("opus")


@functools.cache
def library() -> ctypes.CDLL:
    """Return the library, its functions typed. Raises `OpusMissingError`."""
    path = library_path()
    if path is None:
        raise OpusMissingError("Opus needs libopus: `pip install opuslib-next-bundled`")
    try:
        opened = ctypes.CDLL(path)
    except OSError as error:
        raise OpusMissingError(f"libopus cannot be loaded ({error}): `pip install opuslib-next-bundled`") from None
    pointer, number, data = ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p
    opened.opus_encoder_create.argtypes = (number, number, number, pointer)
    opened.opus_decoder_create.argtypes = (number, number, pointer)
    opened.opus_encoder_create.restype = opened.opus_decoder_create.restype = pointer
    opened.opus_encoder_ctl.argtypes = (pointer, number)  # and what the request takes
    opened.opus_encode.argtypes = (pointer, data, number, data, ctypes.c_int32)
    opened.opus_decode.argtypes = (pointer, data, ctypes.c_int32, pointer, number, number)
    for destroy in (opened.opus_encoder_destroy, opened.opus_decoder_destroy):
        destroy.argtypes, destroy.restype = (pointer,), None
    opened.opus_strerror.argtypes, opened.opus_strerror.restype = (number,), data
    return opened


def error_of(result: int) -> LibopusError:
    """Return the error that libopus tells of by a number below 0."""
    return LibopusError(library().opus_strerror(result).decode())


def decode_error(samples: int, found: int) -> LibopusError:
    """Return what is wrong with a packet of so many samples for which libopus returned something else."""
    return error_of(found) if found < 0 else LibopusError(f"it holds {found} samples, not {samples}")


def _checked(result: int) -> int:
    """Return what libopus returned, unless it tells of an error: then raises `LibopusError`."""
    if result < 0:
        raise error_of(result)
    return result


class Encoder:
    """An encoder of one stream of 24 kHz mono. Raises `OpusMissingError`."""

    def __init__(self) -> None:
        self._library, error = library(), ctypes.c_int()
        self.state: int = self._library.opus_encoder_create(SAMPLE_RATE, 1, _APPLICATION_VOIP, ctypes.byref(error))
        """Its address, for as long as this object is there."""
        _checked(error.value)
        weakref.finalize(self, self._library.opus_encoder_destroy, self.state)
        for request, value in ((_SET_BITRATE, BITS_PER_S), (_SET_COMPLEXITY, COMPLEXITY)):
            _checked(self._library.opus_encoder_ctl(self.state, request, ctypes.c_int32(value)))
        self._packet = ctypes.create_string_buffer(MAX_PACKET_BYTES)

    def encode(self, pcm: Pcm16) -> bytes:
        """Return the packet of these samples, [n] int16, of as many ms as a packet may have. Raises `LibopusError`."""
        assert pcm.dtype == np.int16
        size = self._library.opus_encode(self.state, pcm.tobytes(), len(pcm), self._packet, MAX_PACKET_BYTES)
        return ctypes.string_at(self._packet, _checked(size))


class Decoder:
    """A decoder of one stream to 24 kHz mono. Raises `OpusMissingError`."""

    def __init__(self) -> None:
        self._library, error = library(), ctypes.c_int()
        self.state: int = self._library.opus_decoder_create(SAMPLE_RATE, 1, ctypes.byref(error))
        """Its address, for as long as this object is there."""
        _checked(error.value)
        weakref.finalize(self, self._library.opus_decoder_destroy, self.state)

    def decode(self, packet: bytes, samples: int) -> Pcm16:
        """Return the samples of a packet, [samples] int16. Raises `LibopusError` where it does not hold so many.

        An empty packet would be concealed as a lost one: it is not for this.
        """
        assert packet
        pcm = np.empty(samples, np.int16)
        found = self._library.opus_decode(self.state, packet, len(packet), pcm.ctypes.data, samples, 0)
        if found != samples:
            raise decode_error(samples, found)
        return pcm
