"""The root of the one exception tree of this package, and the errors that several modules raise or catch.

An error that one module alone raises stands in that module, beside what raises it; it is of this tree, too. `code` is
the stable, machine-readable name that goes over the wire and into logs; the message says what happened and what to do
next. Programmers' errors are assertions, not members of this tree.
"""

from __future__ import annotations

from typing import ClassVar


class StreamingError(Exception):
    """Base of every error that a user, a peer or a checkpoint can cause."""

    code: ClassVar[str] = "internal"
    passes: ClassVar[bool] = False
    """True if the same request may succeed a moment later."""


class CheckpointError(StreamingError):
    """A checkpoint cannot be used: missing, truncated, or not what its config says."""

    code = "bad_checkpoint"


class HubUnreachableError(CheckpointError):
    """A hub id was given and its files are neither cached nor to be had."""

    code = "hub_unreachable"


class TokenLayoutError(CheckpointError):
    """The tokenizer lacks the tokens that a speech model needs, or orders them in a way that cannot be used."""

    code = "bad_token_layout"


class TooLargeError(StreamingError):
    """There is too little memory for what was asked for."""

    code = "too_large"


class EngineFullError(StreamingError):
    """Every slot is taken; come back later."""

    code = "full"
    passes = True


class EngineStoppedError(StreamingError):
    """The engine was closed, or its thread failed, while a session was open."""

    code = "engine_stopped"


class StepFailedError(StreamingError):
    """The step that a session took part in failed. Only the sessions of that step end; a new one may be opened at
    once.
    """

    code = "step_failed"


class StepHungError(StreamingError):
    """A step does not return. The engine ends, and its process has to: nothing can take back what a device was told."""

    code = "step_hung"


class SessionError(StreamingError):
    """A session was asked for something that it cannot do in its present state."""

    code = "bad_state"


class EmptyPromptError(SessionError):
    """A continuation was asked for before a single sample was heard."""

    code = "empty_prompt"


class PromptTooLongError(SessionError):
    """The prompt outgrew the context window of a session that refuses to slide."""

    code = "prompt_too_long"


class TakeGoneError(SessionError):
    """The turn that is to be gone back to is not kept any more."""

    code = "take_gone"


class SavingUnavailableError(SessionError):
    """A server is asked for a session, or given one, that does neither."""

    code = "saving_unavailable"


class SnapshotError(StreamingError):
    """Bytes that are to be a saved session are none, are damaged, or belong to another model."""

    code = "bad_snapshot"


class ProtocolError(StreamingError):
    """A peer broke the wire protocol; its session ends, nobody else's."""

    code = "bad_message"


class AudioError(StreamingError):
    """Audio that cannot be read or converted."""

    code = "bad_audio"


class DeviceError(AudioError):
    """No PortAudio, no such device, or a device that refuses the stream."""

    code = "no_device"


class ContinuationError(StreamingError):
    """A client's turn did not come whole: refused, cut off, or ended by an error of the server's."""

    code = "incomplete"
