"""Replies in order, and what an interruption takes out of them."""

from __future__ import annotations

import numpy as np

from streaming.audio import FRAME
from streaming.conversation.outbox import End, Outbox, Reply
from streaming.protocol.messages import AudioMessage, Pong, TurnDone


def audio(turn: int) -> AudioMessage:
    return AudioMessage(turn, 0, np.zeros(FRAME, np.int16))


def done(turn: int, frames: int) -> TurnDone:
    return TurnDone(turn=turn, reason="end", samples=frames * FRAME, first_frame_ms=None, mean_step_ms=None)


def filled(*replies: Reply) -> Outbox:
    outbox = Outbox()
    for reply in replies:
        outbox.put(reply)
    return outbox


def taken(outbox: Outbox) -> list[Reply]:
    found = []
    while (reply := outbox.take()) is not None:
        found.append(reply)
    return found


def test_replies_come_out_as_they_went_in() -> None:
    replies = [audio(1), done(1, 1), End(None, 1000, "")]
    outbox = filled(*replies)
    assert len(outbox) == 3
    assert all(one is other for one, other in zip(taken(outbox), replies, strict=True))
    assert len(outbox) == 0


def test_a_turn_that_was_cut_loses_its_audio_and_its_end_counts_what_was_sent() -> None:
    """The end of a turn that waited behind its own audio counted frames that never came."""
    pong = Pong(id=1, client_time_ms=0.0, server_time_ms=0.0)
    kept = audio(1)
    outbox = filled(kept, done(1, 5), audio(2), pong, audio(2), done(2, 9))
    outbox.cut(2, 7 * FRAME)
    left = taken(outbox)
    assert left[0] is kept
    assert left[1:] == [done(1, 5), pong, done(2, 7)]


def test_what_nobody_will_take_is_forgotten() -> None:
    outbox = filled(audio(1), done(1, 5))
    outbox.clear()
    assert taken(outbox) == []
