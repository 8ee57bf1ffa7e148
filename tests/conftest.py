"""Tiny random checkpoints, each written once a session, and the settings that make runs repeat themselves.

torch and transformers take eleven seconds of processor time to import, so they are imported where tests are collected:
not in the process that only hands out tests to others.
"""

from __future__ import annotations

import collections
import functools
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub: no test may reach for the network
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from streaming.models.llama import LlamaDecoder
    from streaming.models.mimi import StreamingMimi

LONGEST = (
    *("test_states.py", "test_stages.py", "test_server_death.py", "test_clients.py", "test_long_session.py"),
    *("test_session_store.py", "test_page.py", "test_compiles.py", "test_documents.py", "test_silent_network.py"),
    *("test_device.py", "test_churn.py", "test_server_entry.py", "test_runs.py", "test_end_to_end.py"),
    *("test_afar.py", "test_memory.py", "test_kubernetes.py", "test_image.py", "test_draw.py", "test_device_step.py"),
    *("test_mimi.py", "test_resumption.py", "test_readme.py"),
)
"""Files that take half a minute and more. What waits and what computes take turns: they run at the same time."""

if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # a job in a shell's background: what tests start would ignore SIGINT, too
    signal.signal(signal.SIGINT, signal.default_int_handler)
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


def pytest_collectstart() -> None:
    _prepare()


@functools.cache
def _prepare() -> None:
    """Set up the libraries that take long to import, before the first file of tests is imported."""
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton, which reads it once
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(1)  # products as small as these are slower on several threads


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let what takes longest begin first: a long file that begins last is waited for by all other processes."""
    sizes = collections.Counter(item.path for item in items)
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: (places.get(item.path.name, len(places)), -sizes[item.path], item.path))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    import torch

    torch.manual_seed(0)


@pytest.fixture
def server_says(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., tuple[int | str | None, str]]]:
    """`server_says(*flags)`: the exit status of `server.py` with flags that it refuses, and all that it says.

    It runs in this process: one of its own takes five seconds of processor time to import torch once more.
    """
    import torch

    from streaming.server import command
    from streaming.server.watch import log

    def says(*flags: str) -> tuple[int | str | None, str]:
        status: int | str | None
        try:
            status = command.main(["--port", "0", *flags])
        except SystemExit as ended:
            status = ended.code
        return status, capsys.readouterr().err.strip()

    monkeypatch.setattr(log, "configure", lambda *_: None)  # pytest's own handlers stay
    for name in os.environ:
        if name.startswith("STREAMING_"):
            monkeypatch.delenv(name)
    threads = torch.get_num_threads()
    yield says
    torch.set_num_threads(threads)


@pytest.fixture
def without_native(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is loaded in this test runs in PyTorch alone, as where there is no compiler."""
    from streaming.compiler import SWITCH
    from streaming.models.operations.native.library import library

    monkeypatch.setenv(SWITCH, "0")
    library.cache_clear()
    yield
    library.cache_clear()


@pytest.fixture
def heard_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever says in this test how much was heard is in time, however slow the machine is: half a second is not."""
    for module in ("streaming.conversation.conversation", "streaming.server.openai.interruptions"):
        monkeypatch.setattr(f"{module}.HEARD_TIMEOUT_S", 20.0)


@pytest.fixture(scope="session")
def codec_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`codec_checkpoint(**overrides)`: the folder of a tiny Mimi, see `tests.reference.write_codec`. Not to be
    changed.
    """
    from tests.reference import write_codec

    return _once(write_codec, tmp_path_factory.mktemp("codecs"))


@pytest.fixture(scope="session")
def decoder_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`decoder_checkpoint(**overrides)`: the folder of a tiny Llama, see `tests.reference.write_decoder`. Not to be
    changed.
    """
    from tests.reference import write_decoder

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
    from tests.reference import load_codec

    return load_codec(codec_dir)


@pytest.fixture(scope="session")
def decoder(decoder_dir: Path) -> LlamaDecoder:
    """`decoder_dir`, loaded."""
    from tests.reference import load_decoder

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
