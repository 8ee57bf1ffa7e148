"""What a CUDA graph needs of the step, proven without a GPU: on a fake device that has shapes and no numbers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from streaming.config import LlamaConfig, Sampling
from streaming.device_step import DeviceStep
from streaming.frame_step import FrameStep
from streaming.graph_buckets import Bucket, Graphs, following
from streaming.models.llama import LlamaDecoder
from streaming.models.mimi import StreamingMimi
from streaming.models.operations.base import Operations
from streaming.models.operations.torch import TorchOperations
from streaming.models.random_weights import (
    LLAMA_MIMI_1_3B,
    LLAMA_MIMI_8B,
    MIMI,
    RandomSource,
    random_codec,
    random_decoder,
)
from tests.reference import load_codec, load_decoder

CUDA = torch.device("cuda:0")
KINDS = {"listen": (True, False, True), "speak": (False, True, True), "both": (True, True, True)}
WINDOW, REWIND = 6, 4
FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal.default")
"""Operations whose result the host has to see, or whose shape depends on it."""


MAKES_NOTHING = ("empty", "prim.device")


class Watch(TorchDispatchMode):
    """Note every operation, and refuse those that look back at the host.

    launches: at least how many kernels a GPU runs. An operation counts once, unless all it gives is another view of
    what it got; some are more than one (a sort, a sum over few rows, a product that is split).
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self.calls, self.launches = device, list[tuple[str, tuple[torch.Size, ...]]](), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        assert not any(part in name for part in FORBIDDEN), f"{name} makes the host wait"
        out = func(*args, **(kwargs or {}))
        for tensor in (leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)):
            assert tensor.device == self.device, f"{name} gives a tensor on {tensor.device}"
        shapes = tuple(leaf.shape for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        self.calls.append((name, shapes))
        self.launches += self._launches(name, func, out, [*args, *(kwargs or {}).values()])
        return out

    @staticmethod
    def _launches(name: str, func: Any, out: Any, given: list[Any]) -> int:
        if any(part in name for part in MAKES_NOTHING):
            return 0
        tensors = [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]
        known = {tensor.untyped_storage()._cdata for tensor in tensors if not tensor.is_mkldnn}  # has none
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        return int(func._schema.is_mutable or any(tensor.untyped_storage()._cdata not in known for tensor in made))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("few", [True, False], ids=["few", "all"])
@pytest.mark.parametrize("decoder_shape", [LLAMA_MIMI_1_3B, LLAMA_MIMI_8B], ids=["1.3b", "8b"])
def test_a_step_never_looks_back_at_the_host(decoder_shape: LlamaConfig, kind: str, few: bool) -> None:
    """One `item()`, one mask used as an index, one table left on the CPU: each costs a synchronisation per token, and
    keeps the step from being captured.
    """
    with FakeTensorMode():  # in bfloat16 on a CUDA device, and in no memory at all
        codec = random_codec(4, CUDA, config=replace(MIMI, num_layers=1))
        decoder = random_decoder(replace(decoder_shape, num_layers=1), CUDA, torch.bfloat16)
        step = DeviceStep(codec, decoder, 8, 255, 16)
        with Watch(CUDA) as watch:
            step.advance(replace(Bucket(8, 1092, *KINDS[kind]), few=few))
    assert len(watch.calls) > 300


def _launches(layers: int, width: int, kind: str, operations: Operations | None) -> int:
    """Of a step with a decoder of so many layers."""
    with FakeTensorMode():
        codec = random_codec(4, CUDA, config=replace(MIMI, num_layers=1))
        decoder = random_decoder(
            replace(LLAMA_MIMI_1_3B, num_layers=layers), CUDA, torch.bfloat16, operations=operations
        )
        step = DeviceStep(codec, decoder, width, 255, 16)
        with Watch(CUDA) as watch:
            step.advance(Bucket(width, 1092, *KINDS[kind]))
    return watch.launches


@pytest.mark.parametrize(
    ("kind", "width", "runs", "launches"),
    [
        ("listen", 1, "fused", 8),
        ("speak", 1, "fused", 4 * 8),
        ("speak", 64, "matvec", 4 * 8),
        ("speak", 1, "matvec", 4 * 5),
        ("listen", 1, "matvec", 5),
        ("speak", 1, "plain", 4 * 35),
    ],
)
def test_a_layer_is_five_launches_a_pass(kind: str, width: int, runs: str, launches: int) -> None:
    """Launches are what the step of a few slots is made of, and they creep in one `unsqueeze().float()` at a time. The
    figures are those of docs/performance.md.
    """
    fused = pytest.importorskip("streaming.models.operations.triton.operations", exc_type=ImportError)
    operations = {
        "plain": TorchOperations,
        "fused": lambda: fused.TritonOperations(matvec_rows=0),
        "matvec": fused.TritonOperations,
    }[runs]
    one, two = (_launches(layers, width, kind, operations()) for layers in (1, 2))
    assert two - one == launches


@pytest.mark.parametrize(("runs", "layer", "frame"), [("fused", 10, 310), ("plain", 20, 597)])
def test_a_codec_s_frame_is_so_many_launches(runs: str, layer: int, frame: int) -> None:
    """Listening and speaking together, for one session, take the launches that docs/performance.md tells."""
    fused = pytest.importorskip("streaming.models.operations.triton.operations", exc_type=ImportError)
    operations = {"plain": TorchOperations, "fused": fused.TritonOperations}[runs]
    counts = []
    for layers in (1, 2, MIMI.num_layers):
        with FakeTensorMode():
            source, shape = RandomSource(CUDA, torch.float32), replace(MIMI, num_layers=layers)
            codec = StreamingMimi(source, shape, 4, operations())
            state, active = codec.init_state(1), torch.ones(1, dtype=torch.bool, device=CUDA)
            pcm = torch.zeros(1, 1920, device=CUDA)
            with Watch(CUDA) as watch:
                codes = codec.encode(pcm, state, active)
                codec.decode(codes, state, active)
        counts.append(watch.launches)
    assert (counts[1] - counts[0], counts[2]) == (2 * layer, frame)


def _tensors(thing: object, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor that an object holds on to, by its path."""
    if isinstance(thing, Tensor):
        yield path, thing
    elif is_dataclass(thing):
        for field in fields(thing):
            yield from _tensors(getattr(thing, field.name), f"{path}.{field.name}")
    elif isinstance(thing, DeviceStep):
        for name in ("codec_state", "decoder_state", "sampler", "hears", "inputs", "outputs"):
            yield from _tensors(getattr(thing, name), f"{path}.{name}")


@pytest.fixture
def plain(without_native: None, codec_dir: Path, decoder_dir: Path) -> tuple[StreamingMimi, LlamaDecoder]:
    """Both models in PyTorch, whose operations can be watched."""
    return load_codec(codec_dir), load_decoder(decoder_dir)


def test_state_keeps_its_storage(plain: tuple[StreamingMimi, LlamaDecoder]) -> None:
    """A graph writes where it was recorded to write: a state that is rebound is stale from then on."""
    codec, decoder = plain
    step = FrameStep(codec, decoder, 2, WINDOW, REWIND)
    before = {path: tensor.untyped_storage().data_ptr() for path, tensor in _tensors(step._device)}
    assert len(before) >= 14
    random = np.random.default_rng(0)
    for slot in (0, 1):
        step.open(slot, Sampling(seed=slot))
    for number in range(3 * WINDOW):
        listening = random.random(2) < 0.5 if number else np.ones(2, np.bool_)
        step(np.arange(2), random.standard_normal((2, 1920)).astype(np.float32), listening, ~listening)
        if number % 5 == 4:
            step.rewind(0, 2)
            step.configure(1, Sampling(temperature=1.0, top_k=0))
    step.open(0, Sampling())
    assert before == {path: tensor.untyped_storage().data_ptr() for path, tensor in _tensors(step._device)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_bucket_is_the_same_operations_wherever_its_streams_stand(
    plain: tuple[StreamingMimi, LlamaDecoder], kind: str
) -> None:
    """What is recorded once is replayed at every position: at the beginning, in the middle, and when the window
    slides.
    """
    codec, decoder = plain
    step = DeviceStep(codec, decoder, 3, WINDOW, REWIND)
    bucket = Bucket(3, decoder.columns_for(step.decoder_state, 1000), *KINDS[kind])
    step.inputs[:, 1920] = float(bucket.listening)
    step.inputs[:, 1921] = float(bucket.speaking and not bucket.listening)
    step.inputs[:, 1922] = torch.tensor([2, 0, 1])
    runs = []
    for number in range(3 * WINDOW):
        with Watch(torch.device("cpu")) as watch:
            step.advance(bucket)
        if number in (0, 1, WINDOW, 3 * WINDOW - 1):
            runs.append(watch.calls)
    assert runs[0] == runs[1] == runs[2] == runs[3]


class _Bounded(TorchOperations):
    """Operations as kernels are: attention reads what a slot holds and no more."""

    bounded = True


@pytest.mark.parametrize("operations", [TorchOperations(), _Bounded()], ids=["plain", "bounded"])
def test_every_step_of_a_gpu_finds_its_bucket_captured(
    codec: StreamingMimi, decoder_dir: Path, operations: Operations
) -> None:
    """A bucket that was forgotten is captured in the middle of a conversation, which stands still for it. With
    operations that read a length of context, there are three times as many to forget.
    """
    decoder = load_decoder(decoder_dir, operations=operations)
    random = np.random.default_rng(0)
    for slots in (1, 3, 5, 70):
        step = FrameStep(codec, decoder, slots, 255, 2)
        step._graphs = {}  # type: ignore[assignment]  # as on a GPU
        captured = set(step.buckets())
        assert len(captured) < 200
        assert len({bucket.columns for bucket in captured if bucket.columns}) == (1 if operations.bounded else 3)
        for _ in range(300):
            named = random.permutation(slots)[: int(random.integers(1, slots + 1))]
            listening = random.random(len(named)) < 0.5
            speaking = ~listening
            step._frames[:] = random.integers(0, int(random.choice([63, 127, 600])), slots)
            step._sampling = [Sampling(top_k=int(k)) for k in random.choice([0, 5, 64, 65], slots)]
            bucket = step._bucket(named, listening, speaking)
            assert bucket in captured, bucket
            assert not bucket.speaking or following(bucket.width) in captured
            assert bucket.width == min(b.width for b in captured if b.width >= len(named)), "wider than it has to be"
            assert (bucket.listening, bucket.speaking) == (listening.any(), speaking.any())
            ranked = [step._sampling[slot].top_k for slot in named[speaking]]
            assert bucket.few == all(0 < top_k <= 64 for top_k in ranked), "the speakers' options alone count"
            longest = int(step._frames[named].max())
            # Ranking all tokens is captured at one length.
            length = min(length for length in step._buckets._columns if longest <= length) if bucket.few else 10_000
            assert bucket.columns == decoder.columns_for(step._device.decoder_state, length), "longer than it has to be"


def _states(step: FrameStep) -> Iterator[tuple[str, Tensor]]:
    """All memory by slot."""
    device = step._device
    step.follow()
    for name in ("codec_state", "decoder_state", "sampler"):
        yield from _tensors(getattr(device, name), name)


class _Recorded:
    """What graphs do, on a CPU: `capture` runs the work as often as a recording does, `replay` once."""

    def __init__(self, step: FrameStep) -> None:
        self._step, self.captured = step, set[Bucket]()

    def capture(self, bucket: Bucket) -> None:
        for _ in range(3):
            self._step._work(bucket)
        self.captured.add(bucket)

    def __contains__(self, bucket: Bucket) -> bool:
        return bucket in self.captured

    def replay(self, bucket: Bucket) -> None:
        assert bucket in self.captured, "a graph that was never recorded"
        self._step._work(bucket)


def test_a_gpu_s_output_layers_are_padded_and_nobody_sees_it() -> None:
    """The library's product of 2,049 outputs is a slow one: no row of it begins where 16 bytes do."""
    with FakeTensorMode():
        decoder = random_decoder(replace(LLAMA_MIMI_1_3B, num_layers=1), CUDA, torch.bfloat16)
        hidden = torch.zeros(3, decoder.config.hidden_size, dtype=torch.bfloat16, device=CUDA)
        for book, head in enumerate(decoder._heads):
            assert head.weight.shape == (2056, decoder.config.hidden_size)
            assert decoder.logits(hidden, book).shape == (3, 2049)


def test_all_graphs_are_captured_on_one_stream_into_one_pool_and_replayed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a pool belong to the stream that took them: with a stream for each capture, 256 slots took 11 GB and 32
    workspaces. And a graph's first replay, which loads it, came in mid-conversation.
    """
    done: list[tuple[str, object]] = []
    streams = itertools.count()

    class Graph:
        def replay(self) -> None:
            done.append(("replay", self))

    @contextmanager
    def graph(which: Graph, pool: object, stream: object) -> Iterator[None]:
        done.append(("capture", (pool, stream)))
        yield

    for name, stub in {
        "Stream": lambda device: next(streams),
        "stream": nullcontext,
        "device": nullcontext,
        "current_stream": lambda: SimpleNamespace(synchronize=lambda: None),
        "synchronize": lambda: done.append(("synchronize", None)),
        "graph_pool_handle": lambda: "pool",
        "CUDAGraph": Graph,
        "graph": graph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stub)
    graphs = Graphs(lambda bucket: done.append(("work", bucket)), CUDA)
    for width in (4, 2):
        graphs.capture(Bucket(width, 8, True, False, True))
    one_capture = ["synchronize", "work", "work", "capture", "work", "synchronize", "replay", "synchronize"]
    assert [what for what, _ in done] == 2 * one_capture
    assert {given for what, given in done if what == "capture"} == {("pool", 0)}


@pytest.mark.parametrize("warm", [True, False], ids=["warm", "cold"])
def test_buckets_that_are_wider_than_a_step_move_nobody_who_takes_no_part(
    codec: StreamingMimi, decoder: LlamaDecoder, warm: bool
) -> None:
    """A step of three runs as one of four, and what the fourth row did in the step before still stands in the inputs:
    its slot went on speaking by itself. And so did everybody whenever a graph was recorded in mid-conversation. Rows
    that fill a bucket write into the spare slot, and nowhere else.
    """
    graphs, plain = FrameStep(codec, decoder, 5, WINDOW, REWIND), FrameStep(codec, decoder, 5, WINDOW, REWIND)
    recorded = graphs._graphs = _Recorded(graphs)  # type: ignore[assignment]
    if warm:
        graphs.warm_up()
        assert recorded.captured == set(graphs.buckets())
    for step in (graphs, plain):
        for slot in range(5):
            step.open(slot, Sampling(seed=slot, top_k=0 if slot == 2 else 30))
    speech = np.random.default_rng(1).standard_normal((30, 5, 1920)).astype(np.float32)
    plan = ["lllll", "sssss", "sls", "s", "ss-ls", "l-s", "lls", "-s", "sslss", "l"]
    for doing, pcm in zip(plan, speech, strict=False):
        slots = np.array([slot for slot, what in enumerate(doing) if what != "-"])[::-1].copy()
        listening = np.array([doing[slot] == "l" for slot in slots])
        results = [step(slots, pcm[slots], listening, ~listening) for step in (graphs, plain)]
        for ours, wanted in zip(*((r.codes, r.pcm, r.ended, r.broken) for r in results), strict=True):
            assert np.array_equal(ours, wanted)
        for step in (graphs, plain):
            told = [step.frames(slot) for slot in range(5)] + [0]
            assert step._device.decoder_state.frames.tolist() == told
            assert step._device.codec_state.decoder.frames.tolist() == told
        for (path, ours), (_, wanted) in zip(*(_states(step) for step in (graphs, plain)), strict=True):
            assert torch.equal(ours[:-1], wanted[:-1]), path
        assert [graphs.frames(slot) for slot in range(5)] == [plain.frames(slot) for slot in range(5)]


def test_one_length_of_context_is_captured_where_attention_reads_what_is_held(
    codec: StreamingMimi, decoder_dir: Path
) -> None:
    """Pins three graphs for what is the same work."""
    fused = pytest.importorskip("streaming.models.operations.triton.operations", exc_type=ImportError)
    found = []
    for operations in (fused.TritonOperations(), TorchOperations()):
        step = FrameStep(codec, load_decoder(decoder_dir, operations=operations), 4, 255, 2)
        step._graphs = {}  # type: ignore[assignment]  # as on a GPU
        found.append(step.buckets())
        assert step._bucket(np.zeros(1, np.int64), np.ones(1, np.bool_), np.zeros(1, np.bool_)) in found[-1]
    assert [len(buckets) for buckets in found] == [18, 36]
    assert len({bucket.columns for bucket in found[0] if bucket.columns}) == 1
