"""What people do wrong at the command line: one sentence, the right exit status, no traceback, and nothing lost."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from ctypes.util import find_library
from pathlib import Path
from typing import IO

import pytest

from streaming import scoring
from streaming.benchmark import __main__ as benchmark
from streaming.command import OutputError, check_result, write_result
from streaming.server.door.tls import TlsError, load_tls
from streaming.terminal import command as client
from tests.deploy.stub_server import STUBBED
from tests.server.certificate import self_signed

ROOT = Path(__file__).parents[1]
SPEECH = str(ROOT / "examples" / "prompt.wav")
LONG = "a" * 300
FULL = Path("/dev/full")
WITHOUT_WEIGHTS = " ".join(f"{name}={shlex.quote(value)}" for name, value in STUBBED.items())
"""What a shell puts before a `server.py` that starts in a second."""
RESULTS = "docs/results/cpu-2-cores-amd-epyc.json"
needs_full = pytest.mark.skipif(not FULL.exists(), reason="no /dev/full")
needs_portaudio = pytest.mark.skipif(find_library("portaudio") is None, reason="no PortAudio to ask for devices")
ServerSays = Callable[..., tuple[int | str | None, str]]
FLEET = ("fleet", "--replicas", "2", "--minutes", "0.05", "--load", "0.5", "--policies", "random")


def command(
    *arguments: str, stdout: int | IO[bytes] = subprocess.PIPE, stdin: int | None = subprocess.DEVNULL, within: str = ""
) -> subprocess.CompletedProcess[bytes]:
    """Run a command of the repository. within: a line for a shell, in which `{}` is the command."""
    line: Sequence[str] = (sys.executable, *arguments)
    if within:
        line = ("sh", "-c", within.format(" ".join(line)))
    ours = ("STREAMING_", "PYTHONUNBUFFERED")  # what waits in a buffer fails once more at the end
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return subprocess.run(
        line,
        cwd=ROOT,
        env=environment,
        stdin=stdin,
        stdout=stdout,
        stderr=subprocess.PIPE,
        timeout=120,
        check=False,
    )


def sentence(done: subprocess.CompletedProcess[bytes]) -> str:
    """The last line that a command said."""
    said = done.stderr.decode()
    assert "Traceback" not in said, said
    return said.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("flags", "status", "said"),
    [
        (["--threads", "100000"], 2, "--threads is 100000, must be from 1 to "),
        (["--threads", "-1"], 2, "--threads is -1, must be from 1 to "),
        (["--max-sessions", "0"], 2, "0 must be at least 1, or auto"),
        (["--max-sessions", "many"], 2, "many must be at least 1, or auto"),
        (["--context-tokens", "0"], 2, "--context-tokens is 0, must be at least 1"),
        (["--context-tokens", "9" * 30], 2, "must be at least 1 and below 2**40"),
        (["--port", "65536"], 2, "must be from 0 to 65535"),
        (["--queue", "-1"], 2, "--queue"),
        (["--idle-seconds", "nan"], 2, "--idle-seconds must be above 0"),
        (["--drain-seconds", "nan"], 2, "--drain-seconds"),
        (["--sessions-per-token", "0"], 2, "must be at least 1"),
        (["--max-session", "4"], 2, "unrecognized arguments: --max-session"),
        (["--config", SPEECH], 2, "is no TOML file"),
        (["--host", "999.1.1.1"], 1, "--host 999.1.1.1 has no address"),
        (["--host", "localhost:8765"], 1, "the port goes into --port"),
        (["--host", ""], 2, "--host is empty"),
        (["--model", ""], 2, "--model is empty"),
        (["--codec", " "], 2, "--codec is empty"),
        (["--config", ""], 2, "--config is empty"),
        (["--tls-cert", "", "--tls-key", ""], 2, "--tls-cert is empty"),
        (["model.safetensors"], 2, "unrecognized arguments: model.safetensors"),
        (["--host", "192.0.2.1"], 1, "can be reached from other machines"),
        (["--tokens", "/nowhere"], 1, "/nowhere"),
        (["--tokens", "/"], 1, "not a regular file"),
        (["--tokens", SPEECH], 1, "prompt.wav"),
        (["--allow-origin", "talk"], 1, "talk"),
        (["--trusted-proxy", "proxy"], 1, "proxy"),
        (["--tls-cert", SPEECH], 1, "--tls-cert and --tls-key go together"),
        (["--tls-cert", "/nowhere", "--tls-key", SPEECH], 1, "cannot read --tls-cert /nowhere: No such file"),
        (["--tls-cert", SPEECH, "--tls-key", SPEECH], 1, "holds no certificate in PEM form"),
    ],
)
def test_a_server_says_what_is_wrong_before_it_loads_anything(
    flags: list[str], status: int, said: str, server_says: ServerSays, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streaming.loading.load_engine", lambda *_, **__: pytest.fail("loaded"))
    found, told = server_says(*flags)
    assert found == status
    assert said in told.splitlines()[-1]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--model", LONG], "cannot be a folder (File name too long). Give a folder with --model DIR"),
        (["--model", "~nobody-of-this-name/x"], "cannot be a folder (Could not determine home directory"),
        (["--model", "a model with spaces"], "is neither a folder nor a hub id"),
        (["--model", "random:9b"], "random weights come in the sizes 1.3b, 8b"),
        (["--codec", "/"], "is not a checkpoint: it has no config.json"),
        (["--device", "tpu"], "'tpu' is not a device"),
        (["--device", "meta"], "is not supported: use auto, cpu, cuda or cuda:N"),
    ],
)
def test_a_model_that_cannot_be_had_is_one_sentence(flags: list[str], said: str, server_says: ServerSays) -> None:
    """A name of 300 characters ended in a traceback of the file system's error."""
    status, told = server_says(*flags)
    line = told.splitlines()[-1]
    assert status == 1
    assert said in line
    assert len(line) < 400


def test_a_server_that_is_to_end_with_an_input_that_is_closed_does_not_start() -> None:
    """A thread of its own failed with a traceback, and the server stayed for ever."""
    done = command("server.py", "--port", "0", "--until-eof", within="{} <&-", stdin=None)
    assert done.returncode == 2
    assert "standard input, which is closed already" in sentence(done)


@needs_full
def test_a_server_that_cannot_say_where_it_listens_ends() -> None:
    """Whoever started the server waits for that line. The end was a traceback, and another one at the interpreter's
    end.
    """
    with FULL.open("wb") as full:
        done = command("server.py", "--port", "0", within=f"{WITHOUT_WEIGHTS} {{}}", stdout=full)
    assert done.returncode == 1
    assert sentence(done) == "server.py: cannot write to standard output: No space left on device"


@needs_full
def test_a_server_whose_log_cannot_be_written_serves() -> None:
    done = command("server.py", "--port", "0", "--until-eof", within=f"{WITHOUT_WEIGHTS} {{}} 2>/dev/full")
    assert done.returncode == 0
    assert done.stdout.startswith(b"listening on ws://127.0.0.1:")


@pytest.mark.skipif(sys.platform != "linux", reason="POSIX signals, and /proc")
@pytest.mark.parametrize("script", ["server.py", "client.py"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_first_seconds_is_no_traceback(script: str, number: signal.Signals) -> None:
    """A signal may come at any point of the imports: Ctrl-C showed a traceback of numpy's, and process 1 of a container
    did not hear SIGTERM.
    """
    for late_s in (0.0, 0.3):
        process = subprocess.Popen(
            [sys.executable, script, "--input" if script == "client.py" else "--port", "0"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            while process.poll() is None:
                mask = int(Path(f"/proc/{process.pid}/status").read_text().partition("SigCgt:")[2].split()[0], 16)
                if mask >> (signal.SIGTERM - 1) & 1:
                    break
                time.sleep(0.01)
            time.sleep(late_s)
            process.send_signal(number)
            _, said = process.communicate(timeout=60)
        finally:
            process.kill()
            process.wait()
        assert "Traceback" not in said
        # As a shell tells it: asyncio gives a signal back to the system when its loop ends, moments before the process.
        status = 128 - process.returncode if process.returncode < 0 else process.returncode
        assert status in (128 + number, 1), "1: the client has found that there is no file 0"


# Certificates


def test_a_certificate_or_key_that_cannot_be_used_is_named_with_the_reason(tmp_path: Path) -> None:
    """The server said `[SSL] PEM lib (_ssl.c:4065)`, of both files."""
    certificate, key = self_signed(tmp_path)
    (tmp_path / "other").mkdir()
    _, other = self_signed(tmp_path / "other")
    junk, encrypted, damaged, bad_chain = (tmp_path / name for name in ("junk", "encrypted", "damaged", "chain"))
    junk.write_bytes(bytes(range(256)))
    subprocess.run(["openssl", "pkey", "-in", key, "-aes256", "-passout", "pass:secret", "-out", encrypted], check=True)
    lines = key.read_text().splitlines()
    damaged.write_text("\n".join([lines[0], "AAAA", *lines[2:]]))
    lines = certificate.read_text().splitlines()
    bad_chain.write_text("\n".join([lines[0], "AAAA", *lines[2:]]))
    for files, said in (
        ((certificate, junk), f"--tls-key {junk} holds no private key in PEM form"),
        ((junk, key), f"--tls-cert {junk} holds no certificate in PEM form"),
        ((key, certificate), f"--tls-cert {key} holds no certificate in PEM form"),
        ((certificate, encrypted), f"--tls-key {encrypted} is encrypted: decrypt it first"),
        ((certificate, damaged), f"--tls-key {damaged} is damaged"),
        ((bad_chain, key), f"--tls-cert {bad_chain} is damaged"),
        ((certificate, other), f"--tls-key {other} is not the key of the first certificate in --tls-cert"),
        ((certificate, tmp_path), f"cannot read --tls-key {tmp_path}: Is a directory"),
    ):
        with pytest.raises(TlsError) as error:
            load_tls(*map(str, files))
        assert str(error.value).startswith(said)
    assert load_tls(str(certificate), str(key)) is not None


# Clients


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--input", "/nowhere.wav"], "/nowhere.wav"),
        (["--input", str(ROOT / "server.py")], "server.py"),
        (["--input", "/"], "not a file"),
        (["--input", SPEECH, "--output", "/nowhere/x.wav"], "/nowhere"),
        (["--input", SPEECH, "--record", "/nowhere/x.wav"], "/nowhere"),
        (["--input", SPEECH, "--output", "/"], "/"),
        (["--input", SPEECH, "--url", "ws://127.0.0.1:1"], "127.0.0.1:1"),
        (["--input", SPEECH, "--url", "ws://127.0.0.1:99999"], "not a server's address (Port out of range"),
        (["--input", SPEECH, "--url", "ws://[::1"], "not a server's address"),
        (["--input", SPEECH, "--url", "ftp://127.0.0.1"], "ftp://127.0.0.1"),
    ],
)
def test_a_client_says_what_is_wrong(flags: list[str], said: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert client.main(flags) == 1
    error = capfd.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert error[0].startswith("client.py: ") and said in error[0]


@needs_full
@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(["--list-devices"], marks=needs_portaudio),
        pytest.param(["--list-devices", "--json"], marks=needs_portaudio),
        ["--input", SPEECH],
    ],
)
def test_a_client_whose_output_cannot_be_written_says_so(flags: list[str]) -> None:
    with FULL.open("wb") as full:
        done = command("client.py", *flags, stdout=full)
    assert done.returncode == 1
    assert sentence(done) == "client.py: cannot write to standard output: No space left on device"


# Measurements


@pytest.mark.parametrize("name", [name for name in benchmark.COMMANDS if name != "wire" or sys.platform == "linux"])
def test_a_flag_of_a_measurement_is_told_in_a_sentence(name: str) -> None:
    """The helps were the ends of sentences ("of each", "at once") that began with the flag's own name."""
    parser = argparse.ArgumentParser(add_help=False)
    importlib.import_module(f"streaming.benchmark.{name}").add_arguments(parser)
    for action in parser._actions:
        assert re.fullmatch(r"[A-Z].*\.", action.help or ""), action.option_strings


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["step", "--slots", "0"], "argument --slots: 0 is not at least 1"),
        (["step", "--slots", "1", "-1"], "-1"),
        (["step", "--seconds", "0"], "argument --seconds: 0 is not above 0"),
        (["step", "--seconds", "nan"], "argument --seconds: nan is not above 0"),
        (["step", "--context-tokens", "-5"], "argument --context-tokens: -5 is not at least 1"),
        (["baseline", "--tokens", "0"], "argument --tokens: 0 is not at least 1"),
        (["baseline", "--seconds", "-1"], "argument --seconds: -1 is not above 0"),
        (["slide", "--samples", "0"], "argument --samples: 0 is not at least 1"),
        (["slide", "--context-tokens", "0"], "argument --context-tokens: 0 is not at least 1"),
        (["turns", "--samples", "0"], "argument --samples: 0 is not at least 1"),
        (["results", "--timeout", "0"], "argument --timeout: 0 is not above 0"),
        (["fleet", "--event-share", "5"], "--event-share is 5: of the servers, at most all (1) can be hit"),
        (["fleet", "--load", "1e9"], "at most 100,000 --replicas and a --load of 100 can be simulated"),
        (["fleet", "--replicas", "100000000"], "at most 100,000 --replicas"),
        (["fleet", "--load", "0"], "argument --load: 0 is not above 0"),
        (["latency", "--sessions", "0"], "argument --sessions: 0 is not at least 1"),
        (["nonsense"], "invalid choice: 'nonsense'"),
        ([], "the following arguments are required: NAME"),
    ],
)
def test_sizes_that_make_no_sense_are_wrong_flags(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """`step --slots 0` ended in a traceback of an empty maximum."""
    with pytest.raises(SystemExit) as ended:
        benchmark.main(arguments)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["fleet", "--steps", "/nowhere.json"],
            "/nowhere.json is neither a file of `step --json`",
        ),
        (["fleet", "--steps", "/nowhere.json:step"], "cannot read /nowhere.json: No such file or directory"),
        (["fleet", "--spread", "/nowhere.json"], "cannot read /nowhere.json: No such file or directory"),
        (["fleet", "--spread", "/"], "cannot read /: Is a directory"),
        (["fleet", "--steps", str(ROOT / "server.py")], "has no step times as `step --json` writes them"),
        (
            ["fleet", "--steps", "docs/results/cpu-2-cores-amd-epyc.json:step 70b"],
            "has no run step 70b: it has step demo",
        ),
        (["fleet", "--slots", "9999999"], "knows steps of"),
        (["fleet", "--plot", "/nowhere/x.png"], "there is no directory /nowhere"),
        (["fleet", "--plot", "x.gif"], "a name that ends in .png"),
        (["step", "--slots", "1", "--context-tokens", "3", "--seconds", "0.01"], "14 is the least that works"),
        (["step", "--slots", "1000000", "--seconds", "0.01"], "1,000,000 sessions with 1,024 tokens of context need"),
        (["step", "--random", "mimi", "--slots", "1000000", "--seconds", "0.01"], "1,000,000 sessions"),
        (["step", "--model", "/nowhere"], "/nowhere is not a folder"),
        (["step", "--slots", "1", "--input", "/nowhere.wav"], "/nowhere.wav: no such file"),
        (["slide", "--context-tokens", "3"], "14 is the least that works"),
        (["turns", "--input", "/nowhere.wav"], "/nowhere.wav"),
        (["results", "--only", "nonsense"], "no run is named so; there are step demo"),
        (["results", "--folder", "/dev/null/x", "--only", "step demo"], "--folder /dev/null/x cannot be made"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert benchmark.main(arguments) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("benchmark: ") and said in error


def test_results_are_not_measured_for_a_file_that_is_damaged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The damage was found after the first run, which takes an hour."""
    from streaming.benchmark import results

    monkeypatch.setattr(results, "_slug", lambda _: "machine")
    for text, said in (("{", "is damaged"), ("[]", "is no file of results"), ('{"runs": 3}', "is no file of results")):
        (tmp_path / "machine.json").write_text(text)
        assert benchmark.main(["results", "--folder", str(tmp_path), "--only", "step demo"]) == 1
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(("name", "said"), [("none/x.json", "there is no folder"), (".", "is a folder")])
def test_a_place_for_results_is_looked_at_before_the_measurement(
    tmp_path: Path, name: str, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A place that cannot be written to was found out after hours, and the measurement was lost in a traceback."""
    monkeypatch.setattr("streaming.benchmark.fleet.measure", lambda _: pytest.fail("measured"))
    monkeypatch.setattr("streaming.scoring.score", lambda *_, **__: pytest.fail("scored"))
    flags = ["--json", str(tmp_path / name)]
    assert benchmark.main([*FLEET, *flags]) == 1
    assert scoring.main([SPEECH, *flags]) == 1
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 2 and all(said in line for line in error)


@needs_full
def test_a_measurement_whose_file_cannot_be_written_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main([*FLEET, "--json", "/dev/full"]) == 1
    out, error = capsys.readouterr()
    assert json.loads(out[out.index("\n{") :])["rows"]
    assert "cannot write --json /dev/full: No space left on device; the results are on standard output" in error


@needs_full
def test_a_measurement_that_cannot_be_printed_is_in_its_file(tmp_path: Path) -> None:
    with FULL.open("wb") as full:
        done = command("-m", "streaming.benchmark", *FLEET, "--json", str(tmp_path / "x.json"), stdout=full)
    assert done.returncode == 1
    assert sentence(done) == "benchmark: cannot write to standard output: No space left on device"
    assert json.loads((tmp_path / "x.json").read_text())["rows"]


def test_a_file_for_results_that_may_not_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    check_result("--json", None)
    check_result("--json", path)
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write to everything
    with pytest.raises(OutputError, match="cannot be written to; choose another place"):
        check_result("--json", path)


def test_results_are_written_as_they_are(tmp_path: Path) -> None:
    write_result("--json", tmp_path / "x.json", '{"ü": 1}\n')
    assert (tmp_path / "x.json").read_text(encoding="utf-8") == '{"ü": 1}\n'


# Scores


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give recordings, or --pairs CSV"),
        ([SPEECH, "--pairs", "x.csv"], "give recordings, or --pairs CSV"),
        ([SPEECH, "--batch", "0"], "argument --batch: 0 is not at least 1"),
        ([SPEECH, "--max-seconds", "nan"], "argument --max-seconds: nan is not above 0"),
        ([SPEECH, "--max-seconds", "0"], "argument --max-seconds: 0 is not above 0"),
    ],
)
def test_wrong_flags_of_a_score_are_said_so(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--batch 0` ended in a traceback of `range`."""
    with pytest.raises(SystemExit) as ended:
        scoring.main(arguments)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["/nowhere.wav"], "/nowhere.wav"),
        ([str(ROOT / "server.py")], "server.py"),
        (["--pairs", "/nowhere.csv"], "cannot read /nowhere.csv"),
        (["--pairs", str(ROOT / "server.py")], "is not a list of pairs"),
        (["--pairs", SPEECH], "cannot read"),
        ([SPEECH, "--model", "/nowhere"], "/nowhere is not a folder"),
        ([SPEECH, "--device", "tpu"], "'tpu' is not a device"),
    ],
)
def test_what_cannot_be_scored_is_one_sentence(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert scoring.main(arguments) == 1
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert error[0].startswith("score: ") and said in error[0]
