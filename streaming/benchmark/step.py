"""One frame step, split into its stages, against the least that each must read and multiply.

The floor of a stage is the larger of the time to read its weights and the keys and values that its slots hold, and of
the time for its products, at the best rates that the machine reached in this run; that of a step is the sum over its
stages. Share of floor: floor over time, 1 at most.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from streaming.audio import FRAME
from streaming.benchmark import machine
from streaming.benchmark.floors import Rates, Works
from streaming.benchmark.full import FullStep
from streaming.benchmark.likelihood import PROMPT, compare, losses, speech_frames
from streaming.benchmark.models import add_arguments as add_model_arguments
from streaming.benchmark.report import Report
from streaming.benchmark.steps import series_name
from streaming.benchmark.work import Work, work_of
from streaming.loading import (
    DTYPES,
    RANDOM,
    check_memory,
    frames_of_context,
    load_models,
    pick_device,
)
from streaming.models.attention import KeyValueRing
from streaming.models.likelihood import encode
from streaming.models.llama import LlamaDecoder
from streaming.models.mimi import StreamingMimi
from streaming.models.random_weights import DECODERS, random_codec
from streaming.models.sampler import Drawing
from streaming.options import count, positive

_QUALITY_FRAMES = 200
_READING = "reading"
"""The name of what is timed beside the stages: reading more memory than a cache holds."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser, sizes=(*DECODERS, "mimi"))
    parser.add_argument("--codec-dtype", choices=DTYPES, default="float32", help="How the codec's weights are kept.")
    parser.add_argument(
        "--input",
        type=Path,
        default=PROMPT,
        metavar="WAV",
        help="The speech by which the cost of --quantize and --codec-dtype is found.",
    )
    parser.add_argument(
        "--slots",
        type=count,
        nargs="+",
        metavar="B",
        help="How many sessions a step has (default: 1 4; on a GPU 1 64).",
    )
    parser.add_argument("--seconds", type=positive, default=5.0, metavar="S", help="How long each line is measured.")


@dataclass(frozen=True)
class _Models:
    name: str
    codec: StreamingMimi
    decoder: LlamaDecoder | None


def _load(options: argparse.Namespace) -> _Models:
    if options.random == "mimi":
        codec = random_codec(8, pick_device(options.device), DTYPES[options.codec_dtype])
        return _Models("random mimi", codec, None)
    name, dtype = options.model, options.dtype
    if options.random is not None:
        name, dtype = RANDOM + options.random, "bfloat16" if dtype == "auto" else dtype
    models = load_models(name, options.codec, options.device, dtype, options.quantize, options.codec_dtype)
    return _Models(models.name, models.codec, models.decoder)


def measure(options: argparse.Namespace) -> Report:
    """`step`: see the module. Raises as loading does."""
    models = _load(options)
    device = models.codec.device
    widths = options.slots or ((1, 64) if device.type == "cuda" else (1, 4))
    _check(models, max(widths), options)
    block = machine.block_to_read(device)
    multiplying = {kind: machine.matrix_rate(device, kind) for kind in {models.codec.dtype, *_kinds(models)}}
    rows: list[dict[str, str | int | float]] = []
    series: dict[str, list[float]] = {}
    done: list[tuple[int, list[_Stage], dict[str, list[float]]]] = []
    for slots in widths:
        stages = _stages(models, slots, options)
        # The memory is read in turn with what is measured: on a machine that is shared its rate is not always the same.
        runs: dict[str, Callable[[], object]] = {_READING: block.sum, **{stage.name: stage.run for stage in stages}}
        taken = machine.interleaved(runs, device, options.seconds)
        done.append((slots, [replace(stage, run=block.sum) for stage in stages], taken))  # frees the slots' memory
    medians = [{name: machine.median(times) for name, times in taken.items()} for _, _, taken in done]
    reading = block.nbytes / machine.median([ms for _, _, taken in done for ms in taken[_READING]]) * 1e3
    works = [{stage.name: _works(stage, stages) for stage in stages} for _, stages, _ in done]
    seen = [(parts[name], median[name]) for parts, median in zip(works, medians, strict=True) for name in parts]
    rates = Rates(reading, multiplying).raised(seen)
    for (slots, stages, taken), parts, median in zip(done, works, medians, strict=True):
        for stage in stages:
            floor = rates.floor_ms(parts[stage.name])
            row: dict[str, str | int | float] = {"slots": slots, "stage": stage.name}
            row |= {"ms": median[stage.name], "p99 ms": float(np.percentile(taken[stage.name], 99)), "floor ms": floor}
            row["share of floor"] = floor / median[stage.name]
            rows.append(row)
            if stage.parts:
                series[series_name(slots, stage.name)] = [round(ms, 3) for ms in taken[stage.name]]
    facts: dict[str, str | int | float] = {
        "model": models.name,
        "device": machine.name_of(device),
        **_operations(models),
        "GB/s": rates.read / 1e9,
        "GB/s of memory": reading / 1e9,
        **{f"{str(kind).removeprefix('torch.')} TFLOP/s": rate / 1e12 for kind, rate in rates.multiply.items()},
    }
    if options.codec_dtype != "float32":
        facts["codec"] = options.codec_dtype
    if options.quantize != "none":
        facts["quantize"] = options.quantize
    if options.random is None:
        facts |= _quality(models, options)
    return Report("one frame step (80 ms of speech) and its floor", facts, rows, series=series)


def _check(models: _Models, slots: int, options: argparse.Namespace) -> None:
    """Raise what the measurement would end with, before it begins."""
    check_memory(models.codec, models.decoder, slots, options.context_tokens)
    if models.decoder is not None:
        frames_of_context(models.decoder, options.context_tokens)
    if options.random is None:
        speech_frames(options.input, 1)


def _quality(models: _Models, options: argparse.Namespace) -> dict[str, str | int | float]:
    """Return what was given up for speed, on speech: of the codes those that are float32's, and what quantising does to
    the likelihood in nats a token, the change and its standard error.
    """
    facts: dict[str, str | int | float] = {}
    if (options.codec_dtype, options.quantize) == ("float32", "none"):
        return facts
    plain = load_models(options.model, options.codec, options.device, options.dtype)
    frames = speech_frames(options.input, _QUALITY_FRAMES)
    codes = encode(plain.codec, frames)
    if options.codec_dtype != "float32":
        same = (encode(models.codec, frames) == codes).float().mean(0)
        facts |= {"equal codes": float(same.mean()), "of codebook 0": float(same[0])}
    if options.quantize != "none":
        assert models.decoder is not None
        mean, change, error = compare(
            *(losses(decoder, codes).flatten() for decoder in (models.decoder, plain.decoder))
        )
        facts |= {"nats/token": mean, "change": change, "std. error": error}
    return facts


def _operations(models: _Models) -> dict[str, str]:
    told = {"codec's operations": models.codec.operations.name}
    return told if models.decoder is None else {"decoder's operations": models.decoder.operations.name} | told


def _kinds(models: _Models) -> list[torch.dtype]:
    return [] if models.decoder is None else [models.decoder.dtype]


@dataclass(frozen=True)
class _Stage:
    """work: none of its own where it is made of other stages, its `parts`."""

    name: str
    run: Callable[[], object]
    dtype: torch.dtype
    work: Work | None = None
    parts: tuple[str, ...] = ()


def _stage(name: str, run: Callable[[], object], model: StreamingMimi | LlamaDecoder, state_bytes: int) -> _Stage:
    """Return a stage with its work. state_bytes: of keys and values that the slots hold."""
    work = work_of(run, model)
    work = replace(work, read_bytes=work.read_bytes + state_bytes)
    return _Stage(name, machine.captured(run, model.device), model.dtype, work)


def _works(stage: _Stage, stages: list[_Stage]) -> Works:
    if stage.work is not None:
        return ((stage.dtype, stage.work),)
    return tuple(work for part in stages if part.name in stage.parts for work in _works(part, stages))


def _held(ring: KeyValueRing, slots: int, positions: int) -> int:
    """Return the bytes of the keys and values of so many positions of so many slots, in all layers."""
    return (ring.keys.nbytes + ring.values.nbytes) // (ring.keys.shape[0] * ring.keys.shape[3]) * slots * positions


def _stages(models: _Models, slots: int, options: argparse.Namespace) -> list[_Stage]:
    """Return the stages over `slots` streams whose context is full, and the whole step, from host to host."""
    codec, decoder, device = models.codec, models.decoder, models.codec.device
    state = codec.init_state(slots)
    everyone = torch.ones(slots, dtype=torch.bool, device=device)
    pcm = 0.1 * torch.randn(slots, FRAME, device=device)
    codes = torch.zeros(slots, codec.num_codebooks, dtype=torch.int64, device=device)
    for half in (state.encoder, state.decoder):
        half.frames.fill_(codec.config.window)
    window = codec.config.window
    stages = [
        _stage(
            "codec encode", lambda: codec.encode(pcm, state, everyone), codec, _held(state.encoder.ring, slots, window)
        ),
        _stage(
            "codec decode",
            lambda: codec.decode(codes, state, everyone),
            codec,
            _held(state.decoder.ring, slots, window),
        ),
    ]
    if decoder is None:
        return stages
    full = FullStep(codec, decoder, slots, options.context_tokens)
    step, inner = full.step, full.step._device
    columns = decoder.columns_for(inner.decoder_state, step.context_frames)
    everybody = torch.arange(slots, device=device)
    unit = torch.zeros(slots, decoder.num_codebooks, dtype=torch.int64, device=device)

    def one_by_one() -> None:
        view = decoder.begin_frame(inner.decoder_state, everybody, step.context_frames, columns)
        for book in range(decoder.num_codebooks):
            hidden = decoder.forward(unit[:, :1], inner.decoder_state, view.columns(book, book + 1))
            decoder.logits(hidden[:, 0], book)

    def at_once() -> None:
        view = decoder.begin_frame(inner.decoder_state, everybody, step.context_frames, columns)
        decoder.forward(unit, inner.decoder_state, view)

    flags = torch.ones(4, slots, dtype=torch.bool, device=device)
    drawing = Drawing(everybody, inner.decoder_state.frames, ~flags[0], flags[1], codes, flags[2], flags[3])

    def drawing_too() -> None:
        """Draw as a step does: after a pass over all weights, which leaves no cache warm."""
        view = decoder.begin_frame(inner.decoder_state, everybody, step.context_frames, columns)
        for book in range(decoder.num_codebooks):
            hidden = decoder.forward(unit[:, :1], inner.decoder_state, view.columns(book, book + 1))
            decoder.draw(hidden[:, 0], book, inner.sampler, drawing, few=True)

    positions = step.context_frames * decoder.num_codebooks
    held = _held(inner.decoder_state.ring, slots, positions)  # without the step's spare slot
    stages += [
        _stage("decoder, listening", at_once, decoder, held),
        _stage("decoder, speaking", one_by_one, decoder, decoder.num_codebooks * held),
        _stage("decoder, speaking and drawing", drawing_too, decoder, decoder.num_codebooks * held),
    ]
    listening = ("codec encode", "decoder, listening", "codec decode")
    speaking = ("decoder, speaking and drawing", "codec decode", "codec encode")
    for name, run, parts in (("listening", full.listen, listening), ("speaking", full.speak, speaking)):
        stages.append(_Stage(f"whole step, {name}", run, decoder.dtype, parts=parts))
    return stages
