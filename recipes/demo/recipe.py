"""The demo model's sizes, and why; where the recipe keeps its files.

Six codebooks of 1,024: a frame is 60 bits. With the true phases, quantising the envelope alone leaves STOI 0.93 with
three acoustic codebooks, 0.954 with five and 0.967 with seven, and every codebook costs the decoder a sub-step a frame.
Two of them are semantic and quantise pitch, voicing and level, four quantise the shape of the spectrum: the envelope's
error is that of one and five (23.6 against 24.2 a frame), but one codebook for pitch and voicing alone used 8 % of its
codes, and every one of these 40 % or more.
The transformers' window is 1.3 s, because training clips are 1.9 s: none sees more keys than it was trained with.
The language model's four query heads share one key head: attention over four full contexts took 23 of 59 ms of a step,
most of it reading keys, and a third of that remains.
Ratios 4, 5, 6, 8 instead of Mimi's 8, 6, 5, 4 halve the cost of training and lose no parameters; `compress` 1 keeps the
residual blocks' inner channels at whole vectors.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

HIDDEN = 256
CODEBOOK_DIM = 48

CODEC: dict[str, Any] = {
    "architectures": ["MimiModel"],
    "model_type": "mimi",
    "sampling_rate": 24000,
    "audio_channels": 1,
    "frame_rate": 12.5,
    "num_filters": 16,
    "hidden_size": HIDDEN,
    "upsampling_ratios": [4, 5, 6, 8],
    "num_residual_layers": 1,
    "kernel_size": 7,
    "last_kernel_size": 7,
    "residual_kernel_size": 3,
    "dilation_growth_rate": 2,
    "compress": 1,
    "use_causal_conv": True,
    "pad_mode": "constant",
    "trim_right_ratio": 1.0,
    "use_conv_shortcut": False,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "intermediate_size": 512,
    "hidden_act": "gelu",
    "norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "sliding_window": 32,
    "max_position_embeddings": 8000,
    "layer_scale_initial_scale": 0.1,
    "attention_bias": False,
    "codebook_size": 1024,
    "codebook_dim": CODEBOOK_DIM,
    "vector_quantization_hidden_dimension": CODEBOOK_DIM,
    "num_quantizers": 6,
    "num_semantic_quantizers": 2,
    "upsample_groups": HIDDEN,
    "torch_dtype": "float32",
}

CONTEXT_FRAMES = 170
"""What the language model is trained on: 13.6 s, 1,022 tokens, the server's default."""

DECODER: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "intermediate_size": 704,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "attention_bias": False,
    "mlp_bias": False,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "num_quantizers": CODEC["num_quantizers"],
    "torch_dtype": "float32",
}


CPU = torch.device("cpu")


@dataclass(frozen=True)
class Run:
    """Where a stage runs, on what, for how long. root: the folder of all; batch: crops a step, 0 for the stage's own;
    minutes: by the clock; rate: of learning, times the stage's own, for a cool-down.
    """

    root: Path
    device: torch.device = CPU
    batch: int = 0
    minutes: float = 600.0
    seed: int = 1
    rate: float = 1.0

    @property
    def corpus(self) -> Path:
        """What the voices read, in FLAC."""
        return self.root / "corpus"

    @property
    def cache(self) -> Path:
        """The corpus decoded."""
        return self.root / "cache"

    @property
    def stages(self) -> Path:
        """What the stages make: checkpoints and logs."""
        return self.root / "stages"


def root() -> Path:
    """Where the corpus, caches, checkpoints and logs are: `STREAMING_DEMO_ROOT`, or a folder in the user's cache."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "streaming-continuation" / "training"
    return Path(os.environ.get("STREAMING_DEMO_ROOT") or default)
