"""Make a codec, a frame step and an engine from a model's name: here the layers are put together."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from streaming import config as values
from streaming.audio import FRAME_RATE
from streaming.command import VERSION
from streaming.compiler import processor
from streaming.config import CONTEXT_TOKENS as CONTEXT_TOKENS  # these names are exported from here, too
from streaming.config import DEMO as DEMO
from streaming.config import OVERLOAD, LlamaConfig, MimiConfig, Sampling, not_followed, transformer_parameters
from streaming.device_step import slot_bytes
from streaming.errors import CheckpointError, StreamingError, TooLargeError
from streaming.frame_step import FrameStep
from streaming.memory import Memory, available_memory, resident, size
from streaming.models.checkpoint import (
    ModelNotice,
    TensorSource,
    fingerprint_of_files,
    locate,
    read_config,
    read_generation_config,
    read_notice,
)
from streaming.models.faults import is_want_of_memory
from streaming.models.llama import LlamaDecoder
from streaming.models.mimi import StreamingMimi
from streaming.models.operations.base import Operations
from streaming.models.operations.native.library import library
from streaming.models.quantized_weights import Quantize, QuantizeOption
from streaming.models.random_weights import CODECS, DECODERS, MIMI, random_codec, random_decoder
from streaming.models.token_layout import TokenLayout
from streaming.most_sessions import most_sessions, rehearsed_s
from streaming.quantize_auto import KINDS, choose, least_s, measured_file, warn_if_slower

if TYPE_CHECKING:
    from streaming.engine.engine import Engine

_LOG = logging.getLogger(__name__)

_DEMO_FOLDER = Path(__file__).parent / "demo" / "voice"
RANDOM = "random:"
"""Before the name of a size: full-size weights made in memory, so that speed needs no download."""
_RANDOM_NOTICE = ModelNotice("The weights are random: what it says is noise, at a real model's pace.")
DEFAULT_CODEC = "kyutai/mimi"
DTYPES = {name: getattr(torch, name) for name in values.DTYPES}
MAX_CODEC_WINDOW = 4096
"""Steps of 40 ms: 164 s, eight times what the released models remember."""
REWIND_FRAMES = 16
"""An interruption can cut back so many frames: 1.28 s, three times the default lead."""
_LEAST_CONTEXT_FRAMES = 2
"""The frame that is made, and one to go on from: a session with fewer would hear nothing."""
_REHEARSED_LAYERS = 3
"""Layers of a decoder whose step is measured before the rest is read: more than a cache holds, and quickly rounded."""
_SHARE = 0.9
"""A decoder's weights, and then the slots, take at most so much of the memory that is free: the rest is for loading,
connections, graphs, and other processes."""


def add_models(
    parser: argparse.ArgumentParser,
    dtypes: Sequence[str] = ("auto", *DTYPES),
    dtype: str = "auto",
    computes: str = "the decoder computes",
) -> None:
    """Add the flags of a measurement that loads models: which, where, and what they compute in."""
    parser.add_argument(
        "--model", default=DEMO, metavar="demo|HUB_ID|DIR", help="The Llama-Mimi checkpoint (default: demo)."
    )
    parser.add_argument(
        "--codec", metavar="HUB_ID|DIR", help="The Mimi checkpoint (default: kyutai/mimi, or the demo's)."
    )
    parser.add_argument("--device", default="auto", help="Where it runs: auto, cpu or cuda[:N] (default: auto).")
    parser.add_argument("--dtype", choices=dtypes, default=dtype, help=f"The type that {computes} in.")


@dataclass(frozen=True)
class Models:
    """A codec and a decoder that belong together, what a person is told of them, and how tokens are drawn unless
    somebody says otherwise.
    """

    name: str
    codec: StreamingMimi
    decoder: LlamaDecoder
    notice: ModelNotice
    sampling: Sampling


def use_threads(count: int = 0) -> None:
    """Return how many threads share an operation on the CPU. 0: all cores but one, or what OMP_NUM_THREADS says.

    They wait for each other, and so for whoever else a core is given to: the event loop, clients, other programs.
    """
    if count or "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(count or max(1, (os.cpu_count() or 1) - 1))


def load_codec(
    source: str | Path = DEFAULT_CODEC,
    num_codebooks: int = 8,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    window: int | None = None,
) -> StreamingMimi:
    """Return the streaming codec of a hub id, a folder, or `"demo"`.

    window: how many steps of 40 ms its transformers look back; None: as many as its config says.
    Raises `CheckpointError` (files), `HubUnreachableError` (network); `StreamingError` for a window that is none.
    """
    folder = _DEMO_FOLDER / "codec" if source == DEMO else locate(source)
    config = MimiConfig.from_dict(read_config(folder))
    if window is not None:
        if not 1 <= window <= MAX_CODEC_WINDOW:
            raise StreamingError(f"a codec's window is 1 to {MAX_CODEC_WINDOW} steps, not {window}")
        config = replace(config, window=window)
    return StreamingMimi(TensorSource(folder, pick_device(device), dtype), config, num_codebooks)


def load_models(
    model: str | Path = DEMO,
    codec: str | Path | None = None,
    device: str | torch.device = "auto",
    dtype: str = "auto",
    quantize: QuantizeOption = "none",
    codec_dtype: str = "float32",
    operations: Operations | None = None,
    codec_window: int | None = None,
    context_tokens: int = CONTEXT_TOKENS,
) -> Models:
    """Return a decoder and its codec, from hub ids, folders, `"demo"`, or random weights (`"random:1.3b"`,
    `"random:8b"`).

    device: `auto` (CUDA if there is any), `cpu`, `cuda`, `cuda:N`. dtype: of the decoder; `auto` is bfloat16 on CUDA
    and float32 elsewhere, but for a decoder that the memory does not hold in float32. quantize: how the decoder's
    layers keep their weights; `auto` is what loses least of what is fast enough here, which a few steps of one session
    tell whose context of `context_tokens` is full, at the first start. codec_dtype: its codes are the prompt, and in
    bfloat16 some of them are others. operations: of the decoder; by default, what suits the device. codec_window: see
    `load_codec`; random weights have their own.
    Raises `CheckpointError`, `HubUnreachableError`, `TokenLayoutError`; `StreamingError` for a device that is not
    there.
    """
    if quantize not in ("auto", *KINDS):
        raise StreamingError(f"quantize {quantize!r} is not supported: use auto, none, int8, int4")
    where = pick_device(device)
    for kind in (dtype, codec_dtype):
        if kind not in DTYPES and kind != "auto":
            raise StreamingError(f"dtype {kind!r} is not supported: use auto, {', '.join(DTYPES)}")
    decoder_kind = DTYPES.get(dtype, torch.bfloat16 if where.type == "cuda" else torch.float32)
    codec_kind = DTYPES.get(codec_dtype, torch.float32)
    if str(model).startswith(RANDOM):
        return _random_models(str(model), where, decoder_kind, quantize, codec_kind, operations, context_tokens)
    folder, codec_folder = folders(model, codec)
    config, notice = LlamaConfig.from_dict(read_config(folder)), read_notice(folder)
    if notice.voices is not None and notice.voices.codebook >= config.num_codebooks:
        raise CheckpointError(
            f"{folder}/model_notice.json: voices are in codebook {notice.voices.codebook}, of {config.num_codebooks} "
            "that count from 0"
        )
    kinds = _fitting_kinds(config, quantize, 2, where)  # in bfloat16, however they are used: no less than that
    mimi = load_codec(codec_folder, config.num_codebooks, where, codec_kind, codec_window)
    layout = TokenLayout.load(folder, config.num_codebooks, mimi.config.codebook_size, config.vocab_size)
    plain_kind = _fitting(config, where) if dtype == "auto" and decoder_kind == torch.float32 else decoder_kind

    def make(shape: LlamaConfig, kept: Quantize) -> LlamaDecoder:
        source = TensorSource(folder, where, plain_kind if kept == "none" else decoder_kind)
        return LlamaDecoder(source, shape, layout, kept, operations)

    files = (fingerprint_of_files(folder), fingerprint_of_files(codec_folder))
    chosen = _chosen(kinds, quantize, make, config, mimi, context_tokens, repr((files, decoder_kind)))
    if chosen == "none" and plain_kind != decoder_kind:
        _LOG.warning(
            "%s is kept in bfloat16: in float32 it needs %s, and less than that of memory is free. --dtype float32 "
            "insists",
            folder,
            size(4 * transformer_parameters(config)),
        )
    decoder = make(config, chosen)
    return Models(str(model), mimi, decoder, notice, _published_sampling(folder))


def _fitting_kinds(
    config: LlamaConfig, quantize: QuantizeOption, bytes_each: float, device: torch.device
) -> list[Quantize]:
    """Return which ways of keeping the weights are possible here and fit into the memory: the one that is asked for,
    with a warning where it is slower than none, or those that `auto` may take. Raises `TooLargeError` where none fits.
    """
    if quantize != "auto":
        check_weights(config, quantize, bytes_each, device)
        if device.type == "cpu":
            warn_if_slower(quantize)
        return [quantize]
    possible = KINDS if device.type == "cuda" or library() is not None else KINDS[:1]
    fitting = []
    for kind in possible:
        try:
            check_weights(config, kind, bytes_each, device)
        except TooLargeError:
            if kind == possible[-1]:
                raise
            _LOG.info("--quantize auto: with %s the weights do not fit into memory", kind)
        else:
            fitting.append(kind)
    return fitting


def _chosen(
    kinds: list[Quantize],
    quantize: QuantizeOption,
    make: Callable[[LlamaConfig, Quantize], LlamaDecoder],
    config: LlamaConfig,
    codec: StreamingMimi,
    context_tokens: int,
    model: str,
) -> Quantize:
    """Return how the decoder's weights are kept: as asked for, or what is measured to be enough. model: what tells it
    apart.
    """
    if quantize != "auto":
        return quantize
    opened = library() if codec.device.type == "cpu" else None
    tokens = 0 if opened is None else config.num_codebooks  # that a step draws, and is known to read all layers for
    where = torch.cuda.get_device_name(codec.device) if codec.device.type == "cuda" else processor()
    told = (
        *(VERSION, torch.__version__, model, repr(config), repr(codec.config), str(codec.dtype), context_tokens),
        *(where, None if opened is None else opened.native_instructions(), torch.get_num_threads()),
    )
    return choose(
        kinds,
        lambda kind: _step_s(make, config, codec, kind, context_tokens),
        lambda kind: least_s(kind, tokens * transformer_parameters(config)),
        1 / FRAME_RATE,
        OVERLOAD,
        _would_help(codec.device),
        sha256(repr(told).encode()).hexdigest(),
        measured_file(),
    )


def _would_help(device: torch.device) -> str:
    """Return what would make steps faster here, as the beginning of a sentence."""
    if device.type == "cuda":
        return "A smaller model or a faster GPU"
    if library() is None:
        return "A C compiler (Debian: apt install gcc libc6-dev), with which int8 and int4 run,"
    cores, threads = os.cpu_count() or 1, torch.get_num_threads()
    more = f", --threads {cores} instead of {threads}," if threads < cores else ""
    return f"A GPU, a processor with faster memory{more} or a smaller model"


def _step_s(
    make: Callable[[LlamaConfig, Quantize], LlamaDecoder],
    config: LlamaConfig,
    codec: StreamingMimi,
    kind: Quantize,
    context_tokens: int,
) -> float:
    """Return how long a step of one session takes whose context is full, from a few of the decoder's layers."""
    layers = min(config.num_layers, _REHEARSED_LAYERS)
    decoder = make(replace(config, num_layers=layers), kind)

    def seconds(decoder: LlamaDecoder) -> float:
        step = FrameStep(codec, decoder, 1, frames_of_context(decoder, context_tokens), REWIND_FRAMES)
        return rehearsed_s(step, 1)

    some = seconds(decoder)
    if layers == config.num_layers:
        return some
    rest = seconds(decoder.without_layers())
    return rest + max(0.0, some - rest) * config.num_layers / layers


def _fitting(config: LlamaConfig, device: torch.device) -> torch.dtype:
    """Return float32, or bfloat16 where a decoder's weights would not fit into the memory that is free."""
    memory = _memory_of(device)
    fits = memory is None or _weights_fit(4 * transformer_parameters(config), memory)
    return torch.float32 if fits else torch.bfloat16


def _published_sampling(folder: Path) -> Sampling:
    raw = read_generation_config(folder)
    missing = not_followed(raw)
    if missing:
        _LOG.warning("%s asks for %s, which there is not here: tokens are drawn without", folder, ", ".join(missing))
    return Sampling.published(raw)


def _random_models(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    quantize: QuantizeOption,
    codec_dtype: torch.dtype,
    operations: Operations | None,
    context_tokens: int,
) -> Models:
    config = DECODERS.get(name.removeprefix(RANDOM))
    if config is None:
        raise StreamingError(f"{name}: random weights come in the sizes {', '.join(DECODERS)}")
    kinds = _fitting_kinds(config, quantize, dtype.itemsize, device)
    shape = CODECS.get(name.removeprefix(RANDOM), MIMI)
    codec = random_codec(config.num_codebooks, device, codec_dtype, shape)

    def make(shape: LlamaConfig, kept: Quantize) -> LlamaDecoder:
        return random_decoder(shape, device, dtype, kept, operations)

    chosen = _chosen(kinds, quantize, make, config, codec, context_tokens, repr((RANDOM, dtype)))
    return Models(name, codec, make(config, chosen), _RANDOM_NOTICE, Sampling())


def folders(model: str | Path = DEMO, codec: str | Path | None = None) -> tuple[Path, Path]:
    """Find the files of a decoder and of its codec. Those of a hub id are downloaded once.

    Raises `CheckpointError`, `HubUnreachableError`.
    """
    if model == DEMO:
        return _DEMO_FOLDER / "decoder", locate(_DEMO_FOLDER / "codec" if codec is None else codec)
    return locate(model), locate(DEFAULT_CODEC if codec is None else codec)


def pick_device(device: str | torch.device = "auto") -> torch.device:
    """Return a device by name, or for `auto` the best there is. Raises `StreamingError` if it is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        where = torch.device(device)
    except RuntimeError as error:
        raise StreamingError(f"{device!r} is not a device: use auto, cpu, cuda or cuda:N") from error
    if where.type == "cuda" and (where.index or 0) >= torch.cuda.device_count():
        raise StreamingError(
            f"there is no device {device}: {torch.cuda.device_count()} CUDA devices found; use --device cpu"
        )
    if where.type not in ("cpu", "cuda"):
        raise StreamingError(f"device {device!r} is not supported: use auto, cpu, cuda or cuda:N")
    return where


def load_engine(
    model: str | Path = DEMO,
    codec: str | Path | None = None,
    *,
    device: str | torch.device = "auto",
    dtype: str = "auto",
    quantize: QuantizeOption = "none",
    max_sessions: int | Literal["auto"] = 4,
    context_tokens: int = CONTEXT_TOKENS,
    rewind_frames: int = REWIND_FRAMES,
    codec_dtype: str = "float32",
    codec_window: int | None = None,
    memory_share: float = 1.0,
) -> Engine:
    """Return a running engine with `max_sessions` slots. Close it, or use it in a `with` block.

    memory_share: of the device's memory, at most so much is taken, for several engines on one device.
    max_sessions: `auto` is as many as `most_sessions` finds, and the log says why.

    Raises as `load_models` does; `TooLargeError` where the memory does not suffice, `StreamingError` for other sizes
    that make no sense.
    """
    from streaming.engine.engine import Engine  # needs msgspec, which models and their steps do without

    if (max_sessions != "auto" and max_sessions < 1) or rewind_frames < 0:
        raise StreamingError(f"max_sessions is {max_sessions}, rewind_frames {rewind_frames}: at least 1 and 0")
    if not 0 < memory_share <= 1:
        raise StreamingError(f"memory_share is {memory_share:g}: above 0, and at most 1")
    if memory_share < 1 and (where := pick_device(device)).type == "cuda":
        torch.cuda.set_per_process_memory_fraction(memory_share, where)
    _LOG.info("loading the model %s", model)
    models = load_models(
        model,
        codec,
        device,
        dtype,
        quantize,
        codec_dtype,
        codec_window=codec_window,
        context_tokens=context_tokens,
    )
    memory = _share_of(models.codec.device, memory_share)
    context_frames = frames_of_context(models.decoder, context_tokens)
    if max_sessions == "auto":
        check_memory(models.codec, models.decoder, 1, context_tokens, rewind_frames, memory)
        fitting = fitting_sessions(models.codec, models.decoder, context_tokens, rewind_frames, memory)
        max_sessions = most_sessions(models.codec, models.decoder, context_frames, rewind_frames, fitting)
    else:
        check_memory(models.codec, models.decoder, max_sessions, context_tokens, rewind_frames, memory)
    try:
        step = FrameStep(models.codec, models.decoder, max_sessions, context_frames, rewind_frames)
        _LOG.info("making the step ready")
        step.warm_up()
    except (RuntimeError, MemoryError) as error:  # torch raises `RuntimeError` for want of memory, too
        if not is_want_of_memory(error):
            _LOG.exception("the step could not be made ready on %s", models.codec.device)
            raise StreamingError(f"the step could not be made ready on {models.codec.device}: {error}") from error
        raise TooLargeError(
            f"{max_sessions} sessions with {context_tokens} tokens of context each do not fit into memory; "
            "use fewer --max-sessions or --context-tokens"
        ) from error
    decoder = models.decoder
    dtype_name = str(decoder.dtype).removeprefix("torch.")
    return Engine(
        step,
        models.name,
        models.notice.notice,
        str(decoder.device),
        dtype_name,
        models.sampling,
        operations=step.operations,
        suggestions=models.notice.suggestions,
        voices=models.notice.voices,
    )


def fitting_sessions(
    codec: StreamingMimi,
    decoder: LlamaDecoder,
    context_tokens: int = CONTEXT_TOKENS,
    rewind_frames: int = REWIND_FRAMES,
    memory: Memory | None = None,
) -> int | None:
    """Return how many sessions fit into the memory; None where nothing says how much there is. memory: what there is;
    by default, what the models' device says.
    """
    memory = memory or _memory_of(codec.device)
    if memory is None:
        return None
    each = slot_bytes(codec, decoder, context_tokens, rewind_frames)
    return int(_SHARE * memory.free / each) - _spare_slots(codec.device)


def frames_of_context(decoder: LlamaDecoder, context_tokens: int) -> int:
    """Return how many frames a context holds. Raises `StreamingError` for one in which nothing can be heard."""
    frames = decoder.context_frames(context_tokens)
    if frames < _LEAST_CONTEXT_FRAMES:
        least = decoder.prefix + _LEAST_CONTEXT_FRAMES * decoder.num_codebooks
        raise StreamingError(
            f"a context of {context_tokens} tokens is too short to hear anything: with {decoder.num_codebooks} "
            f"codebooks {least} is the least that works"
        )
    return frames


def check_memory(
    codec: StreamingMimi,
    decoder: LlamaDecoder | None,
    sessions: int,
    context_tokens: int = CONTEXT_TOKENS,
    rewind_frames: int = REWIND_FRAMES,
    memory: Memory | None = None,
) -> None:
    """Raise `TooLargeError` if there is no memory for so many slots, before any of it is taken.

    A system that gives out more memory than it has kills a process when it uses it, without a word. memory: what there
    is; by default, what the models' device says. decoder: None for the codec alone.
    """
    memory = memory or _memory_of(codec.device)
    taken = sessions + _spare_slots(codec.device)
    try:
        each = slot_bytes(codec, decoder, context_tokens, rewind_frames)
    except RuntimeError as error:
        raise TooLargeError(f"{context_tokens:,} tokens of context do not fit into any memory") from error
    if memory is None or taken * each <= _SHARE * memory.free:
        return
    most = int(_SHARE * memory.free / each) - (taken - sessions)
    hint = f"at most {most:,} fit" if most > 0 else f"one alone needs {size(each)}; use fewer --context-tokens"
    raise TooLargeError(
        f"{sessions:,} sessions with {context_tokens:,} tokens of context need {size(taken * each)}, and "
        f"{_free(memory, codec.device)}: {hint}"
    )


def check_weights(
    config: LlamaConfig, quantize: Quantize, bytes_each: float, device: torch.device, memory: Memory | None = None
) -> None:
    """Raise `TooLargeError` if a decoder's weights alone do not fit, before they are read.

    bytes_each: of a weight that is not quantized. memory: what there is; by default, what the device says.
    """
    needed = {"int8": 1.0, "int4": 0.5}.get(quantize, bytes_each) * transformer_parameters(config)
    memory = memory or _memory_of(device)
    if memory is not None and not _weights_fit(needed, memory):
        raise TooLargeError(
            f"the decoder's weights need {size(needed)}, and {_free(memory, device)}; "
            f"try --quantize int4, or a smaller model: weights may take {_SHARE:.0%} of what is free"
        )


def _weights_fit(needed: float, memory: Memory) -> bool:
    return needed <= _SHARE * memory.free


def _memory_of(device: torch.device) -> Memory | None:
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return Memory(total, free)
    return available_memory()


def _spare_slots(device: torch.device) -> int:
    """Return how many slots beside the sessions' take memory: a CPU's system gives out what is written to."""
    return int(device.type == "cuda")


def _share_of(device: torch.device, share: float) -> Memory | None:
    """Return what this process may have of a device's memory, and how much of that is left."""
    memory = _memory_of(device)
    if memory is None or share == 1:
        return memory
    taken = torch.cuda.memory_reserved(device) if device.type == "cuda" else resident()
    total = int(share * memory.total)
    return Memory(total, max(0, min(memory.free, total - taken)))


def _free(memory: Memory, device: torch.device) -> str:
    where = "this machine's" if device.type == "cpu" else f"{device}'s"
    return f"{size(memory.free)} of {where} {size(memory.total)} are free"
