"""The documentation's own examples, commands, tables and links, run and compared."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from streaming.server import command as server
from streaming.terminal import command as client

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}
README = TEXTS["README.md"]
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
PARSERS: dict[str, Callable[[list[str]], object]] = {
    "server.py": lambda arguments: server.parse(arguments, {}),
    "client.py": client.parse,
}
COMMANDS = [
    (page, line)
    for page, text in TEXTS.items()
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    for line in block.splitlines()
    if re.search(r"\bpython (server|client)\.py", line)
]


@pytest.mark.parametrize("example", EXAMPLES, ids=[f"example {n + 1}" for n in range(len(EXAMPLES))])
def test_the_readmes_python_runs_as_it_stands(example: str) -> None:
    """Documentation that nobody runs goes wrong."""
    done = subprocess.run(
        [sys.executable, "-c", example], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("program", PARSERS)
def test_the_tables_name_every_flag(program: str) -> None:
    """A flag that no table names does not exist for its users."""
    done = subprocess.run(
        [sys.executable, program, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    table = TEXTS["docs/flags.md"].partition(f"\n`python {program}`\n\n")[2].partition("\n\n")[0]
    flags = set(re.findall(r"^  (?:-h, )?(--[a-z][a-z-]*)", done.stdout, re.MULTILINE)) - {"--help"}
    assert flags
    assert flags == set(re.findall(r"--[a-z][a-z-]*", table))


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=[line for _, line in COMMANDS])
def test_a_command_of_the_documentation_is_one_that_its_program_takes(page: str, line: str) -> None:
    """A flag that was renamed lives on in the documentation."""
    words = shlex.split(line, comments=True)
    program = next(word for word in words if word in PARSERS)
    PARSERS[program](words[words.index(program) + 1 :])  # ends the process where it does not


def test_the_config_file_of_the_documentation_is_one_that_the_server_takes(tmp_path: Path) -> None:
    (example,) = re.findall(r"```toml\n(.*?)```", TEXTS["docs/operations.md"], re.DOTALL)
    path = tmp_path / "server.toml"
    path.write_text(example)
    found = server.parse([f"--config={path}"], {})
    assert {key: getattr(found, key.replace("-", "_")) for key in tomllib.loads(example)} == tomllib.loads(example)


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_somewhere(page: str) -> None:
    """A link leads to a file of this repository, and to a heading of it."""
    for target in re.findall(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)", TEXTS[page]):
        if "://" in target:
            continue
        name, _, heading = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), target
        if heading:
            headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in headings}, target


def test_ci_finds_its_blocks() -> None:
    for name in re.findall(r'"(ci: [a-z ]+)"', (ROOT / ".ci" / "run").read_text(encoding="utf-8")):
        assert f"<!-- {name} -->\n```bash\n" in README
