"""One step: every session that is ready advances by one frame.

    listening: encode the frame, feed its tokens, decode it again (which keeps the decoder warm: the hand-over has no
    seam)
    speaking:  draw Q tokens, decode them
    afterwards, once the audio is its listener's: let the encoder hear what was spoken, so that the next turn follows it

Only here is anything copied to the device and back: once a step, at its ends. All state lies by slot
(`device_step.py`); a step has a row for each session that is ready, and a row says which slot it is. So a step costs
what is ready, whichever slots that are. On a GPU it is the replay of a captured graph (`graph_buckets.py`).
"""

from __future__ import annotations

import time
from collections.abc import Generator
from dataclasses import dataclass
from hashlib import sha256

import numpy as np
import torch
from numpy.typing import NDArray

from streaming.audio import FRAME
from streaming.config import Sampling
from streaming.device_step import DeviceStep
from streaming.files import AnyBytes
from streaming.graph_buckets import Bucket, Buckets, Graphs, following
from streaming.models.faults import is_lost
from streaming.models.llama import LlamaDecoder
from streaming.models.mimi import StreamingMimi
from streaming.models.sampler import FEW
from streaming.models.slot_copy import Copying, SlotCopy, put, take

_ENDLESS = 2**31
"""Frames of a stream that fills any context."""


@dataclass(frozen=True)
class StepResult:
    """pcm: float32 [R, 1920]; codes: int64 [R, Q]; ended: bool [R], true where a speaking row drew `</audio>`; broken:
    bool [R], true where a row's numbers are not finite any more: its slot has to be opened anew.

    A slot that ended did not advance, and its row's pcm and codes mean nothing.
    """

    pcm: NDArray[np.float32]
    codes: NDArray[np.int64]
    ended: NDArray[np.bool_]
    broken: NDArray[np.bool_]


class FrameStep:
    """The step over `num_slots` slots, as the engine drives it.

    context_frames: what a slot remembers. rewind_frames: how far a slot can be rewound.
    graphs: whether steps on a CUDA device are captured; off, they run operation by operation.
    """

    def __init__(
        self,
        codec: StreamingMimi,
        decoder: LlamaDecoder,
        num_slots: int,
        context_frames: int,
        rewind_frames: int,
        graphs: bool = True,
    ) -> None:
        assert num_slots >= 1 and context_frames >= 1 and rewind_frames >= 0
        assert codec.num_codebooks == decoder.num_codebooks and codec.device == decoder.device
        self.num_slots, self.num_codebooks = num_slots, codec.num_codebooks
        self.context_frames, self.rewind_frames = context_frames, rewind_frames
        self._device = DeviceStep(codec, decoder, num_slots, context_frames, rewind_frames)
        sizes = (context_frames, rewind_frames, codec.activations, decoder.dtype)
        self.identity = sha256(repr((codec.fingerprint, decoder.fingerprint, *sizes)).encode()).hexdigest()
        """A text that is the same for two steps where a copy of a slot of one can be put into the other."""
        self._graphs: Graphs | None = None
        self._inputs, self._outputs = self._device.inputs, self._device.outputs  # the host's
        if codec.device.type == "cuda":
            self._inputs = torch.zeros(self._inputs.shape, pin_memory=True)
            self._outputs = torch.zeros(self._outputs.shape, pin_memory=True)
            self._graphs = Graphs(self._work, codec.device) if graphs else None
        self._given, self._got = self._inputs.numpy(), self._outputs.numpy()
        self._nobody = np.array((0, 0, self._device.spare), np.float32)  # what follows the pcm of a row that only fills
        # Lengths of context that are captured: one, where attention reads no more than a slot holds anyway.
        lengths = () if decoder.operations.bounded else (context_frames // 4, context_frames // 2)
        self._buckets = Buckets(num_slots, {length: self._columns(length) for length in (*lengths, _ENDLESS)})
        self._unheard: Bucket | None = None  # the bucket in which the encoder hears the step before, if it has not yet
        self._sampling = [Sampling()] * num_slots
        self._frames = np.zeros(num_slots, np.int64)  # the streams' lengths, as the host knows them
        self._least = np.zeros(num_slots, np.int64)  # the least lengths that rewinding can give them

    def open(self, slot: int, sampling: Sampling) -> None:
        """Give a slot to a new session. Nothing of the session before it remains."""
        self.follow()
        self._device.hears[slot] = True
        self._device.codec_state.scrub(slot)
        self._device.decoder_state.scrub(slot)
        self._frames[slot] = self._least[slot] = 0
        self.configure(slot, sampling)

    def configure(self, slot: int, sampling: Sampling) -> None:
        """Change how a slot draws its tokens."""
        self._sampling[slot] = sampling
        self._device.sampler.set(slot, sampling)

    def is_fatal(self, error: Exception) -> bool:
        """Return whether this error of a step means that the device is lost.

        Running out of memory does not mean that: a narrower step may fit.
        """
        return is_lost(error)

    @property
    def operations(self) -> str:
        """Which operations run: the decoder's and the codec's, by name, once if they are the same."""
        names = dict.fromkeys((self._device.decoder.operations.name, self._device.codec.operations.name))
        return ", ".join(names) if len(names) == 1 else "decoder {}, codec {}".format(*names)

    def frames(self, slot: int) -> int:
        """Return how many frames a slot's stream is long."""
        return int(self._frames[slot])

    def reach(self, slot: int) -> int:
        """Return how many of a slot's last frames `rewind` can take back.

        It is at most `rewind_frames` before the longest that the stream has been.
        """
        return int(self._frames[slot] - self._least[slot])

    def rewind(self, slot: int, frames: int) -> None:
        """Take back a slot's last frames, as if they had never been: at most `reach` of them."""
        self.follow()
        length = int(self._frames[slot])
        assert 0 <= frames <= self.reach(slot), (frames, length, self._least[slot])
        self._place(slot, length - frames)

    def copy(self, slot: int, reach: int, base: SlotCopy | None = None, common: int = 0) -> Copying:
        """Copy a slot to the host's memory, a piece after another: what `take` says. The slot is not rewound meanwhile,
        and advances by at most `rewind_frames - reach` frames.

        reach: how many frames the copy is to be rewound at most; the slot must reach as far.
        """
        self.follow()
        assert 0 <= reach <= self.reach(slot), (reach, self.reach(slot))
        return take(slot, self.identity, int(self._frames[slot]), reach, self._device.tracks(), base, common)

    def put(
        self, slot: int, copy: SlotCopy, sampling: Sampling, common: int = 0, longest: int | None = None
    ) -> Generator[None]:
        """Give a slot to the stream of a copy, a piece after another; the slot takes part in no step meanwhile. See
        `slot_copy.put`; with `longest`, it is the stream that the slot has.
        """
        if longest is None:
            self.open(slot, sampling)
        else:
            self.follow()
            self.configure(slot, sampling)
        self._place(slot, copy.frames)  # done first: a step that computes idle slots along writes behind this position
        self._least[slot] = copy.frames - copy.reach
        yield
        yield from put(slot, copy, self._device.tracks(), common, longest)

    def pack(self, copy: SlotCopy, said: dict[str, str]) -> memoryview:
        """Return a copy as bytes, and what else is to be said with it. Any thread may call this."""
        from streaming.models.slot_file import pack  # needs msgspec, which a step itself does without

        return pack(copy, said)

    @property
    def most_packed_bytes(self) -> int:
        """A bound on what `pack` returns."""
        from streaming.models.slot_file import most_bytes

        return most_bytes(self._device.tracks())

    def unpack(self, data: AnyBytes) -> tuple[SlotCopy, dict[str, str]]:
        """Return what `pack` was given. Any thread may call this. Raises `SnapshotError` for what it never makes, or
        makes for steps of another `identity`.
        """
        from streaming.models.slot_file import unpack

        return unpack(data, self.identity, self._device.tracks(), self.rewind_frames)

    def _place(self, slot: int, frames: int) -> None:
        self._device.place(slot, frames)
        self._frames[slot] = frames

    def buckets(self) -> list[Bucket]:
        """Return all buckets that are captured, none on a CPU. The widest comes first."""
        return [] if self._graphs is None else self._buckets.all()

    def warm_up(self) -> None:
        """Capture all buckets, so that no step has to. No slot's stream changes."""
        for bucket in self.buckets():
            self._prepare(bucket)

    def __call__(
        self,
        slots: NDArray[np.int64],
        pcm: NDArray[np.float32],
        listening: NDArray[np.bool_],
        speaking: NDArray[np.bool_],
        lengths: NDArray[np.int64] | None = None,
    ) -> StepResult:
        """slots: [R], the slot of each row, all different; pcm: [R, 1920], read where listening; listening, speaking:
        [R], one of both; lengths: [R], how many samples of its pcm each row hears, 1 to 1920 where listening; None:
        all.
        """
        batch = len(slots)
        assert 1 <= batch == len(set(slots.tolist())) and 0 <= slots.min() <= slots.max() < self.num_slots, slots
        assert pcm.shape == (batch, FRAME) and slots.shape == listening.shape == speaking.shape, (pcm.shape, slots)
        assert (listening ^ speaking).all(), (listening, speaking)
        if lengths is None:
            lengths = np.full(batch, FRAME)
        assert lengths.shape == listening.shape, (lengths.shape, listening.shape)
        heard = lengths[listening]
        assert ((heard >= 1) & (heard <= FRAME)).all(), lengths
        self.follow()
        bucket = self._bucket(slots, listening, speaking, ends=bool((heard < FRAME).any()))
        self._prepare(bucket)
        if bucket.speaking:
            self._unheard = following(bucket.width, 0 if self._graphs is not None else int(speaking.argmax()))
            self._prepare(self._unheard)
        self._given[:batch, :FRAME] = pcm
        self._given[:batch, FRAME:] = np.stack((listening * lengths, speaking, slots), axis=1)
        self._given[batch : bucket.width, FRAME:] = self._nobody
        self._run(bucket)
        if self._device.codec.device.type == "cuda":
            torch.cuda.current_stream(self._device.codec.device).synchronize()
        got = self._got[:batch].copy()
        ended, finite = got[:, -2] > 0, got[:, -1] > 0
        self._frames[slots] += ~ended
        self._least[slots] = np.maximum(self._least[slots], self._frames[slots] - self.rewind_frames)
        codes = got[:, FRAME : FRAME + self.num_codebooks].astype(np.int64)
        return StepResult(got[:, :FRAME], codes, ended, ~finite)

    def follow(self) -> None:
        """Let the encoder hear what was spoken in the step before: call it once the audio is on its way.

        Whatever needs it does so itself. On a GPU it returns before it is done, and what comes next waits for it there.
        """
        if self._unheard is not None:
            bucket, self._unheard = self._unheard, None
            self._run(bucket)

    def fill(self, rows: int) -> None:
        """Give the first slots to sessions that draw, their contexts full of nothing: what a step costs at most."""
        for slot in range(rows):
            self.open(slot, Sampling(seed=slot))
            self._place(slot, self.context_frames)
            self._least[slot] = self.context_frames

    def rehearse(self, rows: int) -> float:
        """Return the seconds that a step takes in which so many sessions speak whose contexts are full, until the
        encoder has heard it. What the first slots held is lost.
        """
        slots, device = np.arange(rows), self._device
        pcm, speaking = np.zeros((rows, FRAME), np.float32), np.ones(rows, np.bool_)
        self.fill(rows)
        started = time.perf_counter()
        self(slots, pcm, ~speaking, speaking)
        self.follow()
        if device.codec.device.type == "cuda":
            torch.cuda.synchronize(device.codec.device)
        return time.perf_counter() - started

    def _run(self, bucket: Bucket) -> None:
        if self._graphs is not None:
            self._graphs.replay(bucket)
        else:
            self._work(bucket)

    def _work(self, bucket: Bucket) -> None:
        """Run one step from the host's inputs to the host's outputs. On a CPU these are the device's own."""
        device = self._device
        if not bucket.listening and not bucket.speaking:
            device.follow(bucket.first, bucket.width)
            return
        if self._inputs is not device.inputs:
            device.inputs[: bucket.width].copy_(self._inputs[: bucket.width], non_blocking=True)
        device.advance(bucket)
        if self._outputs is not device.outputs:
            self._outputs[: bucket.width].copy_(device.outputs[: bucket.width], non_blocking=True)

    def _prepare(self, bucket: Bucket) -> None:
        if self._graphs is not None and bucket not in self._graphs:
            self._given[:, FRAME:] = self._nobody  # a capture runs steps, in which nobody may take part
            self._device.inputs.copy_(self._inputs)
            self._graphs.capture(bucket)

    def _bucket(
        self,
        slots: NDArray[np.int64],
        listening: NDArray[np.bool_],
        speaking: NDArray[np.bool_],
        ends: bool = True,
    ) -> Bucket:
        """Return the smallest bucket that fits a step: on a CPU, where nothing is captured, one of its very size."""
        few = all(0 < self._sampling[slot].top_k <= FEW for slot in slots[speaking])
        hears, speaks, longest = bool(listening.any()), bool(speaking.any()), int(self._frames[slots].max())
        if self._graphs is None:
            return Bucket(len(slots), self._columns(longest), hears, speaks, few, ends)
        return self._buckets.smallest(len(slots), longest, listening=hears, speaking=speaks, few=few)

    def _columns(self, frames: int) -> int:
        return self._device.decoder.columns_for(self._device.decoder_state, frames)
