"""Which token of the checkpoint's vocabulary stands for which code: read from its tokenizer, never computed.

A prompt is `<bos><audio><c_0><c_1>...<c_{Q-1}><c_0>...`, one token a codebook, frame by frame; `</audio>` ends the
speech. Whether there is a `<bos>` is the tokenizer's business: the prefix is whatever it makes of the text `<audio>`.
Source: `inference.py` of the published code (github.com/llm-jp/llama-mimi).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from streaming.errors import TokenLayoutError
from streaming.models.checkpoint import holds_numbers

AUDIO, END_OF_AUDIO = "<audio>", "</audio>"
_PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
"""Tokenizer classes of `transformers` that do what `tokenizer.json` says and no more."""
_CHANGES = frozenset(
    {"add_bos_token", "add_eos_token", "auto_map", "extra_special_tokens", "additional_special_tokens"}
)
"""Settings by which they do more, unless the settings are empty: `save_pretrained` writes some of them so."""


def unit_name(code: int, codebook: int) -> str:
    """Return the text of a code's token."""
    return f"<{code}_{codebook}>"


@dataclass(frozen=True)
class TokenLayout:
    """prefix: token ids in front of the first frame, the last of them `<audio>`. units: [Q, K] int64, the id of each
    code.

    end: the id of `</audio>`.
    """

    prefix: tuple[int, ...]
    units: Tensor
    end: int

    @property
    def fingerprint(self) -> str:
        """A text that differs for another layout."""
        numbers = self.units.numpy().tobytes() if holds_numbers(self.units) else b""
        units = hashlib.sha256(numbers).hexdigest()
        return f"{self.prefix} {self.end} {units}"

    @staticmethod
    def load(folder: Path, num_codebooks: int, codebook_size: int, vocab_size: int) -> TokenLayout:
        """Read and verify a checkpoint's tokenizer. Raises `TokenLayoutError` naming what is missing."""
        try:
            vocabulary, prefix = _read(folder)
        except Exception as error:  # whatever the libraries make of a damaged file: there is no common base
            raise TokenLayoutError(f"cannot read the tokenizer in {folder}: {error}") from error
        names = [unit_name(code, book) for book in range(num_codebooks) for code in range(codebook_size)]
        missing = [name for name in (AUDIO, END_OF_AUDIO, *names) if name not in vocabulary]
        if missing:
            shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
            raise TokenLayoutError(
                f"the tokenizer in {folder} lacks {shown}: it is not a Llama-Mimi tokenizer for {num_codebooks} "
                f"codebooks of {codebook_size}"
            )
        if prefix.count(vocabulary[AUDIO]) != 1 or prefix[-1] != vocabulary[AUDIO]:
            raise TokenLayoutError(
                f"the tokenizer in {folder} makes {list(prefix)} of {AUDIO}: it must end in its one token"
            )
        ids = [vocabulary[name] for name in names]
        layout = TokenLayout(prefix, torch.tensor(ids).view(num_codebooks, codebook_size), vocabulary[END_OF_AUDIO])
        if len(set(ids)) != len(ids):
            raise TokenLayoutError(f"the tokenizer in {folder} gives two codes the same token")
        if max(*ids, *prefix, layout.end) >= vocab_size:
            raise TokenLayoutError(
                f"the tokenizer in {folder} has tokens beyond the {vocab_size} that the decoder knows"
            )
        return layout


def _read(folder: Path) -> tuple[dict[str, int], tuple[int, ...]]:
    """Return the vocabulary, and what the tokenizer makes of `<audio>`.

    As `transformers` reads it, but without it where that is the same: importing it takes longer than all the rest of a
    start.
    """
    plain = _plain(folder)
    if plain is not None:
        plain.no_truncation()
        plain.no_padding()
        return plain.get_vocab(), tuple(plain.encode(AUDIO).ids)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return tokenizer.get_vocab(), tuple(tokenizer(AUDIO)["input_ids"])


def _plain(folder: Path) -> Tokenizer | None:
    """Return the tokenizer, if it is its `tokenizer.json` and nothing else."""
    described = folder / "tokenizer_config.json"
    if not described.is_file() or (folder / "added_tokens.json").exists():
        return None
    settings: dict[str, Any] = json.loads(described.read_text(encoding="utf-8"))
    changes = [name for name in _CHANGES if settings.get(name) not in (None, {}, [])]
    if settings.get("tokenizer_class") not in _PLAIN_CLASSES or changes:
        return None
    plain = Tokenizer.from_file(str(folder / "tokenizer.json"))
    own = {number: token.content for number, token in plain.get_added_tokens_decoder().items()}
    told = settings.get("added_tokens_decoder", {}).items()
    return plain if all(own.get(int(number)) == token["content"] for number, token in told) else None
