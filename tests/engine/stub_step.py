"""A frame step without weights: what it gives follows from a slot's whole stream, so that any mistake shows."""

from __future__ import annotations

import threading
import time
import zlib
from collections import defaultdict, deque
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from streaming.audio import FRAME
from streaming.config import Sampling
from streaming.engine.engine import Engine
from streaming.engine.events import Event
from streaming.errors import SnapshotError
from streaming.files import AnyBytes

PATIENCE_S = 30.0
"""A wait as long as this is in vain, and the test fails."""

E = TypeVar("E", bound=Event)

Pcm = NDArray[np.float32]
Entry = tuple[str, int]
"""`("heard", checksum of the pcm)` or `("spoken", checksum of the sampling)`."""


def frame(value: int) -> Pcm:
    """A frame of speech that can be told from others. float32 [1920]."""
    return np.full(FRAME, value, np.float32)


def heard(value: int) -> Entry:
    return "heard", zlib.crc32(frame(value).tobytes())


def spoken(sampling: Sampling) -> Entry:
    return "spoken", zlib.crc32(repr(sampling).encode())


@dataclass
class Stream:
    """What a slot has heard and said, and a digest of it at every length. The model that tests compare with, too."""

    entries: list[Entry] = field(default_factory=list)
    digests: list[int] = field(default_factory=lambda: [1])

    def digest_with(self, entry: Entry) -> int:
        return zlib.crc32(repr(entry).encode(), self.digests[-1])

    def add(self, entry: Entry) -> int:
        """Return the digest of the stream with this entry, from which `pcm_of` and `codes_of` make the frame."""
        digest = self.digest_with(entry)
        self.entries.append(entry)
        self.digests.append(digest)
        return digest

    @staticmethod
    def of(entries: list[Entry]) -> Stream:
        """Return the stream that these make."""
        stream = Stream()
        for entry in entries:
            stream.add(entry)
        return stream

    def rewind(self, frames: int) -> None:
        assert 0 <= frames <= len(self.entries)
        length = len(self.entries) - frames
        del self.entries[length:], self.digests[length + 1 :]


@dataclass(frozen=True)
class StubCopy:
    """A copy of a stub's slot: its stream's entries."""

    identity: str
    entries: list[Entry]
    reach: int

    @property
    def frames(self) -> int:
        return len(self.entries)

    def pieces(self) -> dict[int, int]:
        return {id(self): 1000 * self.frames}


def pcm_of(digest: int) -> Pcm:
    """Return a frame that can be told from others on the wire, too: 16 bits hold its values exactly."""
    return np.full(FRAME, (digest % 2**16 - 2**15) / 2**15, np.float32)


def codes_of(digest: int, num_codebooks: int) -> NDArray[np.int64]:
    return (digest >> np.arange(num_codebooks)) % 2048


def never(length: int, digest: int) -> bool:
    """Speech without an end, for `StubStep.ends`."""
    return False


@dataclass(frozen=True)
class StubResult:
    pcm: Pcm
    codes: NDArray[np.int64]
    ended: NDArray[np.bool_]
    broken: NDArray[np.bool_]


class StubStep:
    """Keep the contract of `streaming.frame_step.FrameStep`, and assert that the engine does.

    ends: whether speech ends instead of giving the frame with this digest to a stream of this length. delay_s: how long
    a call takes. gated: a call waits, once begun, until `allow` lets it go on; `wait_until_begun` waits for that.
    failure: raised by every call while set, deafness by every `follow`, in which `when_following` is called first;
    fatal: and means the end. breaks: slots whose numbers are not finite. widths: R of the last calls. identity: of the
    model; pieces: in which slots are copied.
    """

    def __init__(
        self,
        num_slots: int = 4,
        *,
        num_codebooks: int = 4,
        context_frames: int = 64,
        rewind_frames: int = 4,
        ends: Callable[[int, int], bool] = never,
        delay_s: Callable[[], float] | None = None,
        gated: bool = False,
        identity: str = "stub",
        pieces: int = 3,
    ) -> None:
        self.num_slots, self.num_codebooks = num_slots, num_codebooks
        self.context_frames, self.rewind_frames = context_frames, rewind_frames
        self.ends = ends
        self.failure: Exception | None = None
        self.fatal = False
        self.breaks: set[int] = set()
        self.deafness: Exception | None = None
        self.when_following: Callable[[], None] = lambda: None
        self.calls = self.followed = 0
        self.widths: deque[int] = deque(maxlen=64)
        self.identity, self.pieces = identity, pieces
        self.streams: dict[int, Stream] = {}
        self._busy: set[int] = set()  # slots that a copy is being put into
        self._sampling: dict[int, Sampling] = {}
        self._longest: dict[int, int] = {}  # what rewinding is limited by: the rings were written up to here
        # Samples of each of the last frames heard, whatever became of it.
        self.lengths: dict[int, deque[int]] = defaultdict(lambda: deque(maxlen=16))
        self._delay_s = delay_s
        self._gated = gated
        self._begun, self._allowed = threading.Semaphore(0), threading.Semaphore(0)
        self._thread: int | None = None

    def allow(self, calls: int = 1) -> None:
        self._allowed.release(calls)

    def allow_all(self) -> None:
        self._gated = False
        self._allowed.release(1)

    def wait_until_begun(self) -> None:
        assert self._begun.acquire(timeout=PATIENCE_S), "no step was begun"

    def open(self, slot: int, sampling: Sampling) -> None:
        self._require_own_thread()
        assert 0 <= slot < self.num_slots
        self.streams[slot], self._sampling[slot], self._longest[slot] = Stream(), sampling, 0
        self._busy.discard(slot)

    def configure(self, slot: int, sampling: Sampling) -> None:
        self._require_own_thread()
        assert slot in self.streams, "not open"
        self._sampling[slot] = sampling

    def is_fatal(self, error: Exception) -> bool:
        return self.fatal

    def follow(self) -> None:
        self._require_own_thread()
        self.followed += 1
        self.when_following()
        if self.deafness is not None:
            raise self.deafness

    def frames(self, slot: int) -> int:
        self._require_own_thread()
        return len(self.streams[slot].entries)

    def reach(self, slot: int) -> int:
        self._require_own_thread()
        return len(self.streams[slot].entries) - max(0, self._longest[slot] - self.rewind_frames)

    def rewind(self, slot: int, frames: int) -> None:
        self._require_own_thread()
        stream = self.streams[slot]
        assert 0 <= frames <= self.reach(slot), "overwritten in the rings"
        stream.rewind(frames)

    def copy(self, slot: int, reach: int, base: Any = None, common: int = 0) -> Generator[None, None, StubCopy]:
        """Assert until the last piece that what is copied has not been overwritten."""
        self._require_own_thread()
        assert 0 <= reach <= self.reach(slot), "out of reach"
        return self._copy(slot, list(self.streams[slot].entries), reach, base, common)

    def _copy(
        self, slot: int, entries: list[Entry], reach: int, base: Any, common: int
    ) -> Generator[None, None, StubCopy]:
        frames = len(entries)
        for _ in range(self.pieces):
            yield
            self._require_own_thread()
            assert self.streams[slot].entries[:frames] == entries, "rewound while it was copied"
            assert self.frames(slot) <= frames + self.rewind_frames - reach, "overwritten while it was copied"
        if base is not None:
            assert 0 <= common <= base.frames
            assert base.entries[:common] == entries[:common], "not what the copies have in common"
        return StubCopy(self.identity, entries, reach)

    def put(
        self, slot: int, copy: StubCopy, sampling: Sampling, common: int = 0, longest: int | None = None
    ) -> Generator[None]:
        self._require_own_thread()
        if longest is None:
            self.open(slot, sampling)
        else:
            now = self.streams[slot].entries
            assert common <= min(copy.frames, len(now)), (common, copy.frames, len(now))
            assert copy.entries[:common] == now[:common], "not the stream that it was"
            assert longest >= len(now)
            self.configure(slot, sampling)
        self._busy.add(slot)
        for _ in range(self.pieces):
            yield
            self._require_own_thread()
        self._busy.discard(slot)
        self.streams[slot] = Stream.of(copy.entries)
        self._longest[slot] = copy.frames - copy.reach + self.rewind_frames

    @property
    def most_packed_bytes(self) -> int:
        return 1 << 20

    def pack(self, copy: StubCopy, said: dict[str, str]) -> memoryview:
        return memoryview(bytearray(msgspec.json.encode((copy, said)).ljust(100) + bytes(32)))  # room for a signature

    def unpack(self, data: AnyBytes) -> tuple[StubCopy, dict[str, str]]:
        try:
            return msgspec.json.decode(bytes(data)[:-32], type=tuple[StubCopy, dict[str, str]])
        except msgspec.DecodeError as error:
            raise SnapshotError(str(error)) from None

    def __call__(
        self,
        slots: NDArray[np.int64],
        pcm: Pcm,
        listening: NDArray[np.bool_],
        speaking: NDArray[np.bool_],
        lengths: NDArray[np.int64] | None = None,
    ) -> StubResult:
        self._require_own_thread()
        batch = len(slots)
        assert 1 <= batch == len(set(slots.tolist())) and slots.dtype == np.int64
        assert listening.shape == speaking.shape == (batch,) and 0 <= slots.min() <= slots.max() < self.num_slots
        assert listening.dtype == speaking.dtype == np.bool_
        assert pcm.shape == (batch, FRAME) and pcm.dtype == np.float32
        assert (listening ^ speaking).all(), "a row that costs and does nothing"
        lengths = listening * FRAME if lengths is None else lengths
        assert lengths.shape == (batch,) and lengths.dtype == np.int64 and not lengths[~listening].any()
        assert (lengths[listening] >= 1).all() and (lengths <= FRAME).all()
        if self._gated:
            self._begun.release()
            assert self._allowed.acquire(timeout=PATIENCE_S), "the test forgot the step"
        if self._delay_s is not None:
            time.sleep(self._delay_s())
        if self.failure is not None:
            raise self.failure
        self.calls += 1
        self.widths.append(batch)
        result = StubResult(
            np.full((batch, FRAME), np.nan, np.float32),
            np.full((batch, self.num_codebooks), -1, np.int64),
            np.zeros(batch, np.bool_),
            np.isin(slots, list(self.breaks)),
        )
        for row, slot in enumerate(slots.tolist()):
            if listening[row]:
                self.lengths[slot].append(int(lengths[row]))
            assert slot not in self._busy, "a copy is being put into it"
            self._advance(slot, row, pcm[row] if listening[row] else None, result)
        return result

    def _advance(self, slot: int, row: int, pcm: Pcm | None, result: StubResult) -> None:
        stream = self.streams[slot]
        entry = spoken(self._sampling[slot]) if pcm is None else ("heard", zlib.crc32(pcm.tobytes()))
        if pcm is None and self.ends(len(stream.entries), stream.digest_with(entry)):
            result.ended[row] = True
            return
        digest = stream.add(entry)
        result.pcm[row], result.codes[row] = pcm_of(digest), codes_of(digest, self.num_codebooks)
        self._longest[slot] = max(self._longest[slot], len(stream.entries))

    def _require_own_thread(self) -> None:
        self._thread = self._thread or threading.get_ident()
        assert threading.get_ident() == self._thread, "the step is not to be shared by threads"


class Recorder:
    """A listener that keeps all events. A predicate must not call the engine, whose thread may be waiting here."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._changed = threading.Condition()

    def __call__(self, event: Event) -> None:
        with self._changed:
            self.events.append(event)
            self._changed.notify_all()

    def wait_for(self, predicate: Callable[[], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(predicate, timeout=PATIENCE_S), f"waited in vain; events: {self.events[-8:]}"

    def wait_for_event(self, kind: type[Event], count: int = 1) -> None:
        self.wait_for(lambda: len(self.of(kind)) >= count)

    def of(self, kind: type[E]) -> list[E]:
        return [event for event in self.events if isinstance(event, kind)]


@contextmanager
def running(step: StubStep) -> Iterator[Engine]:
    """An engine over the step, closed at the end; neither a failure of the step nor a thread is left behind."""
    threads = set(threading.enumerate())
    engine = Engine(step)
    try:
        yield engine
    finally:
        step.allow_all()
        engine.close()
    assert engine.failure is (step.failure if step.fatal else None), engine.failure
    assert set(threading.enumerate()) <= threads, "a thread is left"
