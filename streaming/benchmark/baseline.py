"""What a frame costs with `transformers` and here: the same weights, in turn in one run.

`transformers` streams Mimi's encoder with its caches; its decoder keeps no convolution state, so decoding frame by
frame with it is only a cost, not sound. A token is one of its `generate`, as the published batch script calls it: so
many forwards of the model, the first one over a short prompt. Where `torchaudio` is installed, a file is continued by
the published script as it is published, and here. The `moshi` package's Mimi, where it is installed, has
the same shape and weights of its own. On a GPU our side is captured as graphs, as it runs in a server; the others' is
not, as it does not.
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from streaming.audio import FRAME, SAMPLE_RATE, RecordingResampler
from streaming.benchmark import llama_cpp, machine
from streaming.benchmark.report import Report
from streaming.config import LlamaConfig
from streaming.loading import DTYPES, add_models, folders, load_codec, load_engine, pick_device
from streaming.models.checkpoint import TensorSource, read_config
from streaming.models.llama import LlamaDecoder
from streaming.models.random_weights import DECODERS, MIMI, codes_layout
from streaming.models.token_layout import TokenLayout
from streaming.options import count, positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_models(parser, tuple(DTYPES), "bfloat16", "both decoders compute")
    parser.add_argument(
        "--random", choices=(*DECODERS, "mimi"), help="Measure random weights of the full size instead of --model."
    )
    parser.add_argument(
        "--quantize", choices=("none", "int8", "int4"), default="none", help="How our decoder's weights are kept."
    )
    parser.add_argument("--codec-dtype", choices=DTYPES, default="float32", help="How our codec's weights are kept.")
    parser.add_argument(
        "--tokens", type=count, default=32, metavar="N", help="How many tokens one call of generate makes."
    )
    parser.add_argument(
        "--seconds", type=positive, default=20.0, metavar="S", help="How long the codec is measured, and the decoder."
    )


def measure(options: argparse.Namespace) -> Report:
    """`baseline`: see the module. Raises as loading does."""
    device, ours = pick_device(options.device), dict[str, str]()
    with _checkpoints(options) as (model, codec):
        with torch.inference_mode():
            contest = _codecs(codec, device, DTYPES[options.codec_dtype], ours)
            rows = _rows("ms a frame", contest, device, options.seconds, 1)
            if model is not None:
                size = int(read_config(codec).get("codebook_size", MIMI.codebook_size))
                with _decoders(model, size, options, device, ours) as (contest, tokens):
                    rows += _rows("ms a token", contest, device, options.seconds, tokens)
        if model is not None and options.random is None and importlib.util.find_spec("torchaudio") is not None:
            with _files(model, codec, options, device) as contest:
                rows += _rows("ms", contest, device, options.seconds, 1)
    facts: dict[str, str | int | float] = {
        "model": options.model if options.random is None else f"random {options.random}",
        "device": machine.name_of(device),
        **ours,
        "decoders": options.dtype,
        "ours": options.quantize,
        "our codec": options.codec_dtype,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }
    notes = (
        [llama_cpp.MISSING] if options.random != "mimi" and device.type == "cpu" and not llama_cpp.installed() else []
    )
    return Report("the same weights with others, and here", facts, rows, notes=notes)


Contest = dict[str, dict[str, Callable[[], object]]]
"""Each piece of work, and by name the programs that do it; "streaming" is this project."""


def _rows(
    unit: str, contest: Contest, device: torch.device, seconds: float, units: int
) -> list[dict[str, str | int | float]]:
    rows: list[dict[str, str | int | float]] = []
    for task, sides in contest.items():
        taken = machine.interleaved(sides, device, seconds / len(contest))
        ours = machine.median(taken["streaming"]) / units
        for side, times in taken.items():
            each = machine.median(times) / units
            rows.append({"task": task, "with": side, "unit": unit, "ms": each, "times ours": each / ours})
    return rows


@contextmanager
def _checkpoints(options: argparse.Namespace) -> Iterator[tuple[Path | None, Path]]:
    """Return the folders of the decoder and of the codec that both sides load; for --random they are made, and removed
    again.
    """
    if options.random is None:
        yield folders(options.model, options.codec)
        return
    with tempfile.TemporaryDirectory(prefix="baseline-") as folder:
        model, codec = Path(folder) / "model", Path(folder) / "codec"
        transformers.MimiModel(transformers.MimiConfig()).save_pretrained(codec)  # the defaults are the released shape
        if options.random != "mimi":
            _save_random(DECODERS[options.random], DTYPES[options.dtype], model)
        yield None if options.random == "mimi" else model, codec


def _save_random(config: LlamaConfig, dtype: torch.dtype, folder: Path) -> None:
    rope = asdict(config.rope)
    parameters = {
        "rope_type": "llama3",
        "rope_theta": rope.pop("theta"),
        "original_max_position_embeddings": rope.pop("original_context"),
        **rope,
    }
    shape: Any = transformers.LlamaConfig(
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        intermediate_size=config.intermediate_size,
        rms_norm_eps=config.norm_eps,
        rope_parameters=parameters,
        max_position_embeddings=131_072,
        tie_word_embeddings=config.tied,
        vocab_size=config.vocab_size,
        dtype=dtype,
    )
    shape.num_quantizers = config.num_codebooks
    torch.set_default_dtype(dtype)
    try:
        transformers.LlamaForCausalLM(shape).save_pretrained(folder)
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def _files(model: Path, codec: Path, options: argparse.Namespace, device: torch.device) -> Iterator[Contest]:
    """3 s of speech at 16 kHz, and a second of its continuation: the published script on samples that are read already,
    and a session here, as fast as it goes. Both draw, so either may come to an end of its own.
    """
    import torchaudio

    books, frames = LlamaConfig.from_dict(read_config(model)).num_codebooks, 12
    llama: Any = transformers.LlamaForCausalLM.from_pretrained(model, dtype=DTYPES[options.dtype])
    mimi: Any = transformers.MimiModel.from_pretrained(codec)
    llama.to(device).eval()
    mimi.to(device).eval()
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(model)
    samples = 0.1 * torch.randn(1, 3 * 16_000)

    @torch.inference_mode()
    def script() -> None:
        waveform = torchaudio.transforms.Resample(16_000, SAMPLE_RATE)(samples)
        codes = mimi.encode(waveform[None].to(device), num_quantizers=books).audio_codes[0].T
        text = "".join(f"<{code}_{book}>" for frame in codes.tolist() for book, code in enumerate(frame))
        inputs = tokenizer(f"<audio>{text}", return_tensors="pt").to(device)
        drawn = {"do_sample": True, "temperature": 0.8, "top_k": 30, "pad_token_id": 0}
        generated = llama.generate(**inputs, **drawn, max_new_tokens=frames * books)
        found = re.findall(r"<(\d+)_(\d+)>", tokenizer.decode(generated[0]))
        whole = [int(code) for code, _ in found[: len(found) // books * books]]
        mimi.decode(torch.tensor(whole, device=device).view(1, -1, books).transpose(1, 2))

    with load_engine(
        model,
        codec,
        device=device,
        dtype=options.dtype,
        quantize=options.quantize,
        max_sessions=1,
        codec_dtype=options.codec_dtype,
    ) as engine:

        def session() -> None:
            resampler = RecordingResampler(16_000)
            speech = np.concatenate((resampler.push(samples[0].numpy()), resampler.flush()))
            with engine.open() as opened:
                for start in range(0, len(speech), FRAME):
                    opened.listen(speech[start : start + FRAME])
                for _ in opened.speak(frames):
                    pass

        yield {"file, in and out": {"streaming": session, "transformers": script}}


def _codecs(folder: Path, device: torch.device, dtype: torch.dtype, facts: dict[str, str]) -> Contest:
    """One frame in and one frame out; the others' in float32. facts: to which is added which operations run here."""
    books = min(4, int(read_config(folder).get("num_quantizers", 32)))
    ours = load_codec(folder, books, device, dtype)
    facts["codec's operations"] = ours.operations.name
    theirs: Any = transformers.MimiModel.from_pretrained(folder)
    theirs.to(device).eval()
    state, active = ours.init_state(1), torch.ones(1, dtype=torch.bool, device=device)
    pcm = 0.1 * torch.randn(1, FRAME, device=device)
    codes = ours.encode(pcm, state, active)
    caches: dict[str, object] = {}
    newer = "encoder_cache" in inspect.signature(theirs.encode).parameters
    kept_in, kept_out = (f"{half}_{'cache' if newer else 'past_key_values'}" for half in ("encoder", "decoder"))

    def encode() -> None:
        out = theirs.encode(
            pcm[:, None],
            num_quantizers=books,
            use_streaming=True,
            padding_cache=caches.get("padding"),
            **{kept_in: caches.get("keys")},
        )
        caches["keys"], caches["padding"] = getattr(out, kept_in), out.padding_cache

    def decode() -> None:
        caches["back"] = getattr(theirs.decode(codes[:, :, None], **{kept_out: caches.get("back")}), kept_out)

    captured = partial(machine.captured, device=device)
    contest: Contest = {
        "codec, in": {"streaming": captured(lambda: ours.encode(pcm, state, active)), "transformers": encode},
        "codec, out": {"streaming": captured(lambda: ours.decode(codes, state, active)), "transformers": decode},
    }
    if importlib.util.find_spec("moshi") is not None:
        into, out = _moshi(pcm, codes, device)
        contest["codec, in"]["moshi"], contest["codec, out"]["moshi"] = into, out
    return contest


def _moshi(pcm: Tensor, codes: Tensor, device: torch.device) -> tuple[Callable[[], object], Callable[[], object]]:
    from moshi.models import loaders

    mimi = loaders.get_mimi(None, device=device, num_codebooks=codes.shape[1])
    mimi.streaming_forever(1)
    return lambda: mimi.encode(pcm[:, None]), lambda: mimi.decode(codes[:, :, None])


@contextmanager
def _decoders(
    folder: Path, size: int, options: argparse.Namespace, device: torch.device, facts: dict[str, str]
) -> Iterator[tuple[Contest, int]]:
    """Greedy speech, whole frames of it, and how many tokens that is. facts: as for `_codecs`."""
    dtype, raw = DTYPES[options.dtype], read_config(folder)
    config = LlamaConfig.from_dict(raw)
    random = options.random is not None
    layout = codes_layout(config) if random else TokenLayout.load(folder, config.num_codebooks, size, config.vocab_size)
    ours = LlamaDecoder(TensorSource(folder, device, dtype), config, layout, options.quantize)
    facts["decoder's operations"] = ours.operations.name
    theirs: Any = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=dtype)
    theirs.to(device).eval()
    books, frames = config.num_codebooks, -(-options.tokens // config.num_codebooks)
    prompt = layout.units[:, :1].T.to(device)  # one frame
    state, active = ours.init_state(1, frames), torch.ones(1, dtype=torch.bool, device=device)
    slots = state.every_slot

    def speak() -> None:
        state.frames.zero_()
        unit = torch.zeros(1, 1, dtype=torch.int64, device=device)
        for frame in range(frames):
            view = ours.begin_frame(state, slots, frames, ours.columns_for(state, frame))
            for book in range(books):
                hidden = ours.forward(unit, state, view.columns(book, book + 1))
                drawn = ours.logits(hidden[:, 0], book).argmax(dim=-1).clamp(max=ours.codebook_size - 1)
                unit = (drawn + book * ours.codebook_size)[:, None]
            ours.end_frame(torch.zeros(1, books, dtype=torch.int64, device=device), state, slots, active)

    def generate() -> None:
        theirs.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            min_new_tokens=frames * books,
            max_new_tokens=frames * books,
            pad_token_id=0,
        )

    sides: dict[str, Callable[[], object]] = {
        "streaming": machine.captured(speak, device),
        "transformers": generate,
    }
    with ExitStack() as used:
        if device.type == "cpu" and llama_cpp.installed():
            source = TensorSource(folder, device, torch.float32)
            decoder = used.enter_context(_llama_cpp(source, config, layout, len(layout.prefix) + (frames + 1) * books))
            ranges = [range(book * ours.codebook_size, (book + 1) * ours.codebook_size) for book in range(books)]
            frame = [codes.start for codes in ranges]
            sides["llama.cpp, Q4_0"] = partial(decoder.speak, frame, ranges, frames)
        yield {"decoder": sides}, frames * books


@contextmanager
def _llama_cpp(
    source: TensorSource, config: LlamaConfig, layout: TokenLayout, tokens: int
) -> Iterator[llama_cpp.LlamaCpp]:
    with tempfile.TemporaryDirectory(prefix="baseline-") as made:
        wide, four = Path(made) / "wide.gguf", Path(made) / "four.gguf"
        llama_cpp.write_gguf(source, config, layout, wide)
        llama_cpp.to_q4_0(wide, four)
        wide.unlink()
        with closing(llama_cpp.LlamaCpp(four, tokens)) as decoder:
            yield decoder
