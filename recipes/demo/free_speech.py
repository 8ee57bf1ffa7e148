"""`python -m recipes.demo.free_speech --checkpoint DIR`: what codec and model are worth on speech of any text.

codec         every trained voice's held-out clips through encoder, codebooks and decoder; a real recording too
continuation  prompts of 3 s gone on with for 5 s, as a session does it
likelihood    of held-out speech, against a 4-gram of frames
A table, a JSON file, and spectrograms to look at.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from recipes.demo import clips, codes, judges, language, recipe
from recipes.demo.judges import Wave
from streaming.audio import FRAME, read_audio
from streaming.config import LlamaConfig, MimiConfig, Sampling
from streaming.frame_step import FrameStep
from streaming.models.checkpoint import TensorSource, read_config
from streaming.models.llama import LlamaDecoder
from streaming.models.mimi import StreamingMimi
from streaming.models.token_layout import TokenLayout

PROMPT_FRAMES, SPOKEN_FRAMES = 38, 62
_REPEAT_FRAMES = 8
Figures = dict[str, Any]


def load_codec(folder: Path) -> StreamingMimi:
    """The codec of an exported checkpoint, by the code that loads the released ones."""
    config = MimiConfig.from_dict(read_config(folder))
    return StreamingMimi(TensorSource(folder, torch.device("cpu"), torch.float32), config, config.num_codebooks)


def load_decoder(folder: Path, codec: StreamingMimi) -> LlamaDecoder:
    """Its decoder."""
    config = LlamaConfig.from_dict(read_config(folder))
    layout = TokenLayout.load(folder, config.num_codebooks, codec.config.codebook_size, config.vocab_size)
    return LlamaDecoder(TensorSource(folder, torch.device("cpu"), torch.float32), config, layout)


def held_out(cache: Path, frames: int, each: int) -> list[tuple[str, Wave]]:
    """`each` held-out clips of every voice, cut to so many frames: [N] float32."""
    found = []
    for voice in clips.load(cache, "test"):
        long = [start for start, end in zip(voice.starts[:-1], voice.starts[1:], strict=True) if end - start >= frames]
        for start in long[:each]:
            pcm = voice.pcm[start : start + frames].reshape(-1).astype(np.float32) / np.float32(32768)
            found.append((voice.name, pcm))
    return found


def round_trip(codec: StreamingMimi, waves: list[Wave]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Waves of equal length, each in a slot of its own. Returns what is heard [B, N], and the codes [B, F, Q]."""
    state = codec.init_state(len(waves))
    active = torch.ones(len(waves), dtype=torch.bool)
    pcm = torch.from_numpy(np.stack(waves)).unfold(1, FRAME, FRAME)
    made, found = [], []
    for frame in pcm.unbind(1):
        found.append(codec.encode(frame, state, active))
        made.append(codec.decode(found[-1], state, active))
    return torch.cat(made, 1).numpy(), torch.stack(found, 1).numpy()


def judge_codec(codec: StreamingMimi, cache: Path, each: int, pictures: Path | None) -> Figures:
    """Figures by voice, their means, and each codebook's perplexity as a share of its size."""
    material = held_out(cache, 125, each)
    made, _ = round_trip(codec, [pcm for _, pcm in material])
    _, found = round_trip(codec, [pcm for _, pcm in held_out(cache, 125, 1000)])
    by_voice: dict[str, list[dict[str, float]]] = defaultdict(list)
    for (voice, pcm), heard in zip(tqdm(material, desc="codec", unit="clip"), made, strict=True):
        by_voice[voice].append(_codec_figures(pcm, heard))
    if pictures is not None:
        for name in dict(material):
            row = next(index for index, (voice, _) in enumerate(material) if voice == name)
            picture(pictures / f"codec-{name}.png", {"recorded": material[row][1], "through the codec": made[row]})
    voices = {voice: _mean(rows) for voice, rows in by_voice.items()}
    real = read_audio(Path(__file__).parents[2] / "examples" / "prompt.wav")
    real = real[: len(real) // FRAME * FRAME]
    heard = round_trip(codec, [real])[0][0]
    if pictures is not None:
        picture(pictures / "codec-real.png", {"recorded": real, "through the codec": heard})
    return {
        "mean": _mean(list(voices.values())),
        "voices": voices,
        "real recording": _codec_figures(real, heard),
        "perplexity": [round(share, 3) for share in codes.perplexities(found.reshape(-1, found.shape[-1]))],
    }


def _codec_figures(pcm: Wave, heard: Wave) -> dict[str, float]:
    """Words beside those of the original with white noise 40 dB below it, which nobody hears: how far the recogniser
    itself can be trusted.
    """
    said = judges.words(pcm)
    noise = np.random.default_rng(0).standard_normal(len(pcm)).astype(np.float32)
    noisy = pcm + noise * np.sqrt(np.square(pcm).mean()) / 100

    def errors(wave: Wave) -> float:
        return judges.word_errors(said, judges.words(wave)) / max(1, len(said))

    return {
        "stoi": judges.intelligibility(pcm, heard),
        "dnsmos": judges.quality(heard),
        "dnsmos of the original": judges.quality(pcm),
        "word errors": errors(heard),
        "word errors by noise at -40 dB": errors(noisy),
    }


def speak(
    codec: StreamingMimi, decoder: LlamaDecoder, prompts: list[Wave], frames: int, seed: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Goes on with every prompt, as sessions do. Returns prompt and continuation as heard [B, N], codes [B, F, Q]."""
    step = FrameStep(codec, decoder, len(prompts), recipe.CONTEXT_FRAMES, 0)
    for slot in range(len(prompts)):
        step.open(slot, Sampling(seed=seed + slot))
    slots = np.arange(len(prompts))
    everyone, nobody = np.ones(len(prompts), np.bool_), np.zeros(len(prompts), np.bool_)
    pcm = np.stack(prompts).reshape(len(prompts), -1, FRAME)
    results = [step(slots, frame, everyone, nobody) for frame in pcm.transpose(1, 0, 2)]
    silence = np.zeros((len(prompts), FRAME), np.float32)
    results += [step(slots, silence, nobody, everyone) for _ in range(frames)]
    return np.concatenate([result.pcm for result in results], 1), np.stack([result.codes for result in results], 1)


def judge_continuation(
    codec: StreamingMimi, decoder: LlamaDecoder, cache: Path, each: int, pictures: Path | None
) -> Figures:
    """Figures of the continuations beside those of how the speakers really went on."""
    total = PROMPT_FRAMES + SPOKEN_FRAMES
    material = held_out(cache, total, each)
    cut = PROMPT_FRAMES * FRAME
    prompts = [pcm[:cut] for _, pcm in material]
    heard, spoken = speak(codec, decoder, prompts, SPOKEN_FRAMES, seed=1)
    _, real_codes = round_trip(codec, [pcm for _, pcm in material])
    portraits: dict[str, list[NDArray[np.float32]]] = defaultdict(list)
    for voice, pcm in held_out(cache, total, each + 4):
        portraits[voice].append(judges.portrait(pcm))
    faces = {voice: np.mean(rows, 0) for voice, rows in portraits.items()}
    ordinary = np.concatenate([judges.flux(pcm) for _, pcm in material])
    low, high = np.percentile(ordinary, [2.5, 97.5], axis=0)
    rows, pitches = [], []
    for (voice, pcm), whole in zip(tqdm(material, desc="continuation", unit="clip"), heard, strict=True):
        made = whole[cut:]
        picture_of_made = judges.portrait(made)
        nearest = max(faces, key=lambda name: float(faces[name] @ picture_of_made))
        seam = judges.flux(whole)[PROMPT_FRAMES - 1]
        rows.append(
            {
                "speech": judges.share_of_speech(made),
                "speech, really": judges.share_of_speech(pcm[cut:]),
                "dnsmos": judges.quality(made),
                "voice kept": float(nearest == voice),
                "seam ordinary": float(((seam >= low) & (seam <= high)).all()),
            }
        )
        pitches.append((judges.pitch(pcm), judges.pitch(made)))
    if pictures is not None:
        for row, (name, pcm) in enumerate(material):
            if row == 0 or material[row - 1][0] != name:
                picture(pictures / f"continuation-{name}.png", {"really": pcm, "gone on with at 3.04 s": heard[row]})
    heights = np.log(np.array(pitches, np.float64))
    heights = heights[np.isfinite(heights).all(1)]  # where both are voiced anywhere
    follows = len(heights) > 2
    return _mean(rows) | {
        "pitch correlation": float(np.corrcoef(heights.T)[0, 1]) if follows else 0.0,
        "pitch off": float(np.median(np.abs(heights[:, 1] - heights[:, 0]))) if follows else math.inf,
        "voiced": len(heights),
        "repeats": repeats(spoken[:, PROMPT_FRAMES:]),
        "repeats, really": repeats(real_codes[:, PROMPT_FRAMES:]),
        "clips": len(material),
    }


def repeats(spoken: NDArray[np.int64]) -> float:
    """Share of windows of 8 frames that came before in the same clip, by at least 6 equal codes of codebook 1.

    spoken: [B, F, Q]. Codebook 1 is the coarsest that tells sounds apart.
    """
    found, total = 0, 0
    for clip in spoken[:, :, 1]:
        windows = np.lib.stride_tricks.sliding_window_view(clip, _REPEAT_FRAMES)
        equal = (windows[:, None] == windows[None]).sum(-1)
        earlier = np.tril(np.ones(equal.shape, np.bool_), -_REPEAT_FRAMES)
        found += int(((equal >= _REPEAT_FRAMES - 2) & earlier).any(1).sum())
        total += len(windows)
    return found / total


def judge_likelihood(decoder_folder: Path, folder: Path) -> Figures:
    """Nats a token of held-out clips: the model's, and a 4-gram's that was made from the training codes."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(decoder_folder, dtype=torch.float32)
    train, test = codes.load(folder, "train"), codes.load(folder, "test")
    sequences = language.Sequences(test, recipe.CONTEXT_FRAMES, 0)
    rows = [clip[: recipe.CONTEXT_FRAMES].astype(np.int64) for clip in sequences.clips]
    with torch.no_grad():
        ids = sequences.tokens(torch.from_numpy(np.stack(rows)))
        losses = torch.cat([language.token_losses(model, some) for some in tqdm(ids.split(4), desc="likelihood")])
    by_book = losses.view(-1, recipe.DECODER["num_quantizers"]).mean(0)
    return {
        "nats a token": float(losses.mean()),
        "by codebook": [round(float(loss), 3) for loss in by_book],
        "4-gram": ngram_loss([clip for voice in train for clip in voice.clips()], rows),
    }


def ngram_loss(train: list[NDArray[Any]], test: list[NDArray[Any]], order: int = 4) -> float:
    """Nats a token of an interpolated n-gram (Witten-Bell): each code given its codebook's in the frames before."""
    total, count = 0.0, 0
    for book in range(train[0].shape[1]):
        seen: list[dict[tuple[int, ...], Counter[int]]] = [defaultdict(Counter) for _ in range(order)]
        for clip in train:
            column = clip[:, book].tolist()
            for place, code in enumerate(column):
                for length in range(min(order, place + 1)):
                    seen[length][tuple(column[place - length : place])][code] += 1
        for clip in test:
            column = clip[:, book].tolist()
            for place, code in enumerate(column):
                chance = 1 / recipe.CODEC["codebook_size"]
                for length in range(min(order, place + 1)):
                    after = seen[length].get(tuple(column[place - length : place]))
                    if after is None:
                        break
                    kinds, number = len(after), after.total()
                    chance = (after[code] + kinds * chance) / (number + kinds)
                total -= math.log(chance)
                count += 1
    return total / count


def picture(path: Path, waves: dict[str, Wave]) -> None:
    """Spectrograms, one above the other."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(waves), 1, figsize=(14, 3.2 * len(waves)), squeeze=False, layout="tight")
    for axis, (title, pcm) in zip(axes[:, 0], waves.items(), strict=True):
        hiss = 1e-5 * np.random.default_rng(0).standard_normal(len(pcm))  # digital silence has no logarithm
        axis.specgram(pcm + hiss, NFFT=1024, Fs=24_000, noverlap=768, vmin=-140, vmax=-30)
        axis.set(title=title, ylim=(0, 8000))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=60)
    pyplot.close(figure)


def _mean(rows: list[dict[str, float]]) -> dict[str, float]:
    return {key: round(float(np.mean([row[key] for row in rows])), 3) for key in rows[0]}


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m recipes.demo.free_speech", description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="a folder with codec/ and decoder/")
    parser.add_argument("--root", type=Path, default=recipe.root(), help="where the recipe keeps corpus and codes")
    parser.add_argument("--clips", type=int, default=3, help="of each voice")
    parser.add_argument("--pictures", type=Path, metavar="DIR")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    root: Path = options.root
    codec = load_codec(options.checkpoint / "codec")
    figures: Figures = {"codec": judge_codec(codec, root / "cache", options.clips, options.pictures)}
    if (options.checkpoint / "decoder").is_dir():
        decoder = load_decoder(options.checkpoint / "decoder", codec)
        figures["continuation"] = judge_continuation(codec, decoder, root / "cache", options.clips, options.pictures)
        figures["likelihood"] = judge_likelihood(options.checkpoint / "decoder", root / "stages")
    print(table(figures))
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def table(figures: Figures, depth: int = 0) -> str:
    """Figures as indented text."""
    lines = []
    for key, value in figures.items():
        if isinstance(value, dict) and all(isinstance(entry, float) for entry in value.values()):
            value = ", ".join(f"{name} {number:.3f}" for name, number in value.items())
        if isinstance(value, dict):
            lines += [f"{'  ' * depth}{key}", table(value, depth + 1)]
        else:
            lines.append(f"{'  ' * depth}{key}: {f'{value:.3f}' if isinstance(value, float) else value}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
