"""A session's settings: what its client chose, and the model's own where it chose nothing."""

from __future__ import annotations

from dataclasses import replace

from streaming.config import Sampling
from streaming.conversation.books import ConversationBooks
from streaming.protocol.messages import SamplingOptions, SessionStart, SessionUpdate


def filled(options: SamplingOptions, usual: Sampling) -> SamplingOptions:
    """Return the options with what the client left open as usual."""
    return SamplingOptions(
        temperature=usual.temperature if options.temperature is None else options.temperature,
        top_k=usual.top_k if options.top_k is None else options.top_k,
        top_p=usual.top_p if options.top_p is None else options.top_p,
        seed=usual.seed if options.seed is None else options.seed,
    )


def sampling_of(options: SamplingOptions) -> Sampling:
    """Return the engine's form of filled options."""
    temperature, top_k, top_p, seed = options.temperature, options.top_k, options.top_p, options.seed
    assert temperature is not None and top_k is not None and top_p is not None and seed is not None
    return Sampling(temperature, top_k, top_p, seed)


class Settings:
    """The settings that hold from the next turn on.

    start: what the client asked for, its sampling filled, or what has become of that since. usual: the model's
    sampling, with the session's seed.
    """

    def __init__(self, start: SessionStart | ConversationBooks, usual: Sampling) -> None:
        self.sampling, self.max_seconds, self.vad = start.sampling, start.max_seconds, start.vad
        self._usual = usual

    def update(self, update: SessionUpdate) -> None:
        """Take what the client changes."""
        if update.max_seconds is not None:
            self.max_seconds = update.max_seconds
        if update.sampling is not None:
            self.sampling = self.filled(update.sampling)
        if update.vad is not None:
            self.vad = update.vad

    def filled(self, sampling: SamplingOptions) -> SamplingOptions:
        """Return the options with the session's seed where they have none, and the model's settings where they leave it
        open.
        """
        assert self.sampling.seed is not None
        return filled(sampling, replace(self._usual, seed=self.sampling.seed))
