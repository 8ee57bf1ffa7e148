"""A checkpoint with all that the released ones have, but for its width: loaded, and continued as the published pipeline
continues.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from streaming.config import Sampling
from streaming.loading import load_engine
from streaming.models import token_layout
from streaming.models.token_layout import TokenLayout, unit_name
from tests.reference import FRAME, published_pipeline, speech, write_codec

BOOKS, SIZE = 4, 2048
ORDINARY, SPECIAL = 128_000, 256
AUDIO = ORDINARY + SPECIAL + BOOKS * SIZE
VOCABULARY = AUDIO + 2
_WORDS = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)


def _tokenizer() -> dict[str, Any]:
    """Llama 3's, in its sizes: bytes and merges to 128,000 and 256 specials; then, by `add_tokens`, `<x_i>` with x
    outside, `<audio>`, `</audio>`, none of them special, all normalized.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(byte) for byte in printable] + [chr(256 + place) for place in range(256 - len(printable))]
    pairs = [(one, other) for one in letters for other in letters]
    pairs += [(one + letters[0], other) for one in letters for other in letters]
    merges = pairs[: ORDINARY - len(letters)]
    vocabulary = {token: number for number, token in enumerate([*letters, *(one + other for one, other in merges)])}
    specials = [
        "<|begin_of_text|>",
        "<|end_of_text|>",
        *(f"<|reserved_special_token_{n}|>" for n in range(SPECIAL - 2)),
    ]
    units = [unit_name(code, book) for code in range(SIZE) for book in range(BOOKS)]

    def added(number: int, content: str, special: bool) -> dict[str, Any]:
        sides = {"single_word": False, "lstrip": False, "rstrip": False}
        return {"id": number, "content": content, **sides, "normalized": not special, "special": special}

    tokens = [added(ORDINARY + place, content, True) for place, content in enumerate(specials)]
    ours = enumerate([*units, "<audio>", "</audio>"], ORDINARY + SPECIAL)
    bos = {"id": "<|begin_of_text|>", "ids": [ORDINARY], "tokens": ["<|begin_of_text|>"]}
    by_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [*tokens, *(added(number, content, False) for number, content in ours)],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": _WORDS}, "behavior": "Isolated", "invert": False},
                by_bytes,
            ],
        },
        "post_processor": {
            "type": "Sequence",
            "processors": [
                by_bytes,
                {
                    "type": "TemplateProcessing",
                    "single": [
                        {"SpecialToken": {"id": bos["id"], "type_id": 0}},
                        {"Sequence": {"id": "A", "type_id": 0}},
                    ],
                    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                    "special_tokens": {bos["id"]: bos},
                },
            ],
        },
        "decoder": by_bytes,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": vocabulary,
            "merges": [list(pair) for pair in merges],
        },
    }


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tied, float32, in five shards and more; settings as `save_pretrained` of transformers 4.56 leaves them."""
    folder = tmp_path_factory.mktemp("released")
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        num_quantizers=BOOKS,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=96,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        bos_token_id=ORDINARY,
        eos_token_id=ORDINARY + 1,
    )
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in model.parameters():
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(1 + 0.1 * noise if tensor.ndim == 1 else noise * 1.5 / tensor.shape[1] ** 0.5)
    model.save_pretrained(folder, max_shard_size="150KB")
    generation = {"bos_token_id": ORDINARY, "do_sample": True, "eos_token_id": [ORDINARY + 1], "temperature": 0.6}
    (folder / "generation_config.json").write_text(json.dumps(generation | {"top_p": 0.9}))
    tokenizer = _tokenizer()
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    described = {str(token["id"]): {k: v for k, v in token.items() if k != "id"} for token in tokenizer["added_tokens"]}
    assert len(described) == 8450
    settings = {
        "added_tokens_decoder": described,
        "bos_token": "<|begin_of_text|>",
        "clean_up_tokenization_spaces": True,
        "eos_token": "<|end_of_text|>",
        "extra_special_tokens": {},
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 131_072,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_its_tokenizer_is_read_without_transformers(checkpoint: Path) -> None:
    """Pins four seconds of every start, for an empty setting that `save_pretrained` writes."""
    assert len(list(checkpoint.glob("*.safetensors"))) >= 5
    assert token_layout._plain(checkpoint) is not None
    layout = TokenLayout.load(checkpoint, BOOKS, SIZE, VOCABULARY)
    assert layout.prefix == (ORDINARY, AUDIO)
    assert layout.end == AUDIO + 1
    wanted = ORDINARY + SPECIAL + torch.arange(SIZE) * BOOKS + torch.arange(BOOKS)[:, None]
    assert torch.equal(layout.units, wanted)


def test_it_goes_on_as_the_published_pipeline_does(checkpoint: Path, tmp_path: Path) -> None:
    """Through the tokenizer's text there, by ids here; with a prompt that ends within a frame."""
    codec = write_codec(tmp_path / "codec", codebook_size=SIZE)
    prompt = speech(12)[: 11 * FRAME + 400]
    wanted = published_pipeline(codec, checkpoint, prompt, 6)
    with load_engine(checkpoint, codec, device="cpu", dtype="float32", max_sessions=1) as engine:
        assert engine.sampling == Sampling(temperature=0.8, top_k=30, top_p=0.9)
        with engine.open(temperature=0.0, seed=1) as session:
            for start in range(0, len(prompt), FRAME):
                session.listen(prompt[start : start + FRAME])
            heard = np.concatenate([np.zeros(0, np.float32), *session.speak(6)])
    assert len(wanted.codes) > 0
    expected = wanted.pcm[len(wanted.prompt_codes) * FRAME :]
    assert len(heard) == len(expected)
    np.testing.assert_allclose(heard, expected, atol=1e-4)
