"""Takes: another continuation of a prompt, the way back to an earlier one, and what is given up for them."""

from __future__ import annotations

from typing import Any

import pytest

from streaming.audio import FRAME
from streaming.conversation.conversation import HeardByClock, HeardNothing
from streaming.conversation.takes import Takes, TakesMemory
from streaming.errors import TakeGoneError
from streaming.protocol import messages
from streaming.protocol.messages import InputClear, Interrupt, SamplingOptions, SessionClose, Take, TakeKeep, TakeKept
from tests.conversation.engine_model import EngineModel, Talk
from tests.conversation.test_conversation import NO, SAID, SPEAK, VAD, interrupted, speaking, the_error


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


def answered(reach: int, takes: TakesMemory | None) -> Talk:
    """A client was answered three frames to two of its own. reach: how many can be rewound."""
    talk = Talk(engine=EngineModel(length=3), takes=takes)
    talk.engine.reach = reach
    talk.turn(2)
    talk.replies()
    talk.wait(1.0)
    talk.engine.log.clear()
    return talk


@pytest.mark.parametrize("reach", [1, 3])
def test_what_nobody_heard_is_said_otherwise_the_next_time(reach: int) -> None:
    """OpenAI's clients delete a response and ask for another: it was the same again, or followed what was left of the
    first one.
    """
    talk = answered(reach, TakesMemory(1))
    talk.say(HeardNothing(1))
    assert not talk.conversation.ready, "nobody knows yet what is left"
    talk.step()
    talk.say(SPEAK)
    talk.step()
    back = ("go_back", "prompt 1")
    commands = [command for command in talk.engine.log if command[0] not in ("configure", "mark", "unmark")]
    assert commands == [("interrupt", 1, 0), *([back] if reach < 3 else []), back, ("speak", 250, 5)]
    (configure,) = (command for command in talk.engine.log if command[0] == "configure")
    assert configure[1].seed == 9
    cut, started, *told = talk.told()
    assert cut == interrupted(1, 0)
    assert (started.turn, started.of) == (2, 1)
    assert told == [speaking(2, 2), "audio 3", (2, "end", 3)]


def test_what_is_said_next_follows_the_prompt_of_what_nobody_heard() -> None:
    """Pins a continuation that stays in the stream because nobody asked for another one."""
    talk = answered(1, TakesMemory(1))
    talk.say(HeardNothing(1))
    talk.step()
    talk.turn()
    kinds = [command[0] for command in talk.engine.log if command[0] not in ("mark", "unmark")]
    assert kinds[:3] == ["interrupt", "go_back", "listen"]
    assert "configure" not in kinds, "drawn as ever: it is another prompt"
    assert talk.told()[-1] == (2, "end", 3)


def test_without_takes_there_is_another_one_of_what_could_be_taken_back() -> None:
    """Pins `--takes 0` that gives the same response again, or one that follows half of the first."""
    talk = answered(3, None)
    talk.say(HeardNothing(1))
    talk.step()
    talk.say(SPEAK)
    talk.step()
    assert [command[1].seed for command in talk.engine.log if command[0] == "configure"] == [9]
    assert talk.told()[-1] == (2, "end", 3)
    talk = answered(1, None)
    talk.say(HeardNothing(1))
    talk.step()
    assert talk.told() == [interrupted(1, 2)]
    for _ in range(2):
        talk.say(SPEAK)
        assert the_error(talk) == ("take_gone", "speak")
    talk.turn()
    assert talk.told()[-1] == (2, "end", 3)


def test_a_turn_whose_next_prompt_has_begun_stays() -> None:
    """Pins speech that is thrown away with the response before it, which cannot be taken back any more."""
    talk = answered(3, TakesMemory(1))
    talk.hear()
    talk.step()
    talk.say(HeardNothing(1))
    talk.step()
    talk.say(SPEAK)
    talk.step()
    assert not [command for command in talk.engine.log if command[0] in ("go_back", "configure")]
    assert talk.told() == [interrupted(1, 3), speaking(2, 1), "audio 3", (2, "end", 3)]


def test_a_turn_that_was_stopped_before_its_first_frame_was_played_is_unsaid() -> None:
    """By the clock as by the client's word. Pins a response that is cancelled at once and comes again."""
    talk = Talk(engine=EngineModel(), takes=TakesMemory(1))
    talk.turn()
    talk.replies()
    talk.say(HeardByClock(1))
    talk.step()
    talk.say(SPEAK)
    talk.step()
    assert [command[1].seed for command in talk.engine.log if command[0] == "configure"] == [9]
    assert speaking(2, 1) in talk.told()


def test_a_session_may_keep_fewer_turns_than_the_server_allows_and_no_ends() -> None:
    """Pins memory that every OpenAI session would hold for what no client of it can ask for."""
    takes = Takes(TakesMemory(4), 1, ends=False)
    assert list(takes.keep_prompt(1, "prompt 1")) == []
    assert not takes.wants_end(1)
    assert list(takes.keep_prompt(2, "prompt 2")) == ["prompt 1"]
    assert (1 in takes, 2 in takes) == (False, True)
    assert Takes(TakesMemory(2), 5).turns == 2
