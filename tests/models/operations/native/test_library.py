"""Where the compiled operations come from, and what happens where they cannot be had."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from streaming import compiler
from streaming.models.huge_pages import on_huge_pages
from streaming.models.operations.native import library as native

if native.library() is None:
    pytest.skip("no native operations here", allow_module_level=True)


def test_a_second_start_compiles_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.library() is not None
    (made,) = cache.iterdir()
    assert cache.stat().st_mode & 0o777 == 0o700
    run = compiler.run

    def version_alone(*command: str) -> str:
        assert "--version" in command
        return run(*command)

    native.library.cache_clear()
    monkeypatch.setattr(compiler, "run", version_alone)
    assert native.library() is not None
    assert list(cache.iterdir()) == [made]


def test_what_differs_is_compiled_anew(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pins a library of yesterday's source, or of another machine that shares this home."""
    native.library()
    for name, value in (("_FLAGS", (*native._FLAGS, "-DANOTHER")), ("processor", lambda: "another")):
        native.library.cache_clear()
        monkeypatch.setattr(native, name, value)
        assert native.library() is not None
    assert len(list(cache.iterdir())) == 3


def test_what_others_cannot_write_to_is_kept(cache: Path) -> None:
    """Pins a library that its group may change, under a lax umask or in a folder that a recipe of the demo had made."""
    before = os.umask(0)
    try:
        cache.parent.mkdir()
        assert native.library() is not None
    finally:
        os.umask(before)
    (made,) = cache.iterdir()
    assert made.stat().st_mode & 0o777 == cache.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("content", [b"", b"rubbish"], ids=["empty", "rubbish"])
def test_a_damaged_library_is_made_anew(cache: Path, content: bytes) -> None:
    """As a full disk or a machine that lost its power leaves it: every later start was slow."""
    assert native.library() is not None
    (made,) = cache.iterdir()
    made.unlink()
    made.write_bytes(content)
    native.library.cache_clear()
    assert native.library() is not None
    assert made.stat().st_size > 1000


def test_a_compiler_may_have_arguments(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "env gcc -g0")
    assert native.library() is not None


def test_a_compiler_that_hangs_is_given_up(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With a warning on its lips: what was said until then comes as bytes, and was joined as text."""
    (tmp_path / "cc").write_text('#!/bin/sh\n[ "$1" = --version ] || { echo warning >&2; exec sleep 60; }\n')
    (tmp_path / "cc").chmod(0o755)
    monkeypatch.setenv("CC", str(tmp_path / "cc"))
    monkeypatch.setattr(compiler, "_SECONDS", 1)
    assert native.library() is None
    assert "timed out" in caplog.text


def test_a_folder_that_others_can_write_to_is_not_trusted(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What lies in it would be run."""
    cache.mkdir(parents=True)
    cache.chmod(0o777)
    assert native.library() is not None
    assert not list(cache.iterdir())
    assert "others could write to it" in caplog.text


def test_a_home_that_cannot_be_written_to_costs_a_compilation(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container with a read-only file system; nothing is left behind in the temporary folder."""
    (tmp_path / "tmp").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    assert native.library() is not None
    assert not list((tmp_path / "tmp").iterdir())
    assert not cache.exists()


@pytest.mark.parametrize(
    ("compiler", "says"),
    [
        (None, "no C compiler"),
        ("/nowhere/cc", "No such file"),
        ("#!/bin/sh\nexit 1\n", "returned non-zero"),
        ('#!/bin/sh\n[ "$1" = --version ] || { echo "unknown\nprocessor" >&2; exit 1; }\n', "unknown processor"),
        ('#!/bin/sh\nwhile [ "$#" -gt 2 ]; do shift; done; [ "$#" = 1 ] || echo rubbish > "$2"\n', "too short|header"),
    ],
    ids=["none", "missing", "failing", "refusing", "lying"],
)
def test_without_a_working_compiler_it_goes_on_in_pytorch(
    compiler: str | None,
    says: str,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.delenv("CC", raising=False)
    if compiler is None:
        monkeypatch.setenv("PATH", str(tmp_path))
    elif compiler.startswith("#!"):
        (tmp_path / "cc").write_text(compiler)
        (tmp_path / "cc").chmod(0o755)
        monkeypatch.setenv("CC", str(tmp_path / "cc"))
    else:
        monkeypatch.setenv("CC", compiler)
    assert native.library() is None
    (record,) = caplog.records
    assert record.message.startswith("running without native operations, slower: ")
    assert "\n" not in record.message
    assert any(part in record.message for part in says.split("|")), record.message
    assert not cache.exists() or not list(cache.iterdir())


def test_the_switch_is_told(without_native: None, caplog: pytest.LogCaptureFixture) -> None:
    """The documents said so and it was not: an operator's forgotten variable halved the speed in silence."""
    native.library.cache_clear()
    with caplog.at_level("INFO"):
        assert native.library() is None
    (record,) = caplog.records
    assert (record.levelname, record.message) == (
        "INFO",
        "running without native operations, slower: STREAMING_NATIVE=0 says so",
    )


def test_a_folder_of_another_user_is_told_as_such(
    cache: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It said that others could write to it, which was not so."""
    cache.mkdir(parents=True, mode=0o700)
    owner = os.getuid()
    monkeypatch.setattr(compiler.os, "getuid", lambda: owner + 1)
    assert native.library() is not None
    assert "belongs to another user" in caplog.text
    assert not list(cache.iterdir())


def test_threads_are_pytorch_s() -> None:
    """Two pools would spin against each other: a step took three times as long."""
    native.library()
    maps = Path("/proc/self/maps").read_text().splitlines()
    pools = {line.split(maxsplit=5)[-1] for line in maps if Path(line.split(maxsplit=5)[-1]).name.startswith("libgomp")}
    assert len(pools) <= 1


@pytest.mark.skipif(sys.platform != "linux", reason="pages of 2 MiB are asked for on Linux")
def test_large_weights_ask_for_large_pages() -> None:
    """A processor reads ahead to the end of a page: int8 was read at 0.66 of the memory's rate on pages of 4 KiB."""
    small, large = torch.randn(100), torch.randn(1200, 1024)
    assert on_huge_pages(small) is small
    moved = on_huge_pages(large)
    assert torch.equal(moved, large) and moved.data_ptr() % 2**21 == 0
    flags, inside = "", False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            first, last = (int(end, 16) for end in line.split()[0].split("-"))
            inside = first <= moved.data_ptr() < last
        elif inside and line.startswith("VmFlags:"):
            flags = line
    assert " hg" in flags or not Path("/sys/kernel/mm/transparent_hugepage").exists()


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
@pytest.mark.parametrize(
    ("target", "says", "has", "lacks"),
    [
        ("-march=x86-64-v4 -mavx512vnni", "AVX512-VNNI", r"vpdpbusd.*%zmm", "vpmaddubsw"),
        ("-march=x86-64-v3 -mavxvnni", "AVX-VNNI", r"vpdpbusd.*%ymm", "vpmaddubsw"),
        ("-march=x86-64-v4", "AVX512", r"vpmaddubsw.*%zmm", "vpdpbusd"),
        ("-march=x86-64-v3", "AVX2", r"vpmaddubsw.*%ymm", "vpdpbusd"),
        ("-march=x86-64", "SSE2", r"pmaddwd.*%xmm", "vpdpbusd"),
    ],
    ids=["AVX512-VNNI", "AVX-VNNI", "AVX512", "AVX2", "SSE2"],
)
def test_each_processor_gets_its_own_instructions(
    compiler: str, target: str, says: str, has: str, lacks: str, tmp_path: Path
) -> None:
    """For those that this machine cannot run, what it would run. Pins a condition that no compiler defines."""
    if platform.machine() != "x86_64" or shutil.which(compiler) is None:
        pytest.skip("another family of processors, or no such compiler")
    made = tmp_path / "kernels.s"
    flags = (*native._FLAGS, "-O0", *target.split())  # a quarter of the time, and the same choices
    subprocess.run([compiler, *flags, "-S", str(native._SOURCE), "-o", str(made)], check=True)
    code = made.read_text()
    assert f'"{says}"' in code and re.search(has, code) and lacks not in code
    fused = re.search("vfmadd", code) is not None
    assert fused == ("x86-64-v" in target), "where the source says so, and nowhere else"
