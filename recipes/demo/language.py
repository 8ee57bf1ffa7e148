"""Stage 9, the language model: a small Llama that learns to go on, token by token, frame by frame.

Crops of single clips, so that a context holds one voice, and no `</audio>`: the demo speaks until it is stopped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from recipes.demo import codes
from recipes.demo.files import unit_tokenizer
from recipes.demo.loop import Loop
from recipes.demo.recipe import CODEC, CPU, DECODER, Run
from streaming.models.token_layout import AUDIO, unit_name

_BATCH = 3
"""Few, because the first hours are short of steps and not of memory."""
RATE = 1e-3
DECAY = 0.998


def config() -> dict[str, Any]:
    """The decoder's `config.json`."""
    tokenizer = unit_tokenizer(CODEC["num_quantizers"], CODEC["codebook_size"])
    ids = {
        "bos_token_id": tokenizer.token_to_id("<|begin_of_text|>"),
        "eos_token_id": tokenizer.token_to_id("<|end_of_text|>"),
    }
    return DECODER | ids | {"vocab_size": tokenizer.get_vocab_size()}


def loop(folder: Path, device: torch.device = CPU) -> Loop:
    """The stage's state, from its checkpoint if there is one."""
    model: nn.Module = LlamaForCausalLM(LlamaConfig(**config()))
    return Loop(folder / "language.pt", {"model": model.to(device)}, RATE, "model", DECAY, (0.9, 0.95))


class Sequences:
    """Random crops as token ids: `<bos><audio>` and `frames` frames. All clips are drawn equally often, by length."""

    def __init__(self, voices: list[codes.VoiceCodes], frames: int, seed: int) -> None:
        tokenizer = unit_tokenizer(CODEC["num_quantizers"], CODEC["codebook_size"])
        books = range(CODEC["num_quantizers"])
        self.prefix = torch.tensor(tokenizer.encode(AUDIO).ids)
        self.offsets = torch.tensor([tokenizer.token_to_id(unit_name(0, book)) for book in books])
        self.stride = len(books)
        assert all(  # ids run over codes, then codebooks; asserted, because the table is used as arithmetic
            tokenizer.token_to_id(unit_name(code, book)) == int(self.offsets[book]) + code * self.stride
            for book in books
            for code in (1, CODEC["codebook_size"] - 1)
        )
        self.frames, self.draw = frames, np.random.default_rng(seed)
        self.clips = [clip for voice in voices for clip in voice.clips() if len(clip) > frames]
        room = np.array([len(clip) - frames for clip in self.clips], np.float64)
        self._weights = room / room.sum()

    def tokens(self, frames: Tensor) -> Tensor:
        """frames: [B, F, Q] codes. Returns [B, 2 + F Q] ids."""
        ids = (frames * self.stride + self.offsets).flatten(1)
        return torch.cat((self.prefix.expand(len(ids), -1), ids), 1)

    def batch(self, size: int) -> Tensor:
        """[B, 2 + F Q] ids."""
        rows = []
        for _ in range(size):
            clip = self.clips[self.draw.choice(len(self.clips), p=self._weights)]
            at = self.draw.integers(len(clip) - self.frames)
            rows.append(clip[at : at + self.frames])
        return self.tokens(torch.from_numpy(np.stack(rows).astype(np.int64)))


def train(run: Run, frames: int) -> None:
    """Trains, from the checkpoint on, on crops of so many frames; in bfloat16: 1.6 times the speed."""
    state = loop(run.stages, run.device)
    state.rate *= run.rate
    sequences = Sequences(codes.load(run.stages, "train"), frames, run.seed + state.steps)
    held_out = Sequences(codes.load(run.stages, "test"), frames, 0).batch(16).to(run.device)
    batch = run.batch or _BATCH
    model = state.modules["model"]

    def step() -> tuple[dict[str, float], float]:
        with torch.autocast(run.device.type, torch.bfloat16):
            loss = token_losses(model, sequences.batch(batch).to(run.device)).mean()
        norm = state.update("model", loss, clip=1.0)
        return {"loss": loss.item(), "norm": norm}, batch * frames * 0.08

    def check(average: nn.Module) -> dict[str, float]:
        losses = torch.cat([token_losses(average, some) for some in held_out.split(4)])
        by_book = losses.view(-1, DECODER["num_quantizers"]).mean(0).tolist()
        return {"loss": losses.mean().item()} | {f"book{number}": loss for number, loss in enumerate(by_book)}

    state.run(step, check, run.minutes)


def token_losses(model: nn.Module, ids: Tensor) -> Tensor:
    """ids: [B, 2 + F Q]. Returns the negative log-likelihood of each code's token, [B, F Q]."""
    prefix = ids.shape[1] % DECODER["num_quantizers"]
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits[:, prefix - 1 :]
    targets = ids[:, prefix:]
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
