"""The books of two peers that lose each other."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streaming.errors import ProtocolError
from streaming.protocol.replay import ACK_EVERY, WINDOW, Exchange


@given(st.lists(st.integers(0, 40), max_size=30), st.randoms(use_true_random=False))
def test_whatever_arrives_before_a_loss_nothing_is_lost_or_doubled(bursts: list[int], random: object) -> None:
    """Each burst arrives in part, then the connection is lost and what is missing is sent again."""
    sender, receiver = Exchange(), Exchange()
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
    exchange = Exchange()
    answers = [exchange.receive() for _ in range(3 * ACK_EVERY)]
    assert [answer.received for answer in answers if answer is not None] == [ACK_EVERY, 2 * ACK_EVERY, 3 * ACK_EVERY]


def test_no_more_than_the_window_is_on_its_way() -> None:
    async def scenario() -> None:
        exchange = Exchange()
        for _ in range(WINDOW):
            await exchange.room()
            exchange.send("x")
        waiting = asyncio.create_task(exchange.room())
        await asyncio.sleep(0)
        assert not waiting.done()
        assert not waiting.done()
        exchange.acknowledge(1)
        await waiting

    asyncio.run(scenario())


@pytest.mark.parametrize("received", [0, 5, 2**63 - 1])
def test_what_cannot_have_arrived_is_an_error(received: int) -> None:
    """A count that went back, or past what was sent, would have made a hole."""
    exchange = Exchange()
    for _ in range(4):
        exchange.send("x")
    exchange.acknowledge(2)
    with pytest.raises(ProtocolError):
        exchange.acknowledge(received)
    assert len(exchange.unanswered()) == 2
