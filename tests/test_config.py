"""Configs: both spellings of the hub's, refusals of what cannot be streamed or is damaged, and sampling options."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from streaming.config import LlamaConfig, MimiConfig, Rope, Sampling
from streaming.errors import CheckpointError

MIMI: dict[str, Any] = {"model_type": "mimi"}
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 8192,
    "vocab_size": 136_458,
    "num_quantizers": 4,
    "rope_theta": 500_000.0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_an_empty_mimi_config_is_the_released_codec() -> None:
    """Pins defaults that differ from `transformers`', which leaves out of config.json what equals its own."""
    theirs = transformers.MimiConfig()
    ours = MimiConfig.from_dict(MIMI)
    assert ours == MimiConfig.from_dict(theirs.to_dict())
    assert (ours.window, ours.num_codebooks, ours.head_dim, ours.rope.theta) == (250, 32, 64, 10_000.0)


def test_llama_config_is_read() -> None:
    """Pins a head size or a key-value head count left at another model's."""
    ours = LlamaConfig.from_dict(LLAMA | {"tie_word_embeddings": True, "rms_norm_eps": 1e-5})
    assert (ours.head_dim, ours.num_kv_heads, ours.tied, ours.norm_eps) == (64, 8, True, 1e-5)
    without = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
    assert LlamaConfig.from_dict(without).num_kv_heads == 32
    assert LlamaConfig.from_dict(LLAMA | {"head_dim": 128}).head_dim == 128
    assert LlamaConfig.from_dict(LLAMA | {"head_dim": None}).head_dim == 64


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 500_000.0, "rope_scaling": LLAMA3},
        {"rope_theta": 500_000.0, "rope_scaling": LLAMA3 | {"type": "llama3"}},
        {"rope_theta": None, "rope_parameters": LLAMA3 | {"rope_theta": 500_000.0}},
        {"rope_theta": 1.0, "rope_parameters": LLAMA3 | {"rope_theta": 500_000.0}},
    ],
)
def test_both_spellings_of_rope_are_understood(spelling: dict[str, Any]) -> None:
    """Pins a checkpoint saved by another version of `transformers`, loaded with the wrong angles in silence."""
    wanted = Rope(500_000.0, 32.0, 1.0, 4.0, 8192)
    assert LlamaConfig.from_dict(LLAMA | spelling).rope == wanted


@pytest.mark.parametrize("none", [{}, {"rope_scaling": None}, {"rope_parameters": {"rope_type": "default"}}])
def test_unscaled_rope_is_understood(none: dict[str, Any]) -> None:
    """Pins `null` for a scaling that is not there."""
    assert LlamaConfig.from_dict(LLAMA | none).rope == Rope(500_000.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "encodec"}, "not a Mimi codec: .*'encodec'"),
        ({"model_type": None}, "not a Mimi codec"),
        ({"sampling_rate": 16_000}, "sampling_rate is 16000, must be 24000"),
        ({"audio_channels": 2}, "audio_channels"),
        ({"use_causal_conv": False}, "use_causal_conv"),
        ({"pad_mode": "reflect"}, "pad_mode"),
        ({"trim_right_ratio": 0.5}, "trim_right_ratio"),
        ({"use_conv_shortcut": True}, "use_conv_shortcut"),
        ({"hidden_act": "relu"}, "hidden_act"),
        ({"attention_bias": True}, "attention_bias"),
        ({"upsampling_ratios": [8, 5, 4, 2]}, "640 samples long; only 1920"),
        ({"upsample_groups": 1}, "upsample_groups 1 is not hidden_size 512"),
        ({"hidden_size": 256}, "upsample_groups 512 is not hidden_size 256"),
        ({"hidden_size": 0}, "hidden_size is 0, must be a whole number from 1"),
        ({"hidden_size": 10**9}, "hidden_size is 1000000000"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
        ({"num_hidden_layers": 100_000}, "num_hidden_layers is 100000"),
        ({"num_filters": 64.0}, "num_filters is 64.0"),
        ({"num_filters": "64"}, "num_filters is '64'"),
        ({"codebook_size": True}, "codebook_size is True"),
        ({"sliding_window": 10**12}, "sliding_window"),
        ({"num_residual_layers": 17}, "num_residual_layers is 17"),
        ({"num_residual_layers": 16, "dilation_growth_rate": 3}, "look back 43046721 samples"),
        (
            {"num_hidden_layers": 256, "hidden_size": 16_384, "upsample_groups": 16_384, "head_dim": 16_384},
            "parameters",
        ),
        ({"num_quantizers": 4096}, "num_quantizers"),
        ({"norm_eps": "small"}, "norm_eps"),
        ({"upsampling_ratios": ["8", "6", "5", "4"]}, "upsampling_ratios"),
        ({"upsampling_ratios": 960}, "upsampling_ratios"),
        ({"upsampling_ratios": [-8, -6, 5, 4]}, "upsampling_ratios"),
        ({"num_key_value_heads": 3}, "8 attention heads do not divide into 3"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type 'yarn' is not supported"),
    ],
    ids=str,
)
def test_a_codec_that_cannot_be_streamed_is_refused(change: dict[str, Any], message: str) -> None:
    """Pins another model loaded in silence, and a damaged config that asks for all memory or raises untyped."""
    with pytest.raises(CheckpointError, match=message):
        MimiConfig.from_dict(MIMI | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "qwen3"}, "not a Llama decoder: .*'qwen3'"),
        ({"num_quantizers": None}, "num_quantizers is None"),
        ({"num_quantizers": 65}, "num_quantizers is 65"),
        ({"hidden_act": "gelu"}, "unsupported Llama variant: hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_size": None}, "hidden_size is None"),
        ({"hidden_size": 2**40}, "hidden_size"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers"),
        ({"vocab_size": 10**9}, "vocab_size"),
        ({"hidden_size": 16_384, "num_hidden_layers": 256, "intermediate_size": 131_072}, "parameters"),
        ({"intermediate_size": 0}, "intermediate_size"),
        ({"num_key_value_heads": 7}, "32 attention heads do not divide into 7"),
        ({"num_attention_heads": 4096, "num_key_value_heads": 1}, "head_dim"),
        ({"head_dim": 63}, "head_dim"),
        ({"rope_theta": "many"}, "rope_theta"),
        ({"rms_norm_eps": []}, "rms_norm_eps"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_type 'linear' is not supported"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "factor"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": None}}, "low_freq_factor"),
        ({"rope_scaling": LLAMA3 | {"factor": 0}}, "factor"),
        ({"rope_scaling": "llama3"}, "rope"),
    ],
    ids=str,
)
def test_a_decoder_that_cannot_be_used_is_refused(change: dict[str, Any], message: str) -> None:
    """Pins another architecture loaded in silence, and a damaged config that asks for all memory or raises untyped."""
    with pytest.raises(CheckpointError, match=message):
        LlamaConfig.from_dict(LLAMA | change)


def test_a_llama_that_does_not_speak_is_refused() -> None:
    """Pins an ordinary text model taken for a speech model."""
    plain = {key: value for key, value in LLAMA.items() if key != "num_quantizers"}
    with pytest.raises(CheckpointError, match="not a Llama-Mimi decoder"):
        LlamaConfig.from_dict(plain)


def test_sampling_defaults_are_the_published_ones() -> None:
    """Pins defaults that drift from the published script's: temperature 0.8, top-k 30."""
    assert dataclasses.astuple(Sampling()) == (0.8, 30, 1.0, 0)
    Sampling(0, 0, 1e-9, 2**63 - 1)
    Sampling(10, 10**9, 1.0)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 10.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_p": float("nan")}, "top_p"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
    ],
    ids=str,
)
def test_sampling_that_makes_no_sense_is_refused(options: dict[str, Any], name: str) -> None:
    """Pins a NaN temperature, which would poison every draw, and a seed that overflows its tensor."""
    with pytest.raises(ValueError, match=name):
        Sampling(**options)


def test_configs_are_frozen() -> None:
    """Pins a config changed under a model that was built from it."""
    for value in (Sampling(), MimiConfig.from_dict(MIMI), LlamaConfig.from_dict(LLAMA)):
        with pytest.raises(dataclasses.FrozenInstanceError):
            value.seed = 1  # type: ignore[misc, union-attr]


SIZES = st.one_of(
    st.integers(-2, 40),
    st.sampled_from([2**k for k in range(5, 80, 3)]),
    st.floats(),
    st.sampled_from([None, True, "", "12", "\x1b[2J\n", [], {}, [8, 6, 5, 4], [10**9] * 9, {"rope_type": "llama3"}]),
)
KEYS = [
    *sorted(field.name for field in dataclasses.fields(MimiConfig)),
    *LLAMA,
    *LLAMA3,
    *("num_residual_layers", "num_semantic_quantizers", "sliding_window", "upsample_groups", "rms_norm_eps"),
    *("rope_scaling", "rope_parameters", "tie_word_embeddings", "codebook_dim"),
]
changes = st.dictionaries(st.sampled_from([key for key in KEYS if key != "model_type"]), SIZES, max_size=5)


@given(changes, changes)
@example({"num_residual_layers": 16, "dilation_growth_rate": 16_384}, {})
@example({}, {"factor": float("nan")})
@settings(max_examples=500)
def test_any_config_is_refused_in_one_line_or_has_a_size_that_exists(
    change: dict[str, Any], scaling: dict[str, Any]
) -> None:
    """Pins a config that takes all memory, or all time, before a tensor of its files is looked at."""
    for read, base in ((MimiConfig.from_dict, MIMI), (LlamaConfig.from_dict, LLAMA)):
        said = ""
        try:
            config = read(base | {"rope_scaling": LLAMA3 | scaling} | change)
        except CheckpointError as error:
            said = str(error)
        assert said.isprintable(), "an escape of the file's got through"
        if said:
            continue
        layer = config.hidden_size * (2 * config.num_heads * config.head_dim + 3 * config.intermediate_size)
        assert 0 < config.num_layers * layer < 10**12
        if isinstance(config, MimiConfig):
            assert (
                config.residual_kernel_size * config.dilation_growth_rate ** (config.num_residual_layers - 1) <= 2**16
            )
