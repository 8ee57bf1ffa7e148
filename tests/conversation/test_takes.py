"""Takes: another continuation of a prompt, the way back to an earlier one, and what is given up for them."""

from __future__ import annotations

from typing import Any

import pytest

from streaming.audio import FRAME
from streaming.conversation.takes import Takes, TakesMemory
from streaming.errors import TakeGoneError
from streaming.protocol import messages
from streaming.protocol.messages import InputClear, Interrupt, SamplingOptions, SessionClose, Take, TakeKeep, TakeKept
from tests.conversation.engine_model import EngineModel, Talk
from tests.conversation.test_conversation import NO, SAID, VAD, speaking, the_error


def talk_with_takes(memory: TakesMemory | None = None, **start: Any) -> Talk:
    return Talk(engine=EngineModel(length=3), takes=memory or TakesMemory(2), **start)


def since(talk: Talk, at: int) -> list[tuple[Any, ...]]:
    return talk.engine.log[at:]


def test_a_take_is_another_turn_from_the_end_of_the_same_prompt() -> None:
    """Pins a second take that follows the first one, has its seed, or loses its prompt's length."""
    talk = talk_with_takes()
    talk.turn(2)
    assert talk.engine.log == [("listen",), ("listen",), ("mark", "prompt 1"), ("speak", 250, 5)]
    assert talk.told() == [speaking(1, 2), "audio 3", (1, "end", 3)]
    before = len(talk.engine.log)
    talk.say(Take(turn=1))
    talk.step()
    mark, back, configure, speak = since(talk, before)
    assert (mark, back, speak) == (("mark", "end 1"), ("go_back", "prompt 1"), ("speak", 250, 5))
    started, *told = talk.told()
    assert (started.turn, started.of, started.sampling.seed) == (2, 1, 9)
    assert configure[1].seed == 9
    assert told == [speaking(2, 2), "audio 3", (2, "end", 3)]


def test_a_take_may_be_of_a_take_and_have_its_own_sampling_and_length() -> None:
    """Pins a prompt that is known by its first turn's number alone, and sampling that the next turn keeps."""
    talk = talk_with_takes()
    talk.turn()
    talk.say(Take(turn=1))
    talk.step()
    talk.told()
    before = len(talk.engine.log)
    talk.say(Take(turn=2, max_seconds=0.08, sampling=SamplingOptions(temperature=0.0, seed=5)))
    talk.step()
    assert ("go_back", "prompt 1") in since(talk, before)
    assert since(talk, before)[-1] == ("speak", 1, 5)
    assert talk.told()[-2:] == ["audio 1", (3, "max_seconds", 1)]
    talk.turn()
    configured = [command[1] for command in talk.engine.log if command[0] == "configure"]
    assert [(one.temperature, one.seed) for one in configured[-2:]] == [(0.0, 5), (0.8, 7)]


def test_the_conversation_goes_on_from_the_take_that_is_kept() -> None:
    """Pins an earlier continuation that is lost, or kept twice, or marked as another turn's."""
    talk = talk_with_takes()
    talk.turn()
    talk.say(Take(turn=1))
    talk.step()
    talk.told()
    before = len(talk.engine.log)
    talk.say(TakeKeep(turn=1))
    assert talk.told() == [TakeKept(turn=3, of=1)]
    talk.turn()
    marked, back, heard, prompt, unmarked, configured, spoke = since(talk, before)
    assert (marked, back, heard) == (("mark", "end 2"), ("go_back", "end 1"), ("listen",))
    assert (prompt, unmarked, spoke) == (("mark", "prompt 3"), ("unmark", "end 1"), ("speak", 250, 5))
    assert configured[1].seed == 7
    assert talk.told() == [speaking(3, 1), "audio 3", (3, "end", 3)]


def test_keeping_the_last_turn_goes_back_only_over_what_was_said_since() -> None:
    """Pins a prompt that stays in the stream after it was taken back."""
    talk = talk_with_takes()
    talk.turn()
    talk.told()
    before = len(talk.engine.log)
    talk.say(TakeKeep(turn=1))
    assert since(talk, before) == []
    talk.hear(1.5)
    talk.say(TakeKeep(turn=1))
    assert since(talk, before) == [("mark", "end 1"), ("listen",), ("go_back", "end 1")]
    assert talk.told() == [TakeKept(turn=2, of=1), TakeKept(turn=2, of=1)]


def test_a_prompt_that_was_begun_is_dropped_by_a_take() -> None:
    """Pins half a sentence that is heard with the prompt of the take."""
    talk = talk_with_takes()
    talk.turn(2)
    talk.hear(3.5)
    talk.say(Take(turn=1))
    talk.step()
    assert talk.told()[-3:] == [speaking(2, 2), "audio 3", (2, "end", 3)]
    talk.turn(1)
    assert talk.told()[0] == speaking(3, 1)


def test_a_turn_that_is_spoken_is_interrupted_first() -> None:
    """Pins a take that begins while its origin is still being spoken."""
    talk = talk_with_takes()
    talk.engine.length = 100
    talk.turn()
    talk.replies()
    for message in (Take(turn=1), TakeKeep(turn=1)):
        talk.say(message)
        assert the_error(talk) == ("bad_state", message.type)
    talk.say(Interrupt(turn=1, heard_samples=FRAME), Take(turn=1))
    talk.step()
    assert speaking(2, 1) in talk.told()


@pytest.mark.parametrize("message", [Take(turn=7), TakeKeep(turn=7)])
def test_a_turn_that_is_not_kept_is_refused_and_nothing_is_lost(message: Take | TakeKeep) -> None:
    """Pins a session that ends, or forgets its prompt, over a number that is wrong."""
    talk = talk_with_takes()
    talk.turn()
    talk.hear(2)
    talk.step()
    talk.replies()
    talk.say(message)
    assert the_error(talk) == ("take_gone", message.type)
    talk.say(messages.Speak(turn=2))
    talk.step()
    assert talk.told()[0] == speaking(2, 2)


def test_a_client_that_did_not_ask_for_takes_has_none_and_pays_for_none() -> None:
    """Pins copies that are made for every client."""
    talk = Talk(engine=EngineModel(length=3))
    talk.turn()
    talk.replies()
    talk.say(Take(turn=1))
    assert the_error(talk) == ("bad_state", "take")
    assert not talk.engine.marks


def test_the_oldest_turns_are_given_up_first() -> None:
    """Pins marks that grow with the talk."""
    memory = TakesMemory(2)
    talk = talk_with_takes(memory)
    for _ in range(20):
        talk.turn()
        talk.replies()
        assert len(talk.engine.marks) <= 4
    assert memory.held_bytes == 1000 * len(talk.engine.marks)
    talk.say(Take(turn=18))
    assert the_error(talk) == ("take_gone", "take")
    talk.say(Take(turn=19))
    talk.step()
    assert talk.told()[-1] == (21, "end", 3)


def test_marks_that_hold_too_much_are_given_up_and_the_talk_goes_on() -> None:
    """Pins a host whose memory is the sum of what its clients would like."""
    memory = TakesMemory(4, server_bytes=2500)
    first, second = talk_with_takes(memory), talk_with_takes(memory)
    for _ in range(3):
        for talk in (first, second):
            talk.turn()
            assert talk.told()[-1][1] == "end"
    assert memory.held_bytes <= 2500 + 1000
    for talk in (first, second):
        talk.say(SessionClose())
    assert memory.held_bytes == 0


def test_a_take_in_vad_mode_drops_what_is_being_heard() -> None:
    """Pins speech that goes on into a take, and a microphone that is not heard after it."""
    talk = Talk(engine=EngineModel(length=3), takes=TakesMemory(2), turn_taking="vad", vad=VAD)
    talk.voice(*SAID)
    talk.step()
    talk.replies()
    talk.wait(1.0)
    talk.voice(0.9, 0.9, 0.9, 0.9, 0.9)
    talk.say(Take(turn=1))
    talk.step()
    assert talk.told()[-1] == (2, "end", 3)
    talk.wait(1.0)
    talk.voice(*NO * 3, *SAID)
    talk.step()
    assert talk.told()[-1] == (3, "end", 3)


def test_what_was_cleared_can_be_taken_again_from_the_turn_before() -> None:
    """Pins a mark that outlives the prompt that it stood in."""
    talk = talk_with_takes()
    talk.turn()
    talk.hear(2)
    talk.say(InputClear(), Take(turn=1))
    talk.step()
    assert talk.told()[-1] == (2, "end", 3)


def test_takes_of_one_prompt_share_its_mark() -> None:
    """Pins a mark that is given up with its first turn, though a take of it is kept."""
    takes = Takes(TakesMemory(2))
    assert list(takes.keep_prompt(1, "prompt 1")) == []
    assert list(takes.keep_prompt(2, "prompt 1")) == []
    assert list(takes.keep_prompt(3, "prompt 3")) == []
    assert takes.prompt(2) == "prompt 1"
    assert list(takes.keep_prompt(4, "prompt 4")) == ["prompt 1"]
    with pytest.raises(TakeGoneError):
        takes.prompt(2)
