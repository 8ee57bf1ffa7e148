"""The native protocol's words, without a socket."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from streaming.audio import FRAME
from streaming.errors import ProtocolError
from streaming.protocol import messages
from streaming.protocol.messages import AudioMessage, OpusMessage, encode_audio
from streaming.protocol.opus import OpusReceiver, OpusSender, opus_available
from streaming.protocol.replay import ReplayBook
from streaming.server.native.dialect import NativeDialect
from streaming.server.opus_threads import OpusThreads, Work
from streaming.server.session_socket import known
from tests.server.live_server import run

pytestmark = pytest.mark.skipif(not opus_available(), reason="no libopus")

SPEECH = (3_000 * np.sin(np.arange(2 * FRAME) / 9)).astype(np.int16)


def test_audio_is_counted_when_it_comes_and_decoded_in_order_by_a_thread() -> None:
    """Where the connection breaks meanwhile, the client must not say again what is being decoded. What cannot be
    decoded is told in its place.
    """

    async def scenario() -> None:
        book = ReplayBook()
        dialect = NativeDialect(lambda message: None, book, "opus", threads=OpusThreads())
        sender = OpusSender()
        said = [*sender.push(AudioMessage(1, 0, SPEECH)), *sender.flush()]
        works = [work for message in said for work in dialect.decode(encode_audio(message))]
        torn = bytes([2 << 3 | 3, 3]) + b"\xff" * 40  # three frames of 40 ms, as far as its head says
        (wrong,) = dialect.decode(encode_audio(OpusMessage(1, len(SPEECH), False, 0, 960, (torn,))))
        assert book.received == len(works) + 1 and len(works) == len(said) > 1
        assert isinstance(wrong, Work)
        await wrong.wait()
        expected = OpusReceiver()
        for work, message in zip(works, said, strict=True):
            assert isinstance(work, Work)
            found = work.result()
            assert isinstance(found, AudioMessage)
            np.testing.assert_array_equal(found.pcm, expected.push(message).pcm)
        assert isinstance(wrong.result(), ProtocolError)
        (too_long,) = dialect.decode(encode_audio(OpusMessage(1, len(SPEECH), False, 0, 960, (b"\xff" * 9,))))
        assert isinstance(too_long, ProtocolError)  # for which nothing need be decoded

    run(scenario())


def test_what_is_being_encoded_when_the_connection_breaks_is_kept_for_the_return() -> None:
    """A frame is encoded in a thread: one that was with the encoder when its socket was lost was never sent again."""

    async def scenario() -> None:
        book = ReplayBook()
        dialect = NativeDialect(lambda message: None, book, "opus", threads=OpusThreads())
        frames = [AudioMessage(1, at, SPEECH[:FRAME]) for at in (0, FRAME)]
        encoding = dialect.encode(frames[0])
        assert isinstance(encoding, Work)
        lost = asyncio.create_task(known(encoding))
        await asyncio.sleep(0)
        lost.cancel()
        with pytest.raises(asyncio.CancelledError):
            await lost
        await encoding.wait()  # as a session's socket does, whatever becomes of it
        then = await known(dialect.encode(frames[1]))
        kept = [messages.decode_opus(data) for data in book.unanswered() if isinstance(data, bytes)]
        assert len(then) == 1 and len(kept) == 2
        assert [(message.fresh, message.position_samples) for message in kept] == [(True, 0), (False, FRAME - 156)]

    run(scenario())
