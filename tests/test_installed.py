"""The package as `pip install .` leaves it: two commands, nothing beside them, and a first sound."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
import soundfile

from streaming.command import VERSION

ROOT = Path(__file__).parents[1]
NEEDED = [name for name in ("pip", "setuptools") if importlib.util.find_spec(name) is None]

pytestmark = [
    pytest.mark.skipif(bool(NEEDED), reason=f"a wheel is built without a network, and needs {' and '.join(NEEDED)}"),
    pytest.mark.skipif(sys.platform == "win32", reason="POSIX paths"),
]


def run(*command: object, **settings: object) -> subprocess.CompletedProcess[str]:
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("STREAMING_", "PYTHON", "COV_"))
    }
    done = subprocess.run(
        [str(word) for word in command],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        **settings,  # type: ignore[call-overload]
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: what a build leaves behind is not for the clone."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "server.py", "client.py"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "streaming", source / "streaming", ignore=shutil.ignore_patterns("__pycache__"))
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def commands(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the commands in an environment that has the wheel, and what it depends on from this one."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder)
    python = folder / "bin" / "python"
    (site,) = folder.glob("lib/python*/site-packages")
    others = dict.fromkeys((sysconfig.get_path("purelib"), sysconfig.get_path("platlib")))
    (site / "others.pth").write_text("".join(f"{other}\n" for other in others))
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
    return folder / "bin"


def test_a_wheel_holds_the_whole_package_and_no_other_module(wheel: Path) -> None:
    """Modules called `server` and `client` would be everybody's; a file that is left out is missed far from here."""
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    there = {path.relative_to(ROOT).as_posix() for path in (ROOT / "streaming").rglob("*") if path.is_file()}
    assert names == {name for name in there if "__pycache__" not in name}


def test_the_commands_are_the_packages_own(commands: Path, tmp_path: Path) -> None:
    for name in ("streaming-server", "streaming-client"):
        assert run(commands / name, "--version", cwd=tmp_path).stdout == f"streaming-continuation {VERSION}\n"
        assert run(commands / name, "--help", cwd=tmp_path).stdout.startswith(f"usage: {name} ")
    where = "import streaming.entry; print(streaming.entry.__file__)"
    assert run(commands / "python", "-c", where, cwd=tmp_path).stdout.startswith(str(commands.parent))


def test_an_installed_client_gets_a_first_sound(commands: Path, tmp_path: Path) -> None:
    """A wheel lacked the server, and the client that starts one."""
    output = tmp_path / "continuation.wav"
    prompt = ROOT / "examples" / "prompt.wav"
    flags = ("--output", output, "--pace", "fast", "--max-seconds", "2", "--seed", "1")
    done = run(commands / "streaming-client", prompt, *flags, cwd=tmp_path)
    samples, rate = soundfile.read(output)
    assert rate == 24_000 and 0 < len(samples) <= 48_000, "the demo may end it before"
    seconds = f"{len(samples) / rate:.1f}"
    sentence = rf"streaming-client: {seconds} s (in a [\w ]+ voice|by the demo model) -> {output}, first sound after"
    assert re.search(sentence, done.stderr)
    assert abs(samples).max() > 0.001
