"""What a Realtime client appends: given, held, committed, cleared."""

from __future__ import annotations

import numpy as np

from streaming.protocol.messages import MAX_AUDIO_SAMPLES
from streaming.server.openai.formats import PCM, Format
from streaming.server.openai.input_buffer import MAX_HELD_SAMPLES, InputBuffer


def pcm(samples: int, value: int = 1) -> bytes:
    return np.full(samples, value, np.int16).tobytes()


def released(buffer: InputBuffer) -> list[tuple[int, int, int]]:
    """Where each piece begins, its length, and its first value."""
    return [(audio.position_samples, len(audio.pcm), int(audio.pcm[0])) for audio in buffer.release()]


def test_audio_is_given_in_messages_that_the_conversation_takes() -> None:
    buffer = InputBuffer(PCM)
    buffer.append(pcm(MAX_AUDIO_SAMPLES + 5))
    assert released(buffer) == [(0, MAX_AUDIO_SAMPLES, 1), (MAX_AUDIO_SAMPLES, 5, 1)]
    buffer.append(pcm(7))
    assert released(buffer) == [(MAX_AUDIO_SAMPLES + 5, 7, 1)]
    assert released(buffer) == []


def test_what_is_held_is_bounded_and_keeps_the_newest() -> None:
    """A client that streams its microphone through a response of an hour filled the memory."""
    buffer = InputBuffer(PCM)
    for value in range(40):
        buffer.append(pcm(MAX_HELD_SAMPLES // 16, value))
        buffer.hold()
    given = buffer.release()
    assert sum(len(audio.pcm) for audio in given) == MAX_HELD_SAMPLES
    assert (given[0].pcm[0], given[-1].pcm[-1]) == (24, 39)


def test_clearing_keeps_what_was_committed() -> None:
    buffer = InputBuffer(PCM)
    buffer.append(pcm(100))
    assert len(released(buffer)) == 1
    buffer.commit()
    assert (buffer.committed, buffer.uncommitted) == (100, 0)
    buffer.append(pcm(50))
    assert len(released(buffer)) == 1
    assert buffer.uncommitted == 50
    buffer.clear_held()
    assert (buffer.clear_given(), buffer.uncommitted) == (100, 0)


def test_clearing_what_is_held_keeps_what_of_it_was_committed() -> None:
    """A clear took what was committed during a response with the rest, and the next one kept too much."""
    buffer = InputBuffer(PCM)
    buffer.begin_turn()
    buffer.append(pcm(100, 1))
    buffer.commit()
    buffer.append(pcm(50, 2))
    buffer.clear_held()
    assert buffer.uncommitted == 0
    assert released(buffer) == [(0, 100, 1)]
    buffer.append(pcm(10, 3))
    assert released(buffer) == [(100, 10, 3)]
    assert buffer.clear_given() == 100


def test_a_new_turn_has_nothing_committed_and_keeps_what_is_not() -> None:
    buffer = InputBuffer(PCM)
    buffer.append(pcm(100))
    buffer.release()
    buffer.commit()
    buffer.begin_turn()
    buffer.append(pcm(30))
    assert (buffer.clear_given(), buffer.uncommitted, buffer.position) == (0, 30, 100)
    buffer.restart()
    assert (buffer.committed, buffer.uncommitted) == (0, 0)


def test_speech_that_ended_has_committed_itself() -> None:
    buffer = InputBuffer(PCM)
    buffer.append(pcm(30))
    buffer.heard()
    assert (buffer.committed, buffer.uncommitted) == (0, 0)
    assert released(buffer) == [(0, 30, 1)]


def test_what_the_old_format_left_is_added_before_the_new_one() -> None:
    """The end of what was said in G.711 was lost in its resampler when the format changed."""
    buffer = InputBuffer(Format("audio/pcmu", 8000))
    buffer.append(bytes([0x10]) * 800)
    buffer.change_format(PCM)
    assert abs(sum(length for _, length, _ in released(buffer)) - 2400) <= 8
    buffer.append(pcm(10, 9))
    assert released(buffer)[-1][1:] == (10, 9)


def test_what_could_not_be_forgotten_counts_as_committed() -> None:
    """The engine reaches back so far and no further. What was left of a cleared buffer counted as gone, and stood in
    the place of what was committed after it, which the next clear took back.
    """
    buffer = InputBuffer(PCM)
    buffer.append(pcm(900))
    buffer.release()
    assert buffer.clear_given() == 0
    buffer.cleared(600)
    buffer.append(pcm(100))
    buffer.release()
    buffer.commit()
    buffer.append(pcm(50))
    buffer.release()
    buffer.clear_held()
    assert buffer.clear_given() == 700
    buffer.cleared(699)  # and the beginning of a frame, which is the conversation's
    assert buffer.committed == 700
    buffer.clear_given()
    buffer.begin_turn()
    buffer.cleared(800)
    assert buffer.committed == 0
