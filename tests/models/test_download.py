"""What is said of a download, before it and while it goes on; the hub is played."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants

from streaming.models import checkpoint, download
from streaming.models.download import Missing, missing, told

GB = 1_000_000_000


def repository(monkeypatch: pytest.MonkeyPatch, sizes: dict[str, int], cached: tuple[str, ...] = ()) -> None:
    files = [SimpleNamespace(rfilename=name, size=size) for name, size in sizes.items()]

    class Api:
        def model_info(self, name: str, *, files_metadata: bool) -> SimpleNamespace:
            assert name == "some/model" and files_metadata
            return SimpleNamespace(siblings=files, sha="1234")

    def find(name: str, file: str, *, revision: str) -> str | None:
        assert (name, revision) == ("some/model", "1234")
        return file if file in cached else None

    monkeypatch.setattr(download, "HfApi", Api)
    monkeypatch.setattr(download, "try_to_load_from_cache", find)


def test_only_what_is_wanted_and_not_there_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pins 32 GB told of a model that is in the cache, or the pickles beside the weights counted in."""
    sizes = {"config.json": 900, "a.safetensors": 20 * GB, "b.safetensors": 12 * GB, "pytorch_model.bin": 32 * GB}
    repository(monkeypatch, sizes, cached=("a.safetensors",))
    assert missing("some/model", checkpoint._PATTERNS) == Missing(2, 12 * GB + 900)


def test_the_size_is_said_first_and_then_what_has_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And nothing where nothing comes: whoever waits for a line need not wait for ever. Pins minutes of silence."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    blobs = tmp_path / "models--some--model" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "older").write_bytes(bytes(8192))
    caplog.set_level(logging.INFO, "streaming")

    def said() -> list[str]:
        return [record.getMessage() for record in caplog.records]

    with told("some/model", Missing(7, 32 * GB), every_s=0.02):
        assert said() == ["some/model: downloading 32 GB in 7 files, once"]
        time.sleep(0.2)
        assert len(said()) == 1
        (blobs / "part.incomplete").write_bytes(bytes(1_048_576))
        deadline = time.monotonic() + 30
        while len(said()) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
    assert said()[1] == "some/model: 1.05 MB of 32 GB downloaded"
    assert len(said()) == 2


def test_small_files_are_fetched_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "streaming")
    with told("some/model", Missing(2, 50_000)):
        pass
    assert not caplog.records
