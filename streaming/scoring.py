"""Measure how likely a model finds recorded speech: the negative log-likelihood a token, which benchmarks compare.

The tokens are those of the published evaluation (`eval/` of github.com/llm-jp/llama-mimi): `<bos><audio>`, the codes
of at most 20 s, `</audio>`; the softmax is over the whole vocabulary. Left out is the likelihood of `<audio>` itself,
which is the same for every clip. SALMon (arXiv 2409.07437) compares the mean over all tokens (`nats`); the published
sWUGGY, sBLIMP and StoryCloze figures compare that of codebook 0 and the end (`semantic`).
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from streaming.audio import FRAME, SAMPLE_RATE, read_audio
from streaming.command import INTERRUPTED, check_result, complain, raise_on_interrupt, say, write_result
from streaming.errors import StreamingError
from streaming.loading import DEMO, add_models, folders, load_models
from streaming.models.likelihood import OutputLayer, clip_losses, encode_recordings
from streaming.options import count, positive

MAX_SECONDS = 20.0
"""Seconds of a clip that are scored, as published. The rest is not looked at."""


@dataclass(frozen=True)
class Score:
    """by_codebook: mean negative log-likelihood of each codebook's tokens; ending: that of `</audio>`. In nats."""

    path: str
    frames: int
    by_codebook: tuple[float, ...]
    ending: float

    @property
    def nats(self) -> float:
        """Return the mean over all tokens."""
        tokens = self.frames * len(self.by_codebook)
        return (sum(self.by_codebook) * self.frames + self.ending) / (tokens + 1)

    @property
    def semantic(self) -> float:
        """Return the mean over the tokens of codebook 0 and the end."""
        return (self.by_codebook[0] * self.frames + self.ending) / (self.frames + 1)


def score(
    paths: Iterable[str | Path],
    model: str | Path = DEMO,
    codec: str | Path | None = None,
    *,
    device: str | torch.device = "auto",
    dtype: str = "auto",
    batch_size: int = 8,
    max_seconds: float = MAX_SECONDS,
) -> list[Score]:
    """Return the scores of recordings, in the order of `paths`, `batch_size` at a time.

    model, codec, device, dtype: as for `load_engine`.
    Raises as `load_models` does, and `AudioError` for what cannot be read or holds nothing.
    """
    models = load_models(model, codec, device, dtype)
    output = OutputLayer.load(folders(model, codec)[0], models.decoder)
    names = [str(path) for path in paths]
    scores = []
    for first in range(0, len(names), batch_size):
        batch = names[first : first + batch_size]
        codes, lengths = encode_recordings(models.codec, [_beginning(name, max_seconds) for name in batch])
        losses, endings = clip_losses(models.decoder, output, codes, lengths)
        for name, clip, length, ending in zip(batch, losses, lengths.tolist(), endings.tolist(), strict=True):
            scores.append(Score(name, length, tuple(clip[:length].mean(0).tolist()), ending))
    return scores


def _beginning(path: str, max_seconds: float) -> NDArray[np.float32]:
    """Return a recording's beginning, [n]. Raises `AudioError`."""
    return read_audio(path)[: max(FRAME, int(max_seconds * SAMPLE_RATE))]


@dataclass(frozen=True)
class Pairs:
    """A benchmark's result over pairs. accuracy: share whose positive is likelier, a tie counting half (SALMon);
    semantic_accuracy: the same by `Score.semantic`.
    """

    pairs: int
    accuracy: float
    semantic_accuracy: float


def compare(positives: Sequence[Score], negatives: Sequence[Score]) -> Pairs:
    """Compare the scores of the two sides, pair by pair."""

    def share(differences: list[float]) -> float:
        return sum(1.0 if difference > 0 else 0.5 if difference == 0 else 0.0 for difference in differences) / len(
            differences
        )

    both = list(zip(positives, negatives, strict=True))
    return Pairs(
        len(both),
        share([negative.nats - positive.nats for positive, negative in both]),
        share([negative.semantic - positive.semantic for positive, negative in both]),
    )


def read_pairs(path: Path) -> list[tuple[str, Path, Path]]:
    """Return the rows of a CSV with columns `positive`, `negative` and, if there are several, `task`: (task, positive,
    negative).

    Paths are relative to the CSV. Raises `StreamingError` for another file.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
            return [
                (row.get("task") or path.stem, path.parent / row["positive"], path.parent / row["negative"])
                for row in rows
            ]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise StreamingError(f"cannot read {path}: {error}") from error
    except (KeyError, TypeError) as error:
        raise StreamingError(f"{path} is not a list of pairs: it needs the columns positive and negative") from error


def main(arguments: list[str] | None = None) -> int:
    """Run the command line of `python -m streaming.score`."""
    parser = argparse.ArgumentParser(prog="python -m streaming.score", description=__doc__.splitlines()[0])
    parser.add_argument("recordings", nargs="*", type=Path, metavar="WAV", help="The recordings that are scored.")
    parser.add_argument(
        "--pairs",
        type=Path,
        metavar="CSV",
        help="Compare pairs: the columns positive and negative (paths from the CSV's folder) and, if need be, task.",
    )
    add_models(parser)
    parser.add_argument("--batch", type=count, default=8, metavar="N", help="How many clips are scored at a time.")
    parser.add_argument(
        "--max-seconds", type=positive, default=MAX_SECONDS, metavar="S", help="How much of a clip is scored."
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="Write the result to this file, too.")
    options = parser.parse_args(arguments)
    if bool(options.recordings) == bool(options.pairs):
        parser.error("give recordings, or --pairs CSV")
    try:
        raise_on_interrupt()
        check_result("--json", options.json)
        pairs = read_pairs(options.pairs) if options.pairs else []
        if options.pairs and not pairs:
            raise StreamingError(f"{options.pairs} holds no pairs")
        paths = [path for _, positive, negative in pairs for path in (positive, negative)] or options.recordings
        scores = score(
            paths,
            options.model,
            options.codec,
            device=options.device,
            dtype=options.dtype,
            batch_size=options.batch,
            max_seconds=options.max_seconds,
        )
        _show(pairs, scores, options.json)
    except StreamingError as error:
        complain(f"score: {error}")
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def _show(pairs: list[tuple[str, Path, Path]], scores: list[Score], path: Path | None) -> None:
    """Write the result to standard output, and to the file where one is asked for."""
    tasks: dict[str, Pairs] = {}
    lines: list[str] = []
    for task in dict.fromkeys(task for task, _, _ in pairs):
        rows = [number for number, pair in enumerate(pairs) if pair[0] == task]
        tasks[task] = compare([scores[2 * row] for row in rows], [scores[2 * row + 1] for row in rows])
        result = tasks[task]
        lines.append(
            f"{task}: {result.accuracy:.3f}, by codebook 0 alone {result.semantic_accuracy:.3f}, {result.pairs} pairs"
        )
    if not pairs:
        for entry in scores:
            books = " ".join(f"{loss:.3f}" for loss in entry.by_codebook)
            lines.append(f"{entry.path}: {entry.nats:.4f} nats/token; by codebook {books}; end {entry.ending:.2f}")
    try:
        say("\n".join(lines))
    finally:
        if path is not None:
            write_result("--json", path, _report(scores, tasks))


def _report(scores: list[Score], tasks: dict[str, Pairs]) -> str:
    clips = [asdict(entry) | {"nats": entry.nats, "semantic": entry.semantic} for entry in scores]
    report = {"clips": clips, "tasks": {task: asdict(result) for task, result in tasks.items()}}
    return json.dumps(report, indent=2) + "\n"
