"""Mimi, streaming: one frame in or out at a time, for many streams that need not be in step (arXiv 2410.00037).

Offline use is streaming from a fresh state. Parity with `transformers.MimiModel` is what the tests judge.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from streaming.audio import FRAME
from streaming.config import MimiConfig
from streaming.models.attention import KeyValueRing, Rotary
from streaming.models.checkpoint import TensorSource
from streaming.models.codec_state import STEPS, HalfState
from streaming.models.linear import Linear, load_linear
from streaming.models.operations.base import CodecLayer, DecoderParts, EncoderParts, Operations
from streaming.models.operations.choice import pick_for_codec
from streaming.models.quantizer import SplitQuantizer
from streaming.models.seanet import load_convolution, load_decoder, load_encoder


@dataclass
class MimiState:
    """State of both halves. `rewind_frames` is how far each stream can be rewound without loss."""

    encoder: HalfState
    decoder: HalfState
    rewind_frames: int

    def scrub(self, slot: int) -> None:
        """Start a slot anew and forget its content."""
        self.encoder.scrub(slot)
        self.decoder.scrub(slot)


def _load_layer(source: TensorSource, name: str, config: MimiConfig, activations: torch.dtype) -> CodecLayer:
    hidden, inner = config.hidden_size, config.intermediate_size
    heads = {"q": config.num_heads, "k": config.num_kv_heads, "v": config.num_kv_heads}

    def vector(which: str) -> Tensor:
        return source.load(f"{name}.{which}", (hidden,), activations)

    def norm(which: str) -> tuple[Tensor, Tensor]:
        return vector(f"{which}.weight"), vector(f"{which}.bias")

    def load(parts: dict[str, tuple[int, int]]) -> Linear:
        return load_linear(source, name, parts)

    return CodecLayer(
        norm1=norm("input_layernorm"),
        norm2=norm("post_attention_layernorm"),
        qkv=load({f"self_attn.{part}_proj": (count * config.head_dim, hidden) for part, count in heads.items()}),
        out=load({"self_attn.o_proj": (hidden, config.num_heads * config.head_dim)}),
        scale1=vector("self_attn_layer_scale.scale"),
        up=load({"mlp.fc1": (inner, hidden)}),
        down=load({"mlp.fc2": (hidden, inner)}),
        scale2=vector("mlp_layer_scale.scale"),
    )


class StreamingMimi:
    """The codec. `load_codec` makes one.

    A call has B rows, each of them a slot of the state: `slots` [B] int64 says which, row i is slot i without it. No
    slot is named twice, but by rows where `active` is false: these are computed and do not advance, so that shapes stay
    static, and their slots' state does not change in any way that can be observed.
    """

    def __init__(
        self, source: TensorSource, config: MimiConfig, num_codebooks: int, operations: Operations | None = None
    ) -> None:
        """operations: what runs around the matrix products; by default, what suits the device."""
        self.config = config
        self.num_codebooks = num_codebooks
        self.device, self.dtype = source.device, source.dtype
        operations = pick_for_codec(config, source.device, source.dtype) if operations is None else operations
        self.activations = operations.activations or source.dtype
        self.quantizer = SplitQuantizer.load(source, config, num_codebooks, self.activations)
        rotary = Rotary(config.rope, config.head_dim, source.device)
        hidden, rest = config.hidden_size, (rotary, config.window, config.norm_eps)
        convolutions, layers = load_encoder(source, config), self._load_layers(source, "encoder_transformer")
        shape = (hidden, hidden, 2 * STEPS)
        # The checkpoint's only replicated padding.
        downsample = load_convolution(
            source, "downsample", shape, stride=STEPS, bias=False, activate=False, replicates=True
        )
        self._encoder = EncoderParts(convolutions, layers, downsample, *rest)
        shape = (hidden, 1, 2 * STEPS)  # depthwise
        taps = source.load("upsample.conv.weight", shape, self.activations).squeeze(1).T.contiguous()
        layers = self._load_layers(source, "decoder_transformer")
        self._decoder = DecoderParts(self.quantizer.latents, taps, layers, load_decoder(source, config), *rest)
        self.fingerprint = f"{config} {num_codebooks} {source.fingerprint}"
        """A text that differs for a codec of other weights."""
        self._use(operations)

    def _load_layers(self, source: TensorSource, name: str) -> list[CodecLayer]:
        names = [f"{name}.layers.{index}" for index in range(self.config.num_layers)]
        return [_load_layer(source, layer, self.config, self.activations) for layer in names]

    def _use(self, operations: Operations) -> None:
        self.operations = operations
        self._hear, self._speak = operations.codec_encoder(self._encoder), operations.codec_decoder(self._decoder)

    def on(self, operations: Operations) -> StreamingMimi:
        """Return the same weights on other operations."""
        made = copy.copy(self)
        made._use(operations)
        return made

    def init_state(self, batch_size: int, rewind_frames: int = 0) -> MimiState:
        """Return fresh state for `batch_size` slots. Memory grows with `rewind_frames`, how far a stream may be
        rewound.
        """
        config = self.config
        depth = (
            rewind_frames + 2
        )  # one frame more than can be rewound, and one for what a row writes that does not advance
        halves = []
        for width in (self._encoder.width, self._decoder.width):
            ring = KeyValueRing.allocate(
                batch_size,
                config.num_layers,
                config.num_kv_heads,
                config.window + STEPS * depth,
                config.head_dim,
                0,
                self.device,
                self.activations,
            )
            contexts = torch.zeros(batch_size, depth, width, device=self.device, dtype=self.activations)
            halves.append(HalfState(torch.zeros(batch_size, dtype=torch.int64, device=self.device), contexts, ring))
        return MimiState(halves[0], halves[1], rewind_frames)

    @torch.inference_mode()
    def encode(
        self,
        pcm: Tensor,
        state: MimiState,
        active: Tensor,
        lengths: Tensor | None = None,
        slots: Tensor | None = None,
    ) -> Tensor:
        """Return the codes of one frame of speech.

        pcm: [B, 1920] float, +-1; active: [B] bool; lengths: [B] int64, samples of the frame that there are, from 1 on,
        the first ones; None: all. What lies past the end of a recording is not silence to `transformers`: no layer has
        any input there. Returns codes [B, Q] int64, meaningless where not active.
        """
        return self.quantizer.encode(self.follow(pcm, state, active, lengths, slots))

    @torch.inference_mode()
    def follow(
        self,
        pcm: Tensor,
        state: MimiState,
        active: Tensor,
        lengths: Tensor | None = None,
        slots: Tensor | None = None,
    ) -> Tensor:
        """`encode` without the quantizer: let the encoder hear a frame. Return the latent [B, hidden].

        A stream that goes on after a frame that was not whole has zeros past that frame's end in its past, too, in the
        input of every layer.
        """
        assert pcm.shape[1:] == (FRAME,), pcm.shape
        return self._hear(pcm.to(self.activations), state.encoder, active, lengths, slots)

    @torch.inference_mode()
    def decode(self, codes: Tensor, state: MimiState, active: Tensor, slots: Tensor | None = None) -> Tensor:
        """Return the speech of one frame of codes.

        codes: [B, Q] int64, each in [0, codebook_size); active: [B] bool. Returns pcm [B, 1920] float.
        """
        return self._speak(codes, state.decoder, active, slots)
