"""The books of two peers that lose each other."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streaming.errors import ProtocolError
from streaming.protocol.replay import ACK_EVERY, WINDOW, ReplayBook


@given(st.lists(st.integers(0, 40), max_size=30), st.randoms(use_true_random=False))
def test_whatever_arrives_before_a_loss_nothing_is_lost_or_doubled(bursts: list[int], random: object) -> None:
    """Each burst arrives in part, then the connection is lost and what is missing is sent again."""
    sender, receiver = ReplayBook(), ReplayBook()
    got: list[str] = []
    number = 0
    for burst in bursts:
        for _ in range(burst):
            sender.send(str(number))
            number += 1
        arriving = sender.unanswered()
        for data in arriving[: random.randint(0, len(arriving))]:  # type: ignore[attr-defined]
            got.append(data)
            ack = receiver.receive()
            if ack is not None and random.random() < 0.5:  # type: ignore[attr-defined]
                sender.acknowledge(ack.received)
        sender.acknowledge(receiver.received)
    got += sender.unanswered()
    assert got == [str(n) for n in range(number)]


def test_answers_are_due_well_before_the_window_is_full() -> None:
    assert 2 * ACK_EVERY <= WINDOW
    book = ReplayBook()
    answers = [book.receive() for _ in range(3 * ACK_EVERY)]
    assert [answer.received for answer in answers if answer is not None] == [ACK_EVERY, 2 * ACK_EVERY, 3 * ACK_EVERY]


def test_no_more_than_the_window_is_on_its_way() -> None:
    book = ReplayBook()
    for _ in range(WINDOW):
        assert book.has_room()
        book.send("x")
    assert not book.has_room()
    book.acknowledge(1)
    assert book.has_room() and not book.has_room(2)


def test_there_is_room_when_nobody_will_ask_for_what_is_kept() -> None:
    """A sender with a full window waited for ever once the session was given up."""
    book = ReplayBook()
    for _ in range(WINDOW):
        book.send("x")
    book.forget()
    assert book.has_room(WINDOW) and book.unanswered() == []


@pytest.mark.parametrize("received", [0, 5, 2**63 - 1])
def test_what_cannot_have_arrived_is_an_error(received: int) -> None:
    """A count that went back, or past what was sent, would have made a hole."""
    book = ReplayBook()
    for _ in range(4):
        book.send("x")
    book.acknowledge(2)
    with pytest.raises(ProtocolError):
        book.acknowledge(received)
    assert len(book.unanswered()) == 2
