"""Where options come from, and what is said of those that are wrong."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

import pytest

from streaming.command import VERSION
from streaming.options import OptionParser
from streaming.server import command as server

ROOT = Path(__file__).parents[1]


def parsed(flags: str = "", environment: dict[str, str] | None = None, file: str | None = None) -> argparse.Namespace:
    """As `server.py` would, with this config file. Raises `SystemExit`."""
    return server.parse(flags.split() + ([] if file is None else [f"--config={file}"]), environment or {})


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return tmp_path / "server.toml"


def test_a_flag_comes_before_a_variable_before_the_file_before_the_default(config: Path) -> None:
    config.write_text("port = 1\nqueue = 1\nmax-sessions = 1\n")
    found = parsed("--port 3", {"STREAMING_PORT": "2", "STREAMING_QUEUE": "2"}, str(config))
    assert (found.port, found.queue, found.max_sessions, found.idle_seconds) == (3, 2, 1, 300)


def test_a_flag_that_says_the_default_still_comes_first(config: Path) -> None:
    """A flag that said the default was taken for one that was not given."""
    config.write_text('port = 1\nmodel = "other"\n')
    found = parsed("--port 8765 --model demo", {"STREAMING_PORT": "2"}, str(config))
    assert (found.port, found.model) == (8765, "demo")


def test_every_flag_has_a_variable_and_a_key(config: Path) -> None:
    """All flags are given in both ways, with a value of each kind."""
    values = {"--until-eof": "true", "--insecure-plaintext": "yes", "--allow-origin": "https://a.b, https://c.d"}
    values |= {
        "--allow-save": "true",
        "--dtype": "float32",
        "--quantize": "none",
        "--codec-dtype": "bfloat16",
        "--log-format": "json",
        "--log-level": "debug",
    }
    flags = set(re.findall(r"^  (--[a-z][a-z-]*)", _help(), re.MULTILINE)) - {"--version", "--config"}
    assert len(flags) > 20
    for flag in flags:
        dest, text = flag[2:].replace("-", "_"), values.get(flag, "7")
        variable = f"STREAMING_{dest.upper()}"
        if flag in ("--tokens", "--session-key"):  # by the flag's own name goes what is in the file
            variable += "_FILE"
        by_variable = vars(parsed(environment={variable: text}))
        toml = {"true": "true", "yes": "true", "7": '"7"'}.get(text, repr(text.split(", ") if "," in text else text))
        config.write_text(f"{flag[2:]} = {toml}\n")
        by_file = vars(parsed(file=str(config)))
        assert by_variable[dest] == by_file[dest] != None, flag  # noqa: E711
        by_file.pop("config")
        by_variable.pop("config")
        assert by_variable == by_file, flag
    assert parsed(environment={"STREAMING_ALLOW_ORIGIN": values["--allow-origin"]}).allow_origin == [
        "https://a.b",
        "https://c.d",
    ]


def _help() -> str:
    done = subprocess.run([sys.executable, "server.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout


def test_a_switch_can_be_turned_off_nearer_than_it_was_turned_on(config: Path) -> None:
    config.write_text("insecure-plaintext = true\n")
    assert parsed(file=str(config)).insecure_plaintext is True
    assert parsed(environment={"STREAMING_INSECURE_PLAINTEXT": "false"}, file=str(config)).insecure_plaintext is False
    assert parsed(environment={"STREAMING_INSECURE_PLAINTEXT": ""}, file=str(config)).insecure_plaintext is True


def test_a_list_is_replaced_not_added_to(config: Path) -> None:
    """A nearer source could only ever let more pages in."""
    config.write_text('allow-origin = ["https://a.b"]\n')
    assert parsed(file=str(config)).allow_origin == ["https://a.b"]
    assert parsed("--allow-origin https://c.d", file=str(config)).allow_origin == ["https://c.d"]


def test_the_file_can_be_named_by_a_variable(config: Path) -> None:
    config.write_text("port = 1\n")
    assert parsed(environment={"STREAMING_CONFIG": str(config)}).port == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("max_sessions = 8", "no option 'max_sessions'; did you mean 'max-sessions'?"),
        ("prot = 8", "no option 'prot'; did you mean 'port'?"),
        ("zzzz = 8", "no option 'zzzz'"),
        ('config = "other.toml"', "no option 'config'"),
        ('port = "many"', "port: argument --port: invalid int value: 'many'"),
        ("port = 1.5", "invalid int value: '1.5'"),
        ("port = true", "must be a number or a string, not True"),
        ("port = 70000", "must be from 0 to 65535"),
        ("port = [1]", "must be a number or a string"),
        ('dtype = "float64"', "invalid choice: 'float64'"),
        ("until-eof = 3", "must be true or false"),
        ("allow-origin = [3]", "must be a list of strings"),
        ("[server]\nport = 1", "no option 'server'"),
        ("port = ", "is no TOML file"),
        ("port = 1\nport = 2", "is no TOML file"),
    ],
)
def test_what_is_wrong_in_the_file_is_said_with_its_place(
    text: str, said: str, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A key that nobody reads is a limit that does not hold."""
    config.write_text(text)
    with pytest.raises(SystemExit) as ended:
        parsed(file=str(config))
    assert ended.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert said in error
    assert "port is 70000" in error or config.name in error


def test_what_is_wrong_in_the_environment_names_the_variable(capsys: pytest.CaptureFixture[str]) -> None:
    """Kubernetes puts STREAMING_PORT=tcp://10.0.0.1:80 there for a service named streaming."""
    with pytest.raises(SystemExit):
        parsed(environment={"STREAMING_PORT": "tcp://10.0.0.1:80"})
    assert "the environment variable STREAMING_PORT: argument --port: invalid int" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("STREAMING_MAX_SESIONS", "no option for STREAMING_MAX_SESIONS: did you mean STREAMING_MAX_SESSIONS?"),
        ("STREAMING_TOKEN_FILE", "did you mean STREAMING_TOKENS_FILE?"),
        ("STREAMING_TLS_KEYS", "did you mean STREAMING_TLS_KEY?"),
        ("STREAMING_", "no option for STREAMING_"),
        ("STREAMING_QQ", "no option for STREAMING_QQ"),
    ],
)
def test_a_variable_that_nobody_reads_is_refused_with_the_nearest_name(
    name: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A mistyped limit passed in silence, and did not hold."""
    with pytest.raises(SystemExit) as ended:
        parsed(environment={name: "7"})
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_other_variables_of_ours_and_those_that_kubernetes_sets_are_let_pass() -> None:
    """A service named streaming-metrics beside a pod would have kept its server from starting."""
    ours = dict.fromkeys(("STREAMING_TOKEN", "STREAMING_TOKENS", "STREAMING_METRICS_TOKEN"), "ann:secret-of-16-letters")
    ours |= {"STREAMING_NATIVE": "0", "STREAMING_LONG_SESSION_MINUTES": "1", "STREAMING_DEMO_ROOT": "/x"}
    address = "tcp://10.0.0.1:80"
    links = {"SERVICE_HOST": "10.0.0.1", "SERVICE_PORT": "80", "SERVICE_PORT_HTTP": "80", "PORT": address}
    links |= {
        "PORT_80_TCP": address,
        "PORT_80_TCP_PROTO": "tcp",
        "PORT_80_TCP_PORT": "80",
        "PORT_80_TCP_ADDR": "10.0.0.1",
    }
    services = {f"STREAMING_METRICS_{name}": value for name, value in links.items()}
    assert vars(parsed(environment=ours | services)) == vars(parsed())


def test_the_switch_of_native_operations_is_0_or_1(capsys: pytest.CaptureFixture[str]) -> None:
    """`STREAMING_NATIVE=false` left them on."""
    with pytest.raises(SystemExit):
        parsed(environment={"STREAMING_NATIVE": "false"})
    assert "STREAMING_NATIVE must be 0 or 1" in capsys.readouterr().err


@pytest.mark.parametrize("program", ["server.py", "client.py"])
def test_the_version_is_said(program: str) -> None:
    done = subprocess.run([sys.executable, program, "--version"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == f"streaming-continuation {VERSION}\n"


@pytest.mark.parametrize("program", ["server.py", "client.py"])
def test_every_flag_is_told_in_a_sentence_in_a_group(program: str) -> None:
    """The help was 27 flags in one heap, in fragments of sentences that went on with the flag's name."""
    done = subprocess.run([sys.executable, program, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    groups = done.stdout.split("\n\n")[2:-1]
    assert len(groups) > 4
    for group in groups:
        title, *lines = group.splitlines()
        assert re.fullmatch(r"[A-Z].*:", title)
        told = re.split(r"^  (?=\S)", "\n".join(lines), flags=re.MULTILINE)[1:]
        assert len(told) <= 10
        for flag in told:
            words = " ".join(re.split(r"\s{2,}", flag.strip(), maxsplit=1)[1].split())
            assert re.fullmatch(r"[A-Z].*\.", words), flag


def test_help_needs_nothing_that_takes_time() -> None:
    """Help took seconds, most of them for imports that it needs nothing of."""
    for program in ("server", "client"):
        code = f"import sys\nfrom streaming.entry import {program}\ntry:\n    {program}()\nfinally:\n    "
        code += "print({'torch', 'numpy', 'rich', 'websockets', 'asyncio'} & set(sys.modules))"
        done = subprocess.run(
            [sys.executable, "-c", code, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert done.stdout.startswith("usage: ")
        assert done.stdout.endswith("\nset()\n")


def test_a_file_that_is_not_there_or_no_text_is_said_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for path, said in ((tmp_path / "none", "No such file"), (tmp_path, "directory"), (tmp_path / "binary", "no TOML")):
        with pytest.raises(SystemExit):
            parsed(file=str(path))
        assert said in capsys.readouterr().err


def test_a_value_that_looks_like_a_flag_is_a_value() -> None:
    """`--help` in a variable printed the help and ended the server with status 0."""
    assert parsed(environment={"STREAMING_MODEL": "--help"}).model == "--help"


def test_no_flag_holds_a_token() -> None:
    """STREAMING_TOKENS holds the tokens, and must not be taken for the name of their file."""
    assert parsed(environment={"STREAMING_TOKENS": "ann:secret-of-16-letters"}).tokens is None
    parser = OptionParser("x", None)
    action = parser.add_argument("--some-flag")
    assert parser.variable(action) == "STREAMING_SOME_FLAG"
