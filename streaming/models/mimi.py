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
from streaming.models.attention import FrameView, KeyValueRing, Rotary
from streaming.models.checkpoint import TensorSource
from streaming.models.linear import Linear, load_linear
from streaming.models.operations.base import CodecLayer, Operations
from streaming.models.operations.choice import pick_for_codec
from streaming.models.quantizer import SplitQuantizer
from streaming.models.seanet import load_convolution, load_decoder, load_encoder

STEPS = 2
"""Transformer steps a frame: 25 Hz against 12.5."""


@dataclass
class HalfState:
    """The memory of one half of the codec, for each slot's stream.

    frames: [S] int64, the stream's position; the only clock. contexts: [S, depth, N], the convolutions' contexts after
    each of the last frames, at index frame % depth, so that a stream can be rewound by lowering its position.
    """

    frames: Tensor
    contexts: Tensor
    ring: KeyValueRing

    def scrub(self, slot: int) -> None:
        """Start a slot anew and forget its content."""
        self.frames[slot] = 0
        self.contexts[slot].zero_()
        self.ring.scrub(slot)


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
        self._rotary = Rotary(config.rope, config.head_dim, source.device)
        self._encoder = load_encoder(source, config)
        self._encoder_layers = self._load_layers(source, "encoder_transformer")
        hidden = config.hidden_size
        shape = (hidden, hidden, 2 * STEPS)
        # The checkpoint's only replicated padding.
        self._downsample = load_convolution(
            source, "downsample", shape, stride=STEPS, bias=False, activate=False, replicates=True
        )
        shape = (hidden, 1, 2 * STEPS)  # depthwise
        self._upsample = source.load("upsample.conv.weight", shape, self.activations).squeeze(1)
        self._decoder_layers = self._load_layers(source, "decoder_transformer")
        self._decoder = load_decoder(source, config)
        self.fingerprint = f"{config} {num_codebooks} {source.fingerprint}"
        """A text that differs for a codec of other weights."""
        self._use(operations)

    def _load_layers(self, source: TensorSource, name: str) -> list[CodecLayer]:
        names = [f"{name}.layers.{index}" for index in range(self.config.num_layers)]
        return [_load_layer(source, layer, self.config, self.activations) for layer in names]

    def _use(self, operations: Operations) -> None:
        self.operations, eps = operations, self.config.norm_eps
        self._run_encoder = operations.convolutions(self._encoder)
        self._run_encoder_layers = operations.codec_layers(self._encoder_layers, eps)
        self._run_downsample = operations.convolutions([self._downsample])
        self._run_decoder_layers = operations.codec_layers(self._decoder_layers, eps)
        self._run_decoder = operations.convolutions(self._decoder)

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
        upsampled = self.config.hidden_size
        halves = []
        for width in (
            sum(conv.context * conv.channels for conv in (*self._encoder, self._downsample)),
            upsampled + sum(conv.context * conv.channels for conv in self._decoder),
        ):
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
        half, slots = state.encoder, _rows(slots, pcm)
        frames = half.frames[slots]
        contexts = self.operations.contexts(half.contexts, slots, frames)
        x = self._run_encoder(pcm.to(self.activations).unsqueeze(-1), contexts, lengths)
        x = self._run_encoder_layers(x, half.ring, self._view(slots, frames, half.ring))
        if lengths is not None:  # here the padding is replicated: a last step without a second one is read twice
            x = torch.where((lengths <= FRAME // STEPS)[:, None, None], x[:, :1], x)
        x = self._run_downsample(x, contexts)
        contexts.keep()
        half.frames[slots] = frames + active
        return x.squeeze(1)

    @torch.inference_mode()
    def decode(self, codes: Tensor, state: MimiState, active: Tensor, slots: Tensor | None = None) -> Tensor:
        """Return the speech of one frame of codes.

        codes: [B, Q] int64, each in [0, codebook_size); active: [B] bool. Returns pcm [B, 1920] float.
        """
        half, slots = state.decoder, _rows(slots, codes)
        frames = half.frames[slots]
        contexts = self.operations.contexts(half.contexts, slots, frames)
        latent = self.quantizer.decode(codes).unsqueeze(1)  # [B, 1, hidden]
        taps = self._upsample.T  # [2 * STEPS, hidden]: the latest latent's taps, then the one's before it
        x = latent * taps[:STEPS] + contexts.take(1, latent.shape[2]) * taps[STEPS:]
        contexts.leave(latent)
        x = self._run_decoder_layers(x, half.ring, self._view(slots, frames, half.ring))
        x = self._run_decoder(x, contexts)
        contexts.keep()
        half.frames[slots] = frames + active
        return x.squeeze(-1)

    def _view(self, slots: Tensor, frames: Tensor, ring: KeyValueRing) -> FrameView:
        """Return the view of the two steps of each stream's next frame."""
        position = frames[:, None] * STEPS + torch.arange(STEPS, device=frames.device)
        start = (position - (self.config.window - 1)).clamp(min=0)
        return self.operations.view(slots, position, start, ring, self._rotary, ring.keys.shape[3])


def _rows(slots: Tensor | None, batch: Tensor) -> Tensor:
    return torch.arange(len(batch), device=batch.device) if slots is None else slots
