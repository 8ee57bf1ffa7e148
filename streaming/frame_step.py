"""One step: every ready slot advances by one frame.

    listening: encode the frame, feed its tokens, decode it again (which keeps the decoder warm: the hand-over has no
    seam)
    speaking:  draw Q tokens, decode them, let the encoder hear the result (so the next turn follows what was heard)

It is the only place where the codec, the decoder and the sampler meet, and the only one that copies to the device and
back: once a step, at its ends. Slots that take no part are computed along with the others and do not advance.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streaming.audio import FRAME
from streaming.config import Sampling
from streaming.models.llama import LlamaDecoder
from streaming.models.mimi import StreamingMimi
from streaming.models.sampler import SamplerState, sample


@dataclass(frozen=True)
class StepResult:
    """pcm: float32 [B, 1920]; codes: int64 [B, Q]; ended: bool [B], true where a speaking slot drew `</audio>`; broken:
    bool [B], true where a slot's numbers are not finite any more: it has to be opened anew.

    A slot that ended did not advance, and its pcm and codes mean nothing; nor do those of slots that took no part.
    """

    pcm: NDArray[np.float32]
    codes: NDArray[np.int64]
    ended: NDArray[np.bool_]
    broken: NDArray[np.bool_]


class FrameStep:
    """The step over `num_slots` slots and all their state.

    context_frames: what a slot remembers. rewind_frames: how far a slot can be rewound.
    encoder_follows: whether the encoder hears the continuation (docs/decisions.md has why it does).
    """

    def __init__(
        self,
        codec: StreamingMimi,
        decoder: LlamaDecoder,
        num_slots: int,
        context_frames: int,
        rewind_frames: int,
        encoder_follows: bool = True,
    ) -> None:
        assert num_slots >= 1 and context_frames >= 1 and rewind_frames >= 0
        assert codec.num_codebooks == decoder.num_codebooks and codec.device == decoder.device
        self.num_slots, self.num_codebooks = num_slots, codec.num_codebooks
        self.context_frames, self.rewind_frames = context_frames, rewind_frames
        self._codec, self._decoder, self._follows = codec, decoder, encoder_follows
        self._codec_state = codec.init_state(num_slots, rewind_frames)
        self._decoder_state = decoder.init_state(num_slots, context_frames, rewind_frames)
        self._sampler = SamplerState.allocate(num_slots, codec.device)
        self._frames = np.zeros(num_slots, np.int64)  # the streams' lengths, as the host knows them
        self._least = np.zeros(num_slots, np.int64)  # and how short rewinding can make them
        self._spoken = np.zeros((num_slots, rewind_frames + 1), np.bool_)  # whether each of the last frames was spoken

    def open(self, slot: int, sampling: Sampling) -> None:
        """Gives a slot to a new session. Nothing of the one before it remains."""
        self._codec_state.scrub(slot)
        self._decoder_state.scrub(slot)
        self._frames[slot] = self._least[slot] = 0
        self._sampler.set(slot, sampling)

    def configure(self, slot: int, sampling: Sampling) -> None:
        """Changes how a slot draws its tokens."""
        self._sampler.set(slot, sampling)

    def is_fatal(self, error: Exception) -> bool:
        """Whether, after this error of a step, the device is lost. Running out of memory is not: a narrower step may
        fit.
        """
        return isinstance(error, torch.AcceleratorError) and not isinstance(error, torch.OutOfMemoryError)

    def frames(self, slot: int) -> int:
        """How many frames a slot's stream is long."""
        return int(self._frames[slot])

    def rewind(self, slot: int, frames: int) -> None:
        """Takes back a slot's last frames, as if they had never been: at most `rewind_frames` of the longest it was."""
        length = int(self._frames[slot])
        assert 0 <= frames <= length - self._least[slot], (frames, length, self._least[slot])
        taken = np.arange(length - frames, length) % self._spoken.shape[1]
        heard = frames if self._follows else int((~self._spoken[slot, taken]).sum())
        self._codec_state.encoder.frames[slot] -= heard
        self._codec_state.decoder.frames[slot] -= frames
        self._decoder_state.frames[slot] -= frames
        self._frames[slot] -= frames

    def __call__(
        self, pcm: NDArray[np.float32], listening: NDArray[np.bool_], speaking: NDArray[np.bool_]
    ) -> StepResult:
        """pcm: [B, 1920], read where listening; listening, speaking: [B], never both. B <= num_slots; the first B
        slots.
        """
        assert pcm.shape == (len(listening), FRAME) and listening.shape == speaking.shape, (pcm.shape, listening.shape)
        assert not (listening & speaking).any() and (listening | speaking).any()
        batch = len(listening)
        longest = int(self._frames[:batch][listening | speaking].max())
        device = self._codec.device
        out = self._advance(
            torch.from_numpy(pcm).to(device),
            torch.from_numpy(listening).to(device),
            torch.from_numpy(speaking).to(device),
            bool(listening.any()),
            bool(speaking.any()),
            self._decoder.columns_for(self._decoder_state, longest),
        )
        codes, ended, finite, audio = (t.cpu().numpy() for t in out)
        advanced = (listening | speaking) & ~ended
        rows = np.flatnonzero(advanced)
        self._spoken[rows, self._frames[rows] % self._spoken.shape[1]] = speaking[rows]
        self._frames[:batch] += advanced
        self._least[:batch] = np.maximum(self._least[:batch], self._frames[:batch] - self.rewind_frames)
        return StepResult(audio, codes, ended, (listening | speaking) & ~finite)

    @torch.inference_mode()
    def _advance(
        self, pcm: Tensor, listening: Tensor, speaking: Tensor, any_listening: bool, any_speaking: bool, columns: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The step on the device, with no look back at the host.

        Returns codes [B, Q], ended [B], finite [B], pcm [B, 1920].
        """
        codec, decoder, state = self._codec, self._decoder, self._decoder_state
        batch = pcm.shape[0]
        if any_listening:
            # What stands in the other rows must not matter: a NaN would outlast its frame, masked or not.
            latent = codec.follow(torch.where(listening[:, None], pcm, 0.0), self._codec_state, listening)
            codes, finite = codec.quantizer.encode(latent), latent.isfinite().all(dim=1)
        else:
            finite = torch.ones_like(speaking)
            codes = torch.zeros(batch, self.num_codebooks, dtype=torch.int64, device=pcm.device)
        ended = torch.zeros_like(speaking)
        view = decoder.begin_frame(state, batch, self.context_frames, columns)
        unit = decoder.last_units(state, batch)
        if not any_speaking:
            units = torch.cat((unit[:, None], decoder.units(codes)[:, :-1]), dim=1)
            finite &= decoder.forward(units, state, view).isfinite().all(dim=(1, 2))
        else:
            number = state.frames[:batch] * self.num_codebooks
            for book in range(self.num_codebooks):
                hidden = decoder.forward(unit[:, None], state, view.columns(book, book + 1))
                finite &= hidden.isfinite().all(dim=(1, 2))
                drawn = sample(decoder.logits(hidden[:, 0], book), self._sampler, number + book)
                if book == 0:
                    ended = speaking & (drawn == decoder.codebook_size)
                drawn = drawn.clamp(max=decoder.codebook_size - 1)
                codes[:, book] = torch.where(listening, codes[:, book], drawn)
                unit = codes[:, book] + book * decoder.codebook_size
        alive = (listening | speaking) & ~ended
        decoder.end_frame(codes, state, alive)
        audio = codec.decode(codes, self._codec_state, alive).float()
        finite &= audio.isfinite().all(dim=1)
        if any_speaking and self._follows:
            latent = codec.follow(audio, self._codec_state, speaking & ~ended)
            finite &= latent.isfinite().all(dim=1) | ~speaking
        return codes, ended, finite, audio
