"""llama.cpp as a baseline: it must run the same decoder, or its time says nothing."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from streaming.benchmark import llama_cpp
from streaming.models.checkpoint import TensorSource
from streaming.models.llama import LlamaDecoder
from streaming.models.token_layout import TokenLayout
from tests.reference import load_decoder

pytestmark = pytest.mark.skipif(not llama_cpp.installed(), reason="no llama-cpp-python and gguf here")


def _written(folder: Path, decoder: LlamaDecoder, path: Path) -> Path:
    layout = TokenLayout.load(folder, decoder.num_codebooks, decoder.codebook_size, decoder.config.vocab_size)
    source = TensorSource(folder, decoder.device, torch.float32)
    llama_cpp.write_gguf(source, decoder.config, layout, path, wide=True)
    return path


@torch.inference_mode()
def test_it_says_what_our_decoder_says(decoder_dir: Path, tmp_path: Path) -> None:
    """Pins angles of neighbours for halves, scaled frequencies left out, codes in another order."""
    decoder = load_decoder(decoder_dir)
    books, size = decoder.num_codebooks, decoder.codebook_size
    codes = torch.randint(0, size, (5, books))
    state = decoder.init_state(1, 8)
    with closing(llama_cpp.LlamaCpp(_written(decoder_dir, decoder, tmp_path / "wide.gguf"), 64)) as theirs:
        theirs.reset()
        logits = theirs.feed([books * size + token for token in range(decoder.prefix)]).copy()
        slots, last = state.every_slot, books * size
        for frame in codes:
            view = decoder.begin_frame(state, slots, 8, decoder.columns_for(state, 5))
            for book in range(books):
                hidden = decoder.forward(torch.tensor([[last]]), state, view.columns(book, book + 1))
                ours = decoder.logits(hidden[:, 0], book)[0, :size].numpy()
                np.testing.assert_allclose(logits[book * size : (book + 1) * size], ours, rtol=0.01, atol=0.01)
                last = book * size + int(frame[book])
                logits = theirs.feed([last]).copy()
            decoder.end_frame(frame[None], state, slots, torch.ones(1, dtype=torch.bool))


def test_four_bits_speak(decoder_dir: Path, tmp_path: Path) -> None:
    """Pins a stream longer than its context, and codes beyond their codebook."""
    decoder = load_decoder(decoder_dir)
    size = decoder.codebook_size
    llama_cpp.to_q4_0(_written(decoder_dir, decoder, tmp_path / "wide.gguf"), tmp_path / "four.gguf")
    books = [range(book * size, (book + 1) * size) for book in range(decoder.num_codebooks)]
    with closing(llama_cpp.LlamaCpp(tmp_path / "four.gguf", 4 * 7)) as theirs:
        theirs.speak([0, size], books, 6)
        theirs.speak([0, size], books, 6)
