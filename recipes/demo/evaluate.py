"""`python -m recipes.demo.evaluate`: whether the demo goes on with sense, through the engine that serves it.

Every prompt of the test sets (`--stage tests` of the recipe) is listened to and gone on with for six seconds at the
sampling that the model's own generation_config.json names. PocketSphinx, with a grammar of nothing but the items of
the prompt's kind, writes down what was said. Beside each figure stands the control: the same recordings judged as if
they had gone on with another prompt of their kind, since a closed grammar finds some words in any babble.
A table, a JSON file, and spectrograms to look at.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from tqdm import tqdm

from recipes.demo import blocks, judges, recipe, sequences, shipped
from recipes.demo.free_speech import picture
from recipes.demo.judges import Wave
from recipes.demo.sequences import Item
from streaming.audio import FRAME, SAMPLE_RATE
from streaming.engine.engine import Engine
from streaming.loading import load_engine

SPOKEN_FRAMES = 75
_AUDIBLE = 10 ** (-42 / 20)
"""Root mean square of 20 ms from which something is heard."""


@dataclass(frozen=True)
class Case:
    """A test prompt. said: its items; pitch: of its voice, in Hz."""

    name: str
    pcm: Wave
    said: list[Item]
    pitch: float

    @property
    def follows(self) -> list[Item]:
        """What is right."""
        return sequences.follow(self.said)


@dataclass(frozen=True)
class Heard:
    """A continuation: what was heard of it, and whether it ended by itself."""

    pcm: Wave
    words: list[str]
    ended: bool


def cases(folder: Path, most: int) -> list[Case]:
    """The first prompts of a test set."""
    index = json.loads((folder / "index.json").read_text())[:most]
    return [
        Case(
            f"{folder.name}-{number:03d}",
            soundfile.read(folder / f"{number:03d}.flac", dtype="float32")[0],
            [sequences.ITEMS[place] for place in entry["said"]],
            entry["pitch"],
        )
        for number, entry in enumerate(index)
    ]


def go_on(engine: Engine, case: Case, sampling: dict[str, float], seed: int) -> Heard:
    """Listens to a prompt frame by frame and lets the engine go on, as a session does it."""
    with engine.open(temperature=sampling["temperature"], top_k=int(sampling["top_k"]), seed=seed) as session:
        for frame in case.pcm[: len(case.pcm) // FRAME * FRAME].reshape(-1, FRAME):
            session.listen(frame)
        frames = list(session.speak(max_frames=SPOKEN_FRAMES))
    pcm = np.concatenate([np.zeros(0, np.float32), *frames])
    words = judges.recited(np.pad(pcm, 4800), case.said[-1].kind) if len(pcm) else []
    return Heard(pcm, words, len(frames) < SPOKEN_FRAMES)


def right_items(words: list[str], follows: list[Item]) -> int:
    """How many of the items that follow were said, from the first one on, up to a wrong or a missing word."""
    for count, _ in enumerate(follows):
        wanted = sequences.words_of(follows[: count + 1])
        if words[: len(wanted)] != wanted:
            return count
    return len(follows)


def word_error_rate(words: list[str], follows: list[Item]) -> float:
    """Least edits a word between what was said and as many words of what follows; 1 for nothing."""
    wanted = sequences.words_of(follows)[: max(1, len(words))]
    return judges.word_errors(wanted, words) / len(wanted)


def silence_seconds(pcm: Wave) -> float:
    """Until something is heard."""
    windows = pcm[: len(pcm) // 480 * 480].reshape(-1, 480)
    audible = np.flatnonzero(np.sqrt(np.square(windows).mean(1)) > _AUDIBLE)
    return float(audible[0] * 0.02) if len(audible) else len(pcm) / SAMPLE_RATE


def figures_of(case: Case, heard: Heard, control: Heard, quality: bool) -> dict[str, float]:
    """One case's figures. control: the continuation of another prompt of the same kind; quality: with DNSMOS."""
    found = right_items(heard.words, case.follows)
    chance = right_items(control.words, case.follows)
    enough = len(heard.pcm) >= SAMPLE_RATE // 2
    made = {
        "first right": float(found >= 1),
        "first right, control": float(chance >= 1),
        "three right": float(found >= 3),
        "three right, control": float(chance >= 3),
        "word errors": word_error_rate(heard.words, case.follows),
        "word errors, control": word_error_rate(control.words, case.follows),
        "silence first": silence_seconds(heard.pcm),
        "nearest voice": float(enough and blocks.voice_of(judges.pitch(heard.pcm)) == blocks.voice_of(case.pitch)),
        "ended": float(heard.ended),
    }
    return made | ({"DNSMOS": judges.quality(heard.pcm) if enough else 1.0} if quality else {})


def judge(
    engine: Engine, sampling: dict[str, float], material: list[Case], quality: int, pictures: Path | None
) -> dict[str, dict[str, float]]:
    """A test set's figures: of all, and of each kind of sequence. quality: so many prompts are judged by DNSMOS."""
    heard = [go_on(engine, case, sampling, seed) for seed, case in enumerate(tqdm(material, unit="prompt"))]
    rows: list[tuple[str, dict[str, float]]] = []
    for number, case in enumerate(material):
        control = heard[_another(material, number)]
        rows.append((case.said[-1].kind, figures_of(case, heard[number], control, number < quality)))
        if pictures is not None and number < 4:
            whole = np.concatenate([case.pcm, heard[number].pcm])
            said = ", ".join(item.text for item in case.said)
            title = f"{said}; then, at {len(case.pcm) / SAMPLE_RATE:.1f} s: {' '.join(heard[number].words)}"
            picture(pictures / f"{case.name}.png", {title: whole})
            soundfile.write(pictures / f"{case.name}.wav", whole.clip(-1, 1), SAMPLE_RATE, subtype="PCM_16")
    kinds = sorted({kind for kind, _ in rows})
    made = {"all": _summary([row for _, row in rows])}
    return made | {kind: _summary([row for other, row in rows if other == kind]) for kind in kinds}


def _another(material: list[Case], number: int) -> int:
    """The next case of the same kind that is gone on with otherwise; the next of all if there is none."""
    case = material[number]
    others: list[int] = [*range(number + 1, len(material)), *range(number)]
    for other in others:
        same_kind = material[other].said[-1].kind == case.said[-1].kind
        if same_kind and material[other].follows[0] != case.follows[0]:
            return other
    return others[0] if others else number


def _summary(rows: list[dict[str, float]]) -> dict[str, float]:
    """Means of what rows have, the median of the silence."""
    names = dict.fromkeys(name for row in rows for name in row)
    made = {name: round(float(np.mean([row[name] for row in rows if name in row])), 3) for name in names}
    made["silence first"] = round(float(np.median([row["silence first"] for row in rows])), 3)
    return made | {"prompts": float(len(rows))}


def table(figures: dict[str, dict[str, dict[str, float]]]) -> Iterator[str]:
    """Lines of a table: a row for each set and kind."""
    names = list(next(iter(figures.values()))["all"])
    yield " | ".join(["set", *names])
    yield " | ".join(["---"] * (1 + len(names)))
    for label, kinds in figures.items():
        for kind, row in kinds.items():
            yield " | ".join([f"{label}, {kind}", *(f"{row[name]:.2f}" if name in row else "" for name in names)])


def sampling_of(decoder: Path) -> dict[str, float]:
    """temperature and top_k of a checkpoint's own generation_config.json; the engine's defaults if it has none."""
    path = decoder / "generation_config.json"
    named: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {"temperature": named.get("temperature", 0.8), "top_k": named.get("top_k", 30)}


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m recipes.demo.evaluate", description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=shipped.FOLDER, help="a folder with codec/ and decoder/")
    parser.add_argument("--root", type=Path, default=recipe.root(), help="where the recipe keeps its tests")
    parser.add_argument("--prompts", type=int, default=100, help="of each set, at most")
    parser.add_argument("--quality", type=int, default=20, help="prompts of each set that DNSMOS judges, a slow judge")
    parser.add_argument("--temperature", type=float, help="instead of the model's own")
    parser.add_argument("--pictures", type=Path, metavar="DIR", help="spectrograms and WAV files of some")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    sampling = sampling_of(options.checkpoint / "decoder")
    if options.temperature is not None:
        sampling["temperature"] = options.temperature
    figures = {}
    with load_engine(
        options.checkpoint / "decoder", options.checkpoint / "codec", device="cpu", max_sessions=1
    ) as engine:
        for folder in sorted(path.parent for path in (options.root / "tests").glob("*/index.json")):
            figures[folder.name] = judge(
                engine, sampling, cases(folder, options.prompts), options.quality, options.pictures
            )
    print("\n".join(table(figures)))
    if options.json is not None:
        options.json.write_text(
            json.dumps({"sampling": sampling, "figures": figures}, indent=2) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
