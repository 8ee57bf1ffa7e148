"""A step over sessions whose contexts are full, as the measurements of a step run it: the most that it can cost."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from streaming.audio import FRAME
from streaming.frame_step import FrameStep, StepResult
from streaming.loading import REWIND_FRAMES, frames_of_context
from streaming.models.attention import FrameView
from streaming.models.llama import LlamaDecoder
from streaming.models.mimi import StreamingMimi
from streaming.models.sampler import Drawing


class FullStep:
    """`slots` open sessions that draw, each with a full context of nothing. graphs: see `FrameStep`."""

    def __init__(
        self, codec: StreamingMimi, decoder: LlamaDecoder, slots: int, context_tokens: int, graphs: bool = True
    ) -> None:
        self.step = FrameStep(codec, decoder, slots, frames_of_context(decoder, context_tokens), REWIND_FRAMES, graphs)
        self.step.fill(slots)
        codec_state = self.step._device.codec_state
        for half in (codec_state.encoder, codec_state.decoder):
            half.frames.fill_(max(self.step.context_frames, codec.config.window))
        self._decoder, self._rows = decoder, np.arange(slots)
        self._slots = torch.arange(slots, device=decoder.device)
        self._pcm = np.zeros((slots, FRAME), np.float32)
        self._yes, self._no = np.ones(slots, np.bool_), np.zeros(slots, np.bool_)

    def listen(self) -> StepResult:
        """Run a step in which all hear silence."""
        return self.step(self._rows, self._pcm, self._yes, self._no)

    def speak(self) -> StepResult:
        """Run a step in which all speak."""
        return self.step(self._rows, self._pcm, self._no, self._yes)

    def one_pass(self) -> Tensor:
        """Run the decoder for one token of each."""
        return self._decoder.forward(self._unit(), self.step._device.decoder_state, self._view().columns(0, 1))

    def one_frame(self) -> None:
        """Run the decoder for a frame of each, drawing its codes, and do not advance."""
        decoder, device = self._decoder, self.step._device
        view, unit = self._view(), self._unit()
        flags = torch.ones(4, len(self._rows), dtype=torch.bool, device=decoder.device)
        codes = torch.zeros(len(self._rows), decoder.num_codebooks, dtype=torch.int64, device=decoder.device)
        drawing = Drawing(self._slots, device.decoder_state.frames, ~flags[0], flags[1], codes, flags[2], flags[3])
        for book in range(decoder.num_codebooks):
            hidden = decoder.forward(unit, device.decoder_state, view.columns(book, book + 1))
            unit = decoder.draw(hidden[:, 0], book, device.sampler, drawing, few=True)[:, None]

    def _unit(self) -> Tensor:
        return torch.zeros(len(self._rows), 1, dtype=torch.int64, device=self._decoder.device)

    def _view(self) -> FrameView:
        state, frames = self.step._device.decoder_state, self.step.context_frames
        return self._decoder.begin_frame(state, self._slots, frames, self._decoder.columns_for(state, frames))
