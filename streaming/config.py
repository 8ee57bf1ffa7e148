"""Frozen configurations: what a checkpoint says about itself, and how an engine is asked to run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from streaming.errors import CheckpointError

if TYPE_CHECKING:  # flags are read without it
    import numpy as np
    from numpy.typing import NDArray

DEMO = "demo"
"""The model that comes with the package."""
CONTEXT_TOKENS = 1024
"""The context that the released models were trained on: 20.4 s of Q = 4."""
DTYPES = ("float32", "bfloat16")
"""The types that a model computes in, by name."""
OVERLOAD = 0.8
"""Steps that take this share of a frame's 80 ms leave no room for another session: the rest is for sockets, and for
other programs.
"""

# Above these a config is damaged or hostile: refuse it before it asks for memory.
_MAX_HIDDEN = 16_384
_MAX_LAYERS = 256
_MAX_VOCABULARY = 1_000_000
_MAX_PARAMETERS = 200_000_000_000
_MAX_REACH = 1 << 16  # samples that a convolution looks back


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding (arXiv 2104.09864), with Llama 3's frequency scaling where `factor` is not 1.

    Source of the scaling: `transformers.modeling_rope_utils._compute_llama3_parameters`.
    """

    theta: float
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192


@dataclass(frozen=True)
class MimiConfig:
    """Shape of a Mimi codec, from its `config.json` (`transformers.MimiConfig`)."""

    num_filters: int
    hidden_size: int
    upsampling_ratios: tuple[int, ...]
    num_residual_layers: int
    kernel_size: int
    last_kernel_size: int
    residual_kernel_size: int
    dilation_growth_rate: int
    compress: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    norm_eps: float
    window: int
    rope: Rope
    codebook_size: int
    codebook_dim: int
    num_codebooks: int
    num_semantic: int

    @staticmethod
    def from_dict(raw: Mapping[str, Any]) -> MimiConfig:
        """Read a `config.json`. Raises `CheckpointError` for another model, or one that cannot be streamed."""
        if raw.get("model_type") != "mimi":
            raise CheckpointError(f"not a Mimi codec: config.json says model_type {raw.get('model_type')!r}")
        expected = {
            "sampling_rate": (24_000,),
            "audio_channels": (1,),
            "use_causal_conv": (True,),
            "pad_mode": ("constant",),
            "trim_right_ratio": (1.0,),
            "use_conv_shortcut": (False,),
            "hidden_act": ("gelu",),
            "attention_bias": (False,),
        }
        for key, allowed in expected.items():
            if raw.get(key, allowed[0]) not in allowed:
                raise CheckpointError(f"cannot stream this codec: {key} is {raw[key]!r}, must be {allowed[0]!r}")
        hidden, heads, kv_heads, head_dim = _attention(raw, 512, 8, 8)
        config = MimiConfig(
            num_filters=_size(raw, "num_filters", 64),
            hidden_size=hidden,
            upsampling_ratios=_ratios(raw),
            num_residual_layers=_size(raw, "num_residual_layers", 1, 16),
            kernel_size=_size(raw, "kernel_size", 7),
            last_kernel_size=_size(raw, "last_kernel_size", 3),
            residual_kernel_size=_size(raw, "residual_kernel_size", 3),
            dilation_growth_rate=_size(raw, "dilation_growth_rate", 2),
            compress=_size(raw, "compress", 2),
            num_layers=_size(raw, "num_hidden_layers", 8, _MAX_LAYERS),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            intermediate_size=_size(raw, "intermediate_size", 2048, 4 * _MAX_HIDDEN),
            norm_eps=_number(raw, "norm_eps", 1e-5),
            window=_size(raw, "sliding_window", 250),
            rope=_rope(raw),
            codebook_size=_size(raw, "codebook_size", 2048, 65_536),
            codebook_dim=_size(raw, "codebook_dim", 256),
            num_codebooks=_size(raw, "num_quantizers", 32, 64),
            num_semantic=_size(raw, "num_semantic_quantizers", 1, 64),
        )
        samples = 2
        for ratio in config.upsampling_ratios:
            samples *= ratio
        if samples != 1920:
            raise CheckpointError(f"a frame of this codec is {samples} samples long; only 1920 (80 ms) is supported")
        reach = config.residual_kernel_size * config.dilation_growth_rate ** (config.num_residual_layers - 1)
        if reach > _MAX_REACH:
            raise CheckpointError(
                f"config.json: its residual layers look back {reach} samples; {_MAX_REACH} are the most"
            )
        _check_parameters(
            2 * transformer_parameters(config) + config.num_codebooks * config.codebook_size * config.codebook_dim
        )
        groups = raw.get("upsample_groups", 512)
        if groups != hidden:
            raise CheckpointError(f"config.json: upsample_groups {groups!r} is not hidden_size {hidden}")
        return config


@dataclass(frozen=True)
class LlamaConfig:
    """Shape of a Llama-Mimi decoder, from its `config.json` (`transformers.LlamaConfig` plus `num_quantizers`)."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    norm_eps: float
    rope: Rope
    tied: bool
    vocab_size: int
    num_codebooks: int

    @staticmethod
    def from_dict(raw: Mapping[str, Any]) -> LlamaConfig:
        """Read a `config.json`. Raises `CheckpointError` for another architecture."""
        if raw.get("model_type") != "llama":
            raise CheckpointError(f"not a Llama decoder: config.json says model_type {raw.get('model_type')!r}")
        if "num_quantizers" not in raw:
            raise CheckpointError("not a Llama-Mimi decoder: config.json has no num_quantizers")
        for key, allowed in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False)):
            if raw.get(key, allowed) != allowed:
                raise CheckpointError(f"unsupported Llama variant: {key} is {raw[key]!r}, must be {allowed!r}")
        hidden, heads, kv_heads, head_dim = _attention(raw)
        config = LlamaConfig(
            hidden_size=hidden,
            num_layers=_size(raw, "num_hidden_layers", None, _MAX_LAYERS),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            intermediate_size=_size(raw, "intermediate_size", None, 8 * _MAX_HIDDEN),
            norm_eps=_number(raw, "rms_norm_eps", 1e-6),
            rope=_rope(raw),
            tied=bool(raw.get("tie_word_embeddings", False)),
            vocab_size=_size(raw, "vocab_size", None, _MAX_VOCABULARY),
            num_codebooks=_size(raw, "num_quantizers", None, 64),
        )
        _check_parameters(transformer_parameters(config) + 2 * config.vocab_size * hidden)
        return config


def transformer_parameters(config: MimiConfig | LlamaConfig) -> int:
    """Return how many weights the matrices of its layers have."""
    attention = 2 * (config.num_heads + config.num_kv_heads) * config.head_dim
    return config.num_layers * config.hidden_size * (attention + 3 * config.intermediate_size)


def _check_parameters(number: int) -> None:
    if number > _MAX_PARAMETERS:
        raise CheckpointError(f"config.json: a model of {number:.1e} parameters; {_MAX_PARAMETERS:.0e} are the most")


def _size(raw: Mapping[str, Any], key: str, default: int | None = None, most: int = _MAX_HIDDEN) -> int:
    value = raw.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise CheckpointError(f"config.json: {key} is {value!r}, must be a whole number from 1 to {most}")
    return value


def _number(raw: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = raw.get(key)
    value = default if value is None else value
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise CheckpointError(f"config.json: {key} is {value!r}, must be a number above 0")
    return float(value)


def _attention(
    raw: Mapping[str, Any], hidden: int | None = None, heads: int | None = None, kv_heads: int | None = None
) -> tuple[int, int, int, int]:
    """Return hidden size, heads, key-value heads and head size. The arguments are the defaults, if there are any."""
    hidden, heads = _size(raw, "hidden_size", hidden), _size(raw, "num_attention_heads", heads)
    kv_heads = _size(raw, "num_key_value_heads", kv_heads or heads)
    if heads % kv_heads:
        raise CheckpointError(f"config.json: {heads} attention heads do not divide into {kv_heads} key-value heads")
    head_dim = _size(raw, "head_dim", hidden // heads)
    if head_dim % 2:
        raise CheckpointError(f"config.json: head_dim is {head_dim}, must be even to be rotated")
    return hidden, heads, kv_heads, head_dim


def _ratios(raw: Mapping[str, Any]) -> tuple[int, ...]:
    ratios = raw.get("upsampling_ratios") or (8, 6, 5, 4)
    if not isinstance(ratios, list | tuple) or not all(type(ratio) is int and 1 <= ratio <= 960 for ratio in ratios):
        raise CheckpointError(f"config.json: upsampling_ratios is {ratios!r}, must be a list of whole numbers")
    return tuple(ratios)


def _rope(raw: Mapping[str, Any]) -> Rope:
    """Read both spellings: `rope_theta` and `rope_scaling` (transformers 4), `rope_parameters` (5)."""
    scaling = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        raise CheckpointError(f"config.json: rope_scaling is {scaling!r}, must be an object")
    theta = _number(scaling if "rope_theta" in scaling else raw, "rope_theta", 10_000.0)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return Rope(theta)
    if kind != "llama3":
        raise CheckpointError(f"rope_type {kind!r} is not supported: only 'default' and 'llama3' are")
    return Rope(
        theta,
        factor=_number(scaling, "factor"),
        low_freq_factor=_number(scaling, "low_freq_factor"),
        high_freq_factor=_number(scaling, "high_freq_factor"),
        original_context=int(_number(scaling, "original_max_position_embeddings")),
    )


@dataclass(frozen=True)
class ModelVoices:
    """The voices in which a model goes on, where it has some of its own.

    In the first frame of a continuation, the code of `codebook` says which one speaks. names: by that code.
    """

    codebook: int
    names: Mapping[int, str]

    def of(self, codes: NDArray[np.int64]) -> str | None:
        """Return the name of the voice that begins with these codes [Q], None for none of them."""
        return self.names.get(int(codes[self.codebook]))


@dataclass(frozen=True)
class Sampling:
    """Options of how a session draws its tokens.

    temperature: 0 is greedy. top_k: 0 is off. top_p: 1 is off. The defaults are the published script's, for a
    checkpoint that adds nothing to them; see `Sampling.published`.
    seed: 0 to 2**63 - 1; the same seed and prompt give the same continuation, whatever other sessions do.
    """

    temperature: float = 0.8
    top_k: int = 30
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 10:
            raise ValueError(f"temperature is {self.temperature}, must be from 0 to 10")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}, must be 0 (off) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}, must be above 0 and at most 1")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}, must be from 0 to 2**63 - 1")

    @staticmethod
    def published(raw: Mapping[str, Any]) -> Sampling:
        """Return the options with which the published script draws. The script names the temperature and top-k.

        raw: the checkpoint's `generation_config.json`, from which `generate` takes what the script leaves open.
        Raises `CheckpointError` for a top-p that is none.
        """
        top_p = raw.get("top_p")
        top_p = 1.0 if top_p is None else top_p
        if not isinstance(top_p, int | float) or isinstance(top_p, bool) or not top_p >= 0:
            raise CheckpointError(f"generation_config.json: top_p is {top_p!r}, must be a number above 0 and at most 1")
        # `generate` has no filter from 1 on, and keeps the likeliest token in any case
        return Sampling(top_p=min(max(float(top_p), 1e-9), 1.0))


_NEUTRAL: dict[str, tuple[object, ...]] = {
    "min_p": (0,),
    "typical_p": (1,),
    "top_h": (),
    "epsilon_cutoff": (0, 1),
    "eta_cutoff": (0, 1),
    "repetition_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "sequence_bias": (),
    "bad_words_ids": (),
    "suppress_tokens": (),
    "begin_suppress_tokens": (),
    "exponential_decay_length_penalty": (),
    "num_beams": (1,),
}
"""Other changes that `generate` makes to the logits if a `generation_config.json` asks for them, with values that do
nothing.
"""


def not_followed(raw: Mapping[str, Any]) -> list[str]:
    """Return what a `generation_config.json` asks for that the sampler does not have."""
    return [name for name, neutral in _NEUTRAL.items() if raw.get(name) is not None and raw[name] not in neutral]
