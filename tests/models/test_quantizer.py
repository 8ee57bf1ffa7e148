"""The split quantizer against `transformers`' own, on latents instead of audio."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MimiModel

from tests.reference import load_codec


@pytest.mark.twice
@pytest.mark.parametrize("num_semantic", [1, 3])
def test_codes_and_latents_equal_transformers(codec_checkpoint: Callable[..., Path], num_semantic: int) -> None:
    """Pins the two parts quantising the same residual, one part's codes decoded by the other's table, and distances
    that lost the code's own norm.
    """
    folder = codec_checkpoint(num_semantic_quantizers=num_semantic)
    theirs = MimiModel.from_pretrained(folder).quantizer
    ours = load_codec(folder, 8).quantizer
    latents = 3 * torch.randn(500, 32)
    with torch.inference_mode():
        codes = theirs.encode(latents.T[None], 8)[:, 0].T
        assert all(len(column.unique()) > 30 for column in codes.T)
        assert torch.equal(ours.encode(latents), codes)
        wanted = theirs.decode(codes.T[None])[0].T
    torch.testing.assert_close(ours.decode(codes), wanted, rtol=1e-4, atol=1e-4)


def test_a_code_that_training_never_used_divides_by_no_zero(codec_dir: Path, tmp_path: Path) -> None:
    """Pins NaN in a codebook whose cluster_usage is zero: released checkpoints have such codes."""
    tensors = load_file(codec_dir / "model.safetensors")
    book = "quantizer.semantic_residual_vector_quantizer.layers.0.codebook"
    tensors[f"{book}.cluster_usage"][5] = 0.0
    tensors[f"{book}.embed_sum"][5] = 0.0
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((codec_dir / "config.json").read_bytes())
    ours = load_codec(tmp_path, 4).quantizer
    assert ours.codebooks.isfinite().all()
    assert not ours.codebooks[0, 5].any()
    assert torch.equal(ours.encode(torch.zeros(1, 32))[:, 0], torch.tensor([5]))
