"""The token layout: ids read from a tokenizer, and what is said of tokenizers that cannot be used."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from streaming.errors import CheckpointError, TokenLayoutError
from streaming.models import token_layout
from streaming.models.token_layout import TokenLayout, unit_name
from tests.reference import write_tokenizer

BOOKS, SIZE, VOCABULARY = 4, 64, 400


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def added(folder: Path) -> list[dict[str, Any]]:
    tokens: list[dict[str, Any]] = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    return tokens


def test_ids_are_the_tokenizers_own(tmp_path: Path) -> None:
    """Pins ids computed by a formula: one checkpoint orders its tokens by code, the next by codebook."""
    write_tokenizer(tmp_path, BOOKS, shuffled=True)
    layout = TokenLayout.load(tmp_path, BOOKS, SIZE, VOCABULARY)
    ids = {token["content"]: token["id"] for token in added(tmp_path)}
    assert layout.units.shape == (BOOKS, SIZE)
    assert all(layout.units[b, c] == ids[unit_name(c, b)] for b in range(BOOKS) for c in range(SIZE))
    assert layout.end == ids["</audio>"]
    assert layout.prefix == (0, ids["<audio>"])
    assert layout.units.flatten().diff().unique().numel() > 2, "the tokenizer is in order: the test shows nothing"


@pytest.mark.parametrize(
    ("settings", "changes"),
    [
        ({}, {}),
        ({"added_tokens_decoder": {"2": {"content": "<audio>"}}}, {}),
        ({"bos_token": "<|begin_of_text|>", "model_max_length": 3}, {}),
        ({}, {"truncation": {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}}),
        (
            {},
            {
                "padding": {
                    "strategy": {"Fixed": 8},
                    "direction": "Right",
                    "pad_to_multiple_of": None,
                    "pad_id": 1,
                    "pad_type_id": 0,
                    "pad_token": "<|end_of_text|>",
                }
            },
        ),
        ({"extra_special_tokens": {}, "additional_special_tokens": [], "bos_token": "<|begin_of_text|>"}, {}),
        ({"extra_special_tokens": {"late": "<late>"}}, {}),
        ({"add_bos_token": False, "bos_token": "<|begin_of_text|>"}, {}),
        ({"added_tokens_decoder": {"390": {"content": "<late>"}}}, {}),
        ({"tokenizer_class": "LlamaTokenizerFast", "bos_token": "<|begin_of_text|>"}, {}),
    ],
)
def test_ids_are_those_of_transformers(settings: dict[str, Any], changes: dict[str, Any], tmp_path: Path) -> None:
    """The library is left out where a tokenizer is no more than its file, and nobody may notice."""
    from transformers import AutoTokenizer

    write_tokenizer(tmp_path, BOOKS)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    edit(tmp_path, **changes)
    reference = AutoTokenizer.from_pretrained(tmp_path)
    vocabulary, prefix = reference.get_vocab(), tuple(reference("<audio>")["input_ids"])
    if prefix[-1] != vocabulary["<audio>"]:
        with pytest.raises(TokenLayoutError, match="must end in its one token"):
            TokenLayout.load(tmp_path, BOOKS, SIZE, VOCABULARY)
        return
    layout = TokenLayout.load(tmp_path, BOOKS, SIZE, VOCABULARY)
    assert layout.prefix == prefix
    assert all(layout.units[b, c] == vocabulary[unit_name(c, b)] for b in range(BOOKS) for c in range(SIZE))


def test_a_plain_tokenizer_needs_no_transformers() -> None:
    """Importing it took longer than all the rest of the server's start."""
    code = (
        "import sys; from streaming import loading; loading.load_models('demo', device='cpu'); "
        "assert 'transformers' not in sys.modules, 'imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_without_a_bos_the_prefix_is_audio_alone(tmp_path: Path) -> None:
    """Pins a `<bos>` that the checkpoint was not trained with."""
    write_tokenizer(tmp_path, BOOKS, bos=False)
    layout = TokenLayout.load(tmp_path, BOOKS, SIZE, VOCABULARY)
    assert layout.prefix == (next(t["id"] for t in added(tmp_path) if t["content"] == "<audio>"),)


def test_more_codebooks_than_are_asked_for_do_no_harm(tmp_path: Path) -> None:
    """Pins a tokenizer refused because it was made for more."""
    write_tokenizer(tmp_path, 8)
    assert TokenLayout.load(tmp_path, BOOKS, SIZE, 1000).units.shape == (BOOKS, SIZE)


def test_missing_units_are_counted_and_named(tmp_path: Path) -> None:
    """Pins a KeyError, and a message of 8,192 names."""
    write_tokenizer(tmp_path, 2)
    with pytest.raises(TokenLayoutError, match=r"lacks <0_2>, <1_2>, <2_2> and 125 more: .* for 4 codebooks of 64"):
        TokenLayout.load(tmp_path, BOOKS, SIZE, VOCABULARY)


def test_a_plain_text_tokenizer_is_refused(tmp_path: Path) -> None:
    """Pins a Llama that never learned to speak, loaded as if it had."""
    write_tokenizer(tmp_path, BOOKS)
    edit(tmp_path, added_tokens=added(tmp_path)[:2])
    with pytest.raises(TokenLayoutError, match=r"lacks <audio>, </audio>, <0_0> and 255 more: it is not a Llama-Mimi"):
        TokenLayout.load(tmp_path, BOOKS, SIZE, VOCABULARY)


@pytest.mark.parametrize("name", ["<audio>", "</audio>", "<63_3>"])
def test_a_single_missing_token_is_named(tmp_path: Path, name: str) -> None:
    """Pins a speech that cannot end, or an id of another token in its place."""
    write_tokenizer(tmp_path, BOOKS)
    edit(tmp_path, added_tokens=[token for token in added(tmp_path) if token["content"] != name])
    with pytest.raises(TokenLayoutError, match=rf"lacks {name}: it is not"):
        TokenLayout.load(tmp_path, BOOKS, SIZE, VOCABULARY)


def test_ids_beyond_the_embedding_are_refused(tmp_path: Path) -> None:
    """Pins an index error on a CUDA device, which takes the process with it."""
    write_tokenizer(tmp_path, BOOKS)
    last = max(token["id"] for token in added(tmp_path))
    assert TokenLayout.load(tmp_path, BOOKS, SIZE, last + 1).units.max() == last
    with pytest.raises(TokenLayoutError, match=f"tokens beyond the {last} that the decoder knows"):
        TokenLayout.load(tmp_path, BOOKS, SIZE, last)


@pytest.mark.parametrize(
    ("changed", "said"),
    [({"</audio>": VOCABULARY}, f"beyond the {VOCABULARY}"), ({"<1_0>": 9}, "two codes the same token")],
    ids=["the-end-is-beyond", "two-codes-one-token"],
)
def test_ids_that_the_decoder_cannot_tell_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, int], said: str
) -> None:
    """Pins a read past the embedding when speech ends, and two codes that the model hears as one."""
    names = [unit_name(code, book) for book in range(BOOKS) for code in range(SIZE)]
    vocabulary = {"<audio>": 1, "</audio>": 2} | {name: number for number, name in enumerate(names, 9)}
    monkeypatch.setattr(token_layout, "_read", lambda _: (vocabulary, (0, 1)))
    assert TokenLayout.load(tmp_path, BOOKS, SIZE, VOCABULARY).end == 2
    vocabulary |= changed
    with pytest.raises(TokenLayoutError, match=said):
        TokenLayout.load(tmp_path, BOOKS, SIZE, VOCABULARY)


def test_a_prompt_that_does_not_end_in_audio_is_refused(tmp_path: Path) -> None:
    """Pins a tokenizer that closes every text with `<eos>`: the model would speak after its own end."""
    write_tokenizer(tmp_path, BOOKS)
    processor = json.loads((tmp_path / "tokenizer.json").read_text())["post_processor"]
    processor["single"].append(processor["single"][0])
    edit(tmp_path, post_processor=processor)
    with pytest.raises(TokenLayoutError, match="of <audio>: it must end in its one token"):
        TokenLayout.load(tmp_path, BOOKS, SIZE, VOCABULARY)


def test_a_prompt_that_begins_twice_is_refused(tmp_path: Path) -> None:
    """Pins a template that says everything twice: every session would begin with `<audio><audio>`, which the model has
    never seen.
    """
    write_tokenizer(tmp_path, BOOKS)
    processor = json.loads((tmp_path / "tokenizer.json").read_text())["post_processor"]
    processor["single"].append(processor["single"][-1])
    edit(tmp_path, post_processor=processor)
    with pytest.raises(TokenLayoutError, match="of <audio>: it must end in its one token"):
        TokenLayout.load(tmp_path, BOOKS, SIZE, VOCABULARY)


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"version": "1.0", "model": {"type": "none"}}'])
def test_damaged_tokenizer_files_are_a_layout_error(tmp_path: Path, content: str | None) -> None:
    """Pins whatever the tokenizer library raises on a damaged download, shown as a traceback."""
    write_tokenizer(tmp_path, BOOKS)
    path = tmp_path / "tokenizer.json"
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    with pytest.raises(TokenLayoutError) as caught:
        TokenLayout.load(tmp_path, BOOKS, SIZE, VOCABULARY)
    assert str(tmp_path) in str(caught.value)
    assert isinstance(caught.value, CheckpointError)
