"""Commands for the engine, in order, whatever room it has."""

from __future__ import annotations

import numpy as np

from streaming.audio import FRAME
from streaming.config import Sampling
from streaming.conversation.engine_commands import EngineCommands
from tests.conversation.engine_model import EngineModel

SPEECH = np.zeros(FRAME, np.float32)


def test_what_comes_behind_a_frame_without_room_waits_with_it() -> None:
    """The word to go on overtook the end of the prompt."""
    engine = EngineModel(room=1)
    commands = EngineCommands(engine)
    assert commands.listen(SPEECH, patient=True) and not commands.waiting
    assert commands.listen(SPEECH, patient=True) and commands.waiting
    commands.configure(Sampling(seed=1))
    commands.speak(1, 5, 2)
    assert engine.log == [("listen",)]
    engine.step()
    commands.heard()
    assert engine.log == [("listen",), ("listen",), ("configure", Sampling(seed=1)), ("speak", 5, 2)]
    assert not commands.waiting and commands.behind_frames == 1


def test_a_frame_that_may_be_dropped_does_not_wait() -> None:
    commands = EngineCommands(EngineModel(room=1))
    assert commands.listen(SPEECH, patient=False)
    assert not commands.listen(SPEECH, patient=False)
    assert not commands.waiting and commands.behind_frames == 1


def test_a_frame_that_may_be_dropped_does_not_overtake_one_that_waits() -> None:
    engine = EngineModel(room=1)
    commands = EngineCommands(engine)
    for _ in range(2):
        commands.listen(SPEECH, patient=True)
    engine.step()
    assert not commands.listen(SPEECH, patient=False), "there is room, and somebody is before it"


def test_what_is_cleared_is_never_commanded() -> None:
    """A session that had ended went on to command its slot, which was somebody else's by then."""
    engine = EngineModel(room=1)
    commands = EngineCommands(engine)
    for _ in range(2):
        commands.listen(SPEECH, patient=True)
    commands.interrupt(1, 0)
    commands.clear()
    engine.step()
    commands.heard()
    assert engine.log == [("listen",)]
