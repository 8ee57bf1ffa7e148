"""A small untrained checkpoint, in the released models' own file layout, made on the spot: the same one everywhere.

It lets every stage run without a download. What it says is noise, and the banner says so.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from streaming.demo.files import BOS, EOS, write_checkpoint, write_tokenizer
from streaming.models.token_layout import END_OF_AUDIO

NOTICE = "the demo model is untrained: every stage is real, but what it says is noise"

_VERSION = 2  # raise it with every change to what is written
_SEED = 20260914

_CODEC: dict[str, Any] = {
    "architectures": ["MimiModel"],
    "model_type": "mimi",
    "sampling_rate": 24000,
    "audio_channels": 1,
    "frame_rate": 12.5,
    "num_filters": 16,
    "hidden_size": 128,
    "upsampling_ratios": [8, 6, 5, 4],
    "num_residual_layers": 1,
    "kernel_size": 7,
    "last_kernel_size": 3,
    "residual_kernel_size": 3,
    "dilation_growth_rate": 2,
    "compress": 2,
    "use_causal_conv": True,
    "pad_mode": "constant",
    "trim_right_ratio": 1.0,
    "use_conv_shortcut": False,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "intermediate_size": 256,
    "hidden_act": "gelu",
    "norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "sliding_window": 250,
    "max_position_embeddings": 8000,
    "layer_scale_initial_scale": 0.01,
    "attention_bias": False,
    "codebook_size": 2048,
    "codebook_dim": 64,
    "vector_quantization_hidden_dimension": 64,
    "num_quantizers": 8,
    "num_semantic_quantizers": 1,
    "upsample_groups": 128,
    "torch_dtype": "float32",
}

_DECODER: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 512,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "attention_bias": False,
    "mlp_bias": False,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": True,
    "num_quantizers": 4,
    "torch_dtype": "float32",
}


def demo_checkpoint() -> tuple[Path, Path]:
    """Folders of the demo decoder and the demo codec, made on first use in the user's cache folder.

    Any number of processes may ask at once; a folder that cannot be written to is replaced by a temporary one.
    """
    root = (
        Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        / "streaming-continuation"
        / f"untrained-{_VERSION}"
    )
    if not (root / "complete").is_file():
        try:
            root.parent.mkdir(parents=True, exist_ok=True)
            made = Path(tempfile.mkdtemp(dir=root.parent))
        except OSError:
            made = Path(tempfile.mkdtemp(prefix="streaming-continuation-"))
            root = made / "untrained"
            made = Path(tempfile.mkdtemp(dir=made))
        write(made)
        try:
            made.rename(root)
        except OSError:  # another process was first, or a torn folder is in the way
            if not (root / "complete").is_file():
                shutil.rmtree(root)
                made.rename(root)
            else:
                shutil.rmtree(made)
    return root / "decoder", root / "codec"


def write(folder: Path) -> None:
    """Writes `folder/decoder` and `folder/codec`, the same bytes every time."""
    (folder / "decoder").mkdir(parents=True)
    (folder / "codec").mkdir()
    generator = torch.Generator().manual_seed(_SEED)
    write_checkpoint(folder / "codec", _CODEC, _codec_tensors(generator))
    tokenizer = write_tokenizer(folder / "decoder", _DECODER["num_quantizers"], _CODEC["codebook_size"])
    ids = {"bos_token_id": tokenizer.token_to_id(BOS), "eos_token_id": tokenizer.token_to_id(EOS)}
    config = _DECODER | ids | {"vocab_size": tokenizer.get_vocab_size()}
    end = tokenizer.get_vocab()[END_OF_AUDIO]
    write_checkpoint(folder / "decoder", config, _decoder_tensors(config, end, generator))
    (folder / "complete").touch()


def _codec_tensors(generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Tensors under the names and shapes of `MimiModel` on disk, scaled so that levels stay those of speech
    throughout.
    """
    config = _CODEC
    tensors: dict[str, torch.Tensor] = {}

    def normal(name: str, shape: tuple[int, ...], fan_in: int, gain: float = 1.0) -> None:
        tensors[name] = torch.randn(shape, generator=generator) * (gain / math.sqrt(fan_in))

    def conv(name: str, out: int, channels: int, kernel: int, gain: float = 1.4) -> None:
        normal(f"{name}.conv.weight", (out, channels, kernel), channels * kernel, gain)
        tensors[f"{name}.conv.bias"] = torch.zeros(out)

    def block(name: str, channels: int) -> None:
        conv(f"{name}.block.1", channels // 2, channels, config["residual_kernel_size"])
        conv(f"{name}.block.3", channels, channels // 2, 1, 0.5)

    hidden, width = config["hidden_size"], config["num_filters"]
    conv("encoder.layers.0", width, 1, config["kernel_size"])
    index = 1
    for ratio in reversed(config["upsampling_ratios"]):
        block(f"encoder.layers.{index}", width)
        conv(f"encoder.layers.{index + 2}", 2 * width, width, 2 * ratio)
        index, width = index + 3, 2 * width
    conv(f"encoder.layers.{index + 1}", hidden, width, config["last_kernel_size"])
    normal("downsample.conv.weight", (hidden, hidden, 4), 4 * hidden)

    for side in ("encoder", "decoder"):
        for layer in range(config["num_hidden_layers"]):
            name = f"{side}_transformer.layers.{layer}"
            for part in "qkvo":
                normal(f"{name}.self_attn.{part}_proj.weight", (hidden, hidden), hidden)
            normal(f"{name}.mlp.fc1.weight", (config["intermediate_size"], hidden), hidden)
            normal(f"{name}.mlp.fc2.weight", (hidden, config["intermediate_size"]), config["intermediate_size"])
            for norm in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"{name}.{norm}.weight"] = torch.ones(hidden)
                tensors[f"{name}.{norm}.bias"] = torch.zeros(hidden)
            for scale in ("self_attn_layer_scale", "mlp_layer_scale"):
                tensors[f"{name}.{scale}.scale"] = torch.full((hidden,), config["layer_scale_initial_scale"])

    size, dim = config["codebook_size"], config["codebook_dim"]
    counts = {"semantic": 1, "acoustic": config["num_quantizers"] - 1}
    for part, count in counts.items():
        name = f"quantizer.{part}_residual_vector_quantizer"
        normal(f"{name}.input_proj.weight", (dim, hidden, 1), hidden)
        normal(f"{name}.output_proj.weight", (hidden, dim, 1), dim)
        for book in range(count):
            codebook = f"{name}.layers.{book}.codebook"
            tensors[f"{codebook}.embed_sum"] = torch.randn((size, dim), generator=generator) * _LATENT_STD * 0.7**book
            tensors[f"{codebook}.cluster_usage"] = torch.ones(size)
            tensors[f"{codebook}.initialized"] = torch.ones(1)

    taps = torch.zeros(hidden, 1, 4)  # holds each 12.5 Hz latent for two 25 Hz steps
    taps[:, :, :2] = 1.0
    tensors["upsample.conv.weight"] = taps
    width = config["num_filters"] << len(config["upsampling_ratios"])
    conv("decoder.layers.0", width, hidden, config["kernel_size"])
    index = 1
    for ratio in config["upsampling_ratios"]:
        name = f"decoder.layers.{index + 1}"
        normal(f"{name}.conv.weight", (width, width // 2, 2 * ratio), 2 * width, 1.4)
        tensors[f"{name}.conv.bias"] = torch.zeros(width // 2)
        block(f"decoder.layers.{index + 2}", width // 2)
        index, width = index + 3, width // 2
    conv(f"decoder.layers.{index + 1}", 1, width, config["last_kernel_size"], _OUTPUT_GAIN)
    last = tensors[f"decoder.layers.{index + 1}.conv.weight"]
    last -= last.mean(dim=2, keepdim=True)  # no constant offset, which would thump at both ends
    return tensors


_LATENT_STD = 0.4
"""Spread of the random encoder's latents on speech, so that its codebooks are used."""
_OUTPUT_GAIN = 0.05


def _decoder_tensors(config: dict[str, Any], end: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    dim = config["head_dim"]
    heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"], "v": config["num_key_value_heads"]}

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) / math.sqrt(shape[-1])

    embedding = normal(vocab, hidden) * 1.5
    embedding[end] = 0.0  # never among the likeliest: an untrained model has no idea when to stop
    tensors = {"model.embed_tokens.weight": embedding, "model.norm.weight": torch.ones(hidden)}
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        for part, count in heads.items():
            tensors[f"{name}.self_attn.{part}_proj.weight"] = normal(count * dim, hidden)
        tensors[f"{name}.self_attn.o_proj.weight"] = normal(hidden, heads["q"] * dim)
        tensors[f"{name}.mlp.gate_proj.weight"] = normal(inner, hidden)
        tensors[f"{name}.mlp.up_proj.weight"] = normal(inner, hidden)
        tensors[f"{name}.mlp.down_proj.weight"] = normal(hidden, inner)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{name}.{norm}.weight"] = torch.ones(hidden)
    return tensors
