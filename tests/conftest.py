"""Tiny random checkpoints, each written once a session, and the settings that make runs repeat themselves."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub: no test may reach for the network
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton, which reads it once

from hypothesis import settings
from transformers.utils import logging

from streaming.models.llama import LlamaDecoder
from streaming.models.mimi import StreamingMimi
from streaming.models.operations.native.library import SWITCH, library
from tests.reference import load_codec, load_decoder, write_codec, write_decoder

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job; what tests start would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
logging.disable_progress_bar()
torch.set_num_threads(1)  # such tiny products lose by sharing
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def without_native(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is loaded in this test runs in PyTorch alone, as where there is no compiler."""
    monkeypatch.setenv(SWITCH, "0")
    library.cache_clear()
    yield
    library.cache_clear()


@pytest.fixture(scope="session")
def codec_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`codec_checkpoint(**overrides)`: the folder of a tiny Mimi, see `tests.reference.write_codec`. Not to be
    changed.
    """
    return _once(write_codec, tmp_path_factory.mktemp("codecs"))


@pytest.fixture(scope="session")
def decoder_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`decoder_checkpoint(**overrides)`: the folder of a tiny Llama, see `tests.reference.write_decoder`. Not to be
    changed.
    """
    return _once(write_decoder, tmp_path_factory.mktemp("decoders"))


@pytest.fixture(scope="session")
def codec_dir(codec_checkpoint: Callable[..., Path]) -> Path:
    """A tiny Mimi: 8 codebooks of 64 codes, a window of 20 steps."""
    return codec_checkpoint()


@pytest.fixture(scope="session")
def decoder_dir(decoder_checkpoint: Callable[..., Path]) -> Path:
    """A tiny Llama over 4 codebooks of 64 codes."""
    return decoder_checkpoint()


@pytest.fixture(scope="session")
def codec(codec_dir: Path) -> StreamingMimi:
    """The first 4 codebooks of `codec_dir`."""
    return load_codec(codec_dir)


@pytest.fixture(scope="session")
def decoder(decoder_dir: Path) -> LlamaDecoder:
    """`decoder_dir`, loaded."""
    return load_decoder(decoder_dir)


def _once(write: Callable[..., Path], root: Path) -> Callable[..., Path]:
    """`write`, called once for each set of arguments."""
    made: dict[str, Path] = {}

    def checkpoint(**overrides: object) -> Path:
        key = repr(sorted(overrides.items()))
        if key not in made:
            made[key] = write(root / str(len(made)), **overrides)
        return made[key]

    return checkpoint
