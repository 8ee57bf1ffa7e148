"""All state of all slots, and one step over it, on the device and without a look at the host."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from streaming.audio import FRAME
from streaming.graph_buckets import Bucket
from streaming.models.codec_state import STEPS
from streaming.models.llama import LlamaDecoder
from streaming.models.mimi import StreamingMimi
from streaming.models.sampler import Drawing, SamplerState
from streaming.models.slot_copy import Track

_LAYERS_AT_ONCE = 8
"""Outputs of the codec's widest layer that a step holds for a row: 1.0 MB of the demo's, measured over 32 rows."""


class DeviceStep:
    """All state of all slots, and the step over it: on the device, without a look at the host.

    inputs: [S, 1920 + 3] float32, a row's pcm, how many samples of it are heard, whether it speaks, its slot.
    outputs: [S, 1920 + Q + 2] float32, a row's pcm, codes, whether it ended, whether its numbers are finite.

    hears: [S + 1] bool, by slot, whether the encoder's numbers have been finite so far.

    There is one slot more than sessions, the last. Rows that only fill a bucket are that slot, and neither listen nor
    speak: whatever they write is written there, ahead of a stream that never begins.
    """

    def __init__(
        self,
        codec: StreamingMimi,
        decoder: LlamaDecoder,
        num_slots: int,
        context_frames: int,
        rewind_frames: int,
    ) -> None:
        self.codec, self.decoder, self.context_frames = codec, decoder, context_frames
        self.spare = num_slots
        self.codec_state = codec.init_state(num_slots + 1, rewind_frames)
        self.decoder_state = decoder.init_state(num_slots + 1, context_frames, rewind_frames)
        self.sampler = SamplerState.allocate(num_slots + 1, codec.device)
        self.hears = torch.ones(num_slots + 1, dtype=torch.bool, device=codec.device)
        self.inputs = torch.zeros(num_slots, FRAME + 3, device=codec.device)
        self.inputs[:, -1] = self.spare
        self.outputs = torch.zeros(num_slots, FRAME + codec.num_codebooks + 2, device=codec.device)

    def tracks(self) -> list[Track]:
        """Return what of a slot's state a copy of it holds; the rest follows from the stream's position."""
        books, mimi, llama = self.codec.num_codebooks, self.codec_state, self.decoder_state
        halves = {"codec_encoder": mimi.encoder, "codec_decoder": mimi.decoder}
        back = self.codec.config.window - 1
        return [
            *(Track(name, half.ring, half.contexts, STEPS, back, 0) for name, half in halves.items()),
            Track(
                "decoder",
                llama.ring,
                llama.lasts,
                books,
                books * (self.context_frames - 1),
                late=1,
                limit=books * self.decoder.codebook_size,
            ),
        ]

    def place(self, slot: int, frames: int) -> None:
        """Say how long a slot's stream is."""
        for position in (self.codec_state.encoder.frames, self.codec_state.decoder.frames, self.decoder_state.frames):
            position[slot] = frames

    @torch.inference_mode()
    def advance(self, bucket: Bucket) -> None:
        """Run one step: read `inputs`, write `outputs`."""
        codec, decoder, state = self.codec, self.decoder, self.decoder_state
        batch, books = bucket.width, codec.num_codebooks
        pcm, flags = self.inputs[:batch, :FRAME], self.inputs[:batch, FRAME:-1] > 0
        listening, speaking, slots = flags[:, 0], flags[:, 1], self.inputs[:batch, -1].long()
        if bucket.listening:
            lengths = self.inputs[:batch, FRAME].long() if bucket.ends else None
            # What stands in the other rows must not matter: a NaN would outlast its frame, masked or not.
            latent = codec.follow(
                torch.where(listening[:, None], pcm, 0.0), self.codec_state, listening, lengths, slots
            )
            codes, finite = codec.quantizer.encode(latent), latent.isfinite().all(dim=1) & self.hears[slots]
            self.hears[slots] = finite
        else:
            finite = self.hears[slots]
            codes = torch.zeros(batch, books, dtype=torch.int64, device=pcm.device)
        ended = torch.zeros_like(speaking)
        view = decoder.begin_frame(state, slots, self.context_frames, bucket.columns)
        unit = decoder.last_units(state, slots)
        if not bucket.speaking:
            units = torch.cat((unit[:, None], decoder.units(codes)[:, :-1]), dim=1)
            finite &= decoder.forward(units, state, view).isfinite().all(dim=(1, 2))
        else:
            drawing = Drawing(slots, state.frames, listening, speaking, codes, ended, finite)
            for book in range(books):
                hidden = decoder.forward(unit[:, None], state, view.columns(book, book + 1))
                unit = decoder.draw(hidden[:, 0], book, self.sampler, drawing, bucket.few)
        alive = (listening | speaking) & ~ended
        decoder.end_frame(codes, state, slots, alive)
        audio = codec.decode(codes, self.codec_state, alive, slots).float()
        finite &= audio.isfinite().all(dim=1)
        outputs = self.outputs[:batch]
        outputs[:, :FRAME] = audio
        outputs[:, FRAME : FRAME + books] = codes
        outputs[:, -2], outputs[:, -1] = ended, finite

    @torch.inference_mode()
    def follow(self, first: int, width: int) -> None:
        """Let the encoder hear what rows first .. width - 1 of the step before have spoken, those that spoke."""
        inputs, outputs = self.inputs[first:width], self.outputs[first:width]
        slots, spoke = inputs[:, -1].long(), (inputs[:, FRAME + 1] > 0) & (outputs[:, -2] == 0)
        latent = self.codec.follow(outputs[:, :FRAME], self.codec_state, spoke, slots=slots)
        self.hears[slots] &= latent.isfinite().all(dim=1) | ~spoke


class _OnPaper(TorchFunctionMode):
    """Makes tensors that take no memory, on PyTorch's meta device."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = dict(kwargs or {})
        if "device" in given:
            given["device"] = "meta"
        return function(*args, **given)


def _tensors(state: object) -> Iterator[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        yield state
    elif is_dataclass(state):
        for field in fields(state):
            yield from _tensors(getattr(state, field.name))


def slot_bytes(codec: StreamingMimi, decoder: LlamaDecoder | None, context_tokens: int, rewind_frames: int) -> int:
    """Return how much memory a slot takes: its state, and what a step of it holds for the moment. Takes none itself.

    decoder: None for the codec alone. Raises `RuntimeError` for sizes that overflow.
    """
    held: tuple[object, ...]
    with _OnPaper():
        if decoder is None:
            held = (codec.init_state(1, rewind_frames),)
        else:
            frames = decoder.context_frames(context_tokens)
            step = DeviceStep(codec, decoder, 1, frames, rewind_frames)
            held = (step.codec_state, step.decoder_state, step.sampler, step.inputs, step.outputs)
    tensors = [tensor for part in held for tensor in _tensors(part)]
    state = sum(tensor.nbytes // len(tensor) for tensor in tensors)  # there is a spare slot, too
    return state + _LAYERS_AT_ONCE * FRAME * codec.config.num_filters * codec.activations.itemsize
