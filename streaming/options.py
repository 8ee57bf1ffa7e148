"""Options from the command line, the environment and a file: one table of flags, and the nearest source wins.

A flag `--max-sessions` is the variable `STREAMING_MAX_SESSIONS` and, in the TOML file that `--config` names, the key
`max-sessions`. Secrets are none of them: what a process' flags or a file for all to read may hold is not secret.
"""

from __future__ import annotations

import argparse
import difflib
import math
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

from streaming.command import VERSION

PREFIX = "STREAMING_"
USAGE = "%(prog)s [flags]"
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")
_SERVICE_LINK = re.compile(
    r"\w+_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_\w+)?)=.*|\w+_PORT=\w+://.*"
)
"""Variables that Kubernetes sets in every pod beside a service whose name begins with ours."""
_HOW = (
    "Each flag can also be a key of the TOML file that --config names (max-sessions = 8), or an environment variable "
    f"({PREFIX}MAX_SESSIONS=8; lists with commas). A flag comes before a variable, and a variable before the file."
)


class Version(argparse.Action):
    """`--version`: says what this is, and ends the process with status 0."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        print(f"streaming-continuation {VERSION}")
        parser.exit()


def add_about(parser: argparse.ArgumentParser) -> None:
    """Add `--help` and `--version`."""
    group = parser.add_argument_group("About")
    group.add_argument("-h", "--help", action="help", help="Show this, and end.")
    group.add_argument("--version", action=Version, nargs=0, help="Say which version this is, and end.")


def refuse_empty(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End the process where a value is empty. An empty name is a variable of a shell that was not set; as a path it is
    this folder.
    """
    for action in _sources(parser):
        value = getattr(options, action.dest)
        if isinstance(value, str) and not value.strip():
            parser.error(f"{_name(action)} is empty")


def number(kind: Callable[[str], float], low: float, high: float, *, above: bool = False) -> Callable[[str], float]:
    """Return an argparse type: a finite number from `low` (or above it) to `high`."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"not a number: {text!r}") from None
        if not math.isfinite(value) or value > high or value < low or (above and value == low):
            raise argparse.ArgumentTypeError(
                f"{text} is not {'above' if above else 'at least'} {low} and at most {high}"
            )
        return value

    return parse


class OptionParser(argparse.ArgumentParser):
    """An argument parser whose flags have two more sources.

    variables: the names of those that are not `STREAMING_` and the flag's own. others: variables of that prefix that
    belong to no flag. A flag's default must be what its argument would be parsed to.
    """

    def __init__(
        self,
        prog: str,
        description: str | None,
        variables: Mapping[str, str] | None = None,
        others: Sequence[str] = (),
    ) -> None:
        super().__init__(
            prog=prog, usage=USAGE, description=description, epilog=_HOW, allow_abbrev=False, add_help=False
        )
        self._variables, self._others = variables or {}, others
        self._source = ""

    def parse(self, arguments: Sequence[str] | None, environment: Mapping[str, str]) -> argparse.Namespace:
        """Return the options. Ends the process with a message that names the source where something is wrong."""
        given = self.parse_args(arguments, self._nothing())
        actions = _sources(self)
        self._check_names(environment, [*map(self.variable, actions), *self._others])
        refuse_empty(self, given)
        for action in actions:
            variable = self.variable(action)
            if getattr(given, action.dest) is None and environment.get(variable):
                self._set(given, action, environment[variable].strip(), f"the environment variable {variable}")
        if given.config is not None:
            self._take_file(given, actions, Path(given.config))
        for action in actions:
            if getattr(given, action.dest) is None:
                setattr(given, action.dest, action.default)
        refuse_empty(self, given)
        return given

    def variable(self, action: argparse.Action) -> str:
        """Return the environment variable of a flag."""
        name = _key(action)
        return self._variables.get(name, PREFIX + name.upper().replace("-", "_"))

    def error(self, message: str) -> NoReturn:
        super().error(f"{self._source}: {message}" if self._source else message)

    def _check_names(self, environment: Mapping[str, str], known: Sequence[str]) -> None:
        """End the process for a variable that nobody reads: it may be a limit that does not hold. Kubernetes' own are
        let pass.
        """
        for name, value in environment.items():
            if name.startswith(PREFIX) and name not in known and not _SERVICE_LINK.fullmatch(f"{name}={value}"):
                near = difflib.get_close_matches(name, known, 1, 0.5)
                self.error(f"there is no option for {name}" + (f": did you mean {near[0]}?" if near else ""))

    def _nothing(self) -> argparse.Namespace:
        """Return options without defaults, to tell what is given from what is a default; no flag's value is None."""
        return argparse.Namespace(**{action.dest: None for action in _sources(self)})

    def _take_file(self, given: argparse.Namespace, actions: Sequence[argparse.Action], path: Path) -> None:
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            self.error(f"cannot read --config {path}: {error.strerror}")
        except ValueError as error:  # it is no TOML, or no UTF-8
            self.error(f"--config {path} is no TOML file: {error}")
        known = {_key(action): action for action in actions if action.dest != "config"}
        for key, value in table.items():
            if key not in known:
                near = difflib.get_close_matches(key, known, 1, 0.5)
                self.error(f"{path}: there is no option {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
            if getattr(given, known[key].dest) is None:
                self._set(given, known[key], value, f"{path}, {key}")

    def _set(self, given: argparse.Namespace, action: argparse.Action, value: Any, source: str) -> None:
        """Parse a value as if it had been a flag, so that types, choices and messages are the same."""
        self._source = source
        if action.nargs == 0:  # a switch: as a flag it can only be on
            text = str(value).lower()
            if text not in _TRUE + _FALSE:
                self.error(f"must be true or false, not {value!r}")
            setattr(given, action.dest, text in _TRUE)
        else:
            found = self.parse_args(self._arguments(action, value), self._nothing())
            setattr(given, action.dest, getattr(found, action.dest))
        self._source = ""

    def _arguments(self, action: argparse.Action, value: Any) -> list[str]:
        flag = action.option_strings[0]
        if isinstance(action.default, list):
            values = value.split(",") if isinstance(value, str) else value
            if not isinstance(values, list) or not all(isinstance(item, str) for item in values):
                self.error(f"must be a list of strings, not {value!r}")
            return [f"{flag}={item.strip()}" for item in values if item.strip()]
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            self.error(f"must be a number or a string, not {value!r}")
        return [f"{flag}={value}"]


def count(text: str) -> int:
    """An argparse type: 1 or more."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def count_or_auto(text: str) -> int | Literal["auto"]:
    """An argparse type: 1 or more, or `auto`."""
    if text == "auto":
        return "auto"
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1, or auto")
    return int(text)


def positive(text: str) -> float:
    """An argparse type: a finite number above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def _sources(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Return the flags that have a value, which `--help` and `--version` have not."""
    return [action for action in parser._actions if action.dest not in ("help", "version")]


def _name(action: argparse.Action) -> str:
    return action.option_strings[0] if action.option_strings else str(action.metavar)


def _key(action: argparse.Action) -> str:
    return action.option_strings[0].removeprefix("--")
