"""The layers of docs: imports go down only, and a client need not have torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From the bottom. A module may import its own floor and those before it, unless ALLOWED says less.
LAYERS = (
    (
        "streaming.errors",
        "streaming.config",
        "streaming.audio",
        "streaming.addresses",
        "streaming.command",
        "streaming.compiler",
        "streaming.files",
        "streaming.memory",
        "streaming.options",
    ),
    ("streaming.models",),
    ("streaming.frame_step", "streaming.device_step", "streaming.graph_buckets"),
    ("streaming.engine",),
    ("streaming.protocol", "streaming.conversation"),
    ("streaming.server", "streaming.client"),
    ("streaming.terminal",),
    (
        "streaming.loading",
        "streaming.most_sessions",
        "streaming.quantize_auto",
        "streaming.at_once",
        "streaming.benchmark",
        "streaming.scoring",
        "streaming.score",
        "streaming",
    ),
    (
        "streaming.entry",
        "streaming.server.command",
        "streaming.server.start",
        "streaming.terminal.command",
        "server",
        "client",
    ),
    ("recipes",),
)
VALUES = LAYERS[0]
# The whole of what these may import of this project, besides themselves.
ALLOWED = {
    "streaming.errors": (),
    "streaming.config": ("streaming.errors",),
    "streaming.audio": ("streaming.errors",),
    "streaming.options": ("streaming.errors", "streaming.command"),
    "streaming.addresses": (),
    "streaming.command": ("streaming.errors",),
    "streaming.compiler": ("streaming.errors",),
    "streaming.files": (),
    "streaming.memory": (),
    "streaming.engine": VALUES,  # it gets the step as a callable
    "streaming.protocol": VALUES,
    "streaming.conversation": (*VALUES, "streaming.protocol", "streaming.engine.events"),
    "streaming.client": (*VALUES, "streaming.protocol"),
    "streaming.terminal": (*VALUES, "streaming.protocol", "streaming.client"),
    "streaming.scoring": (*VALUES, "streaming.loading", "streaming.models"),
    "streaming.entry": ("streaming.command", "streaming.server.command", "streaming.terminal.command"),
    "server": ("streaming.entry",),
    "client": ("streaming.entry",),
}
TORCH = ("torch", "transformers", "safetensors", "tokenizers")
WITHOUT_TORCH = (
    *VALUES,
    "streaming.engine",
    "streaming.protocol",
    "streaming.conversation",
    "streaming.server",
    "streaming.client",
    "streaming.terminal",
    "streaming.entry",
    "client",
    "server",
)
"""The server composes by name: who needs tensors is below it."""
PURE = ("streaming.protocol", "streaming.conversation", "streaming.engine.events")
"""These know no event loop, socket, thread or clock: what they are told, and the time now, go in."""
IMPURE = ("asyncio", "concurrent", "queue", "select", "socket", "ssl", "threading", "time", "websockets")


def modules() -> dict[str, Path]:
    """Every module of the project, by name."""
    rooms = (ROOT / "streaming", ROOT / "recipes")
    files = [*(path for room in rooms for path in sorted(room.rglob("*.py"))), ROOT / "server.py", ROOT / "client.py"]
    found = {}
    for path in files:
        if path.is_file():
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(name: str, source: str, is_package: bool) -> set[str]:
    """What a module imports, by full name: relative imports, those within functions and for type checkers included."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = name.split(".")[: len(name.split(".")) - node.level + is_package]
                base = ".".join([*package, *filter(None, [node.module])])
            # `from package import module` imports the module; of anything else, the place it is taken from
            found |= {full if (full := f"{base}.{alias.name}") in MODULES else base for alias in node.names}
    return found


def within(name: str, place: str) -> bool:
    return name == place or name.startswith(place + ".")


def layer(name: str) -> int:
    """A module's layer; the longest name that fits decides, so that `streaming` is its own file alone."""
    fits = [(len(place), number) for number, places in enumerate(LAYERS) for place in places if within(name, place)]
    return max(fits)[1]


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_down_only(name: str) -> None:
    """Pins a layer that comes to know what is above it, one convenient import at a time."""
    path = MODULES[name]
    imported = imports(name, path.read_text(encoding="utf-8"), path.name == "__init__.py")
    for other in sorted(imported):
        if not within(other, "streaming") and other not in MODULES:
            assert not within(other, "ray") and not within(other, "deploy"), f"{name} imports {other}, which runs it"
            if any(within(name, place) for place in WITHOUT_TORCH):
                assert not any(within(other, library) for library in TORCH), f"{name} imports {other}"
            if any(within(name, place) for place in PURE):
                assert not any(within(other, library) for library in IMPURE), f"{name} imports {other}"
            continue
        assert other in MODULES, f"{name} imports {other}, which is not there"
        assert layer(other) <= layer(name), f"{name} imports {other}, a layer above it"
        for place, allowed in ALLOWED.items():
            if within(name, place):
                assert any(within(other, fine) for fine in (place, *allowed)), f"{name} imports {other}"


def test_every_module_has_its_layer() -> None:
    """Pins a new module that no rule speaks of."""
    listed = {place for places in LAYERS for place in places} - {"streaming"}
    strays = [name for name in MODULES if name != "streaming" and not any(within(name, place) for place in listed)]
    assert not strays
    assert len(MODULES) > 30


@pytest.mark.parametrize(
    ("source", "is_package", "wanted"),
    [
        ("import streaming.models.llama as x, torch.nn", False, {"streaming.models.llama", "torch.nn"}),
        ("from streaming.models import llama", False, {"streaming.models.llama"}),
        ("from streaming.models.llama import LlamaDecoder", False, {"streaming.models.llama"}),
        ("from . import events", False, {"streaming.engine.events"}),
        ("from .. import audio", False, {"streaming.audio"}),
        ("from ..models.llama import LlamaDecoder", False, {"streaming.models.llama"}),
        ("from .events import Event", True, {"streaming.engine.events"}),
        ("def f():\n    from streaming import loading", False, {"streaming.loading"}),
        ("if TYPE_CHECKING:\n    import torch", False, {"torch"}),
    ],
)
def test_no_import_is_overlooked(source: str, is_package: bool, wanted: set[str]) -> None:
    """Pins a check that is green because it does not see relative, late or type-checking imports."""
    name = "streaming.engine" if is_package else "streaming.engine.engine"
    assert imports(name, source, is_package) == wanted


@pytest.mark.parametrize(
    "name",
    [
        "streaming",
        "streaming.audio",
        "streaming.errors",
        "streaming.engine.session",
        "streaming.protocol.messages",
        "streaming.client.client",
        "streaming.terminal.start",
        "client",
    ],
)
def test_no_torch_is_loaded_by(name: str) -> None:
    """Pins a laptop client that needs two gigabytes of torch, and starts seconds late where it has it."""
    if name not in MODULES:
        pytest.skip(f"there is no {name} yet")
    program = f"import sys, {name}; print(*sorted({{m.split('.')[0] for m in sys.modules}} & {set(TORCH)!r}))"
    ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.split() == []
