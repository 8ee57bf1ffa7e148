"""The Llama decoder over interleaved codec tokens, with a key-value ring per slot and a context that slides.

It knows codes, not the vocabulary: the embedding is cut to the codes' rows and the output layer to what each codebook
may emit, so neither the text vocabulary's memory nor its time is spent.

A frame's Q tokens enter one late: step f is fed `(c_{Q-1} of f-1, c_0 .. c_{Q-2} of f)`, and each yields the logits of
the token after it. The last token is therefore kept outside the ring, listening and speaking are the same computation,
and the first token of a continuation costs no extra forward. Before the first frame the last token is `<audio>`.

When the window is full the oldest frame leaves with every step. The prefix `<bos><audio>` stays right in front of the
window: its keys, the same for all sessions but for their rotation, are written anew each frame at the position that the
window's start gives them.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from streaming.config import LlamaConfig
from streaming.models.attention import FrameView, KeyValueRing, Rotary
from streaming.models.checkpoint import TensorSource
from streaming.models.linear import Linear, linear, load_linear
from streaming.models.operations.base import Layer, Operations
from streaming.models.operations.choice import pick
from streaming.models.operations.torch import TorchOperations, finish
from streaming.models.quantized_weights import Quantize, rounding
from streaming.models.sampler import Drawing, SamplerState
from streaming.models.token_layout import TokenLayout

_OUTPUTS = {"cuda": 8}
"""An output layer's number of rows is a multiple of this, by the device."""


@dataclass
class DecoderState:
    """frames: [S] int64, the stream's position; the only clock. lasts: [S, depth] int64, unit of the last token of each
    of the latest frames, at index frame % depth. ring: see `KeyValueRing`.
    """

    frames: Tensor
    lasts: Tensor
    ring: KeyValueRing

    @property
    def every_slot(self) -> Tensor:
        """[S] int64, for a batch in which row i is slot i."""
        return torch.arange(len(self.frames), device=self.frames.device)

    def reset(self, mask: Tensor) -> None:
        """Start the streams of the slots in `mask` [S] bool anew."""
        self.frames.masked_fill_(mask, 0)

    def scrub(self, slot: int) -> None:
        """Start a slot anew and forget its content."""
        self.frames[slot] = 0
        self.lasts[slot].zero_()
        self.ring.scrub(slot)


def _load_layer(
    source: TensorSource, name: str, config: LlamaConfig, quantize: Quantize, activations: torch.dtype
) -> Layer:
    hidden, inner = config.hidden_size, config.intermediate_size
    heads = {"q": config.num_heads, "k": config.num_kv_heads, "v": config.num_kv_heads}

    def load(parts: dict[str, tuple[int, int]]) -> Linear:
        return load_linear(source, name, parts, quantize)

    return Layer(
        norm1=source.load(f"{name}.input_layernorm.weight", (hidden,), activations),
        norm2=source.load(f"{name}.post_attention_layernorm.weight", (hidden,), activations),
        qkv=load({f"self_attn.{part}_proj": (count * config.head_dim, hidden) for part, count in heads.items()}),
        out=load({"self_attn.o_proj": (hidden, config.num_heads * config.head_dim)}),
        gate_up=load({f"mlp.{part}_proj": (inner, hidden) for part in ("gate", "up")}),
        down=load({"mlp.down_proj": (hidden, inner)}),
    )


class LlamaDecoder:
    """The decoder. A unit is `codebook * K + code`, or Q * K for `<audio>`; a drawn token is a code, or K for
    `</audio>`.
    """

    def __init__(
        self,
        source: TensorSource,
        config: LlamaConfig,
        layout: TokenLayout,
        quantize: Quantize = "none",
        operations: Operations | None = None,
    ) -> None:
        """operations: what runs around the matrix products; by default, what suits the device."""
        self.config = config
        self.operations = pick(config, source.device, source.dtype, quantize) if operations is None else operations
        self.num_codebooks, self.codebook_size = layout.units.shape
        self.prefix = len(layout.prefix)
        self.device, self.dtype = source.device, source.dtype
        activations = self.operations.activations or source.dtype
        self.rotary = Rotary(config.rope, config.head_dim, source.device)
        table = (config.vocab_size, config.hidden_size)
        embedding = "model.embed_tokens.weight"
        rows = torch.cat((layout.units.flatten(), torch.tensor(layout.prefix[-1:])))
        self._embedding = source.load_rows(embedding, table, rows).to(activations)  # [Q * K + 1, hidden]
        head = embedding if config.tied and "lm_head.weight" not in source else "lm_head.weight"
        ends = torch.full((self.num_codebooks, 1), layout.end)
        rows = torch.cat((layout.units, ends), dim=1)  # [Q, K + 1]
        heads = source.load_rows(head, table, rows.flatten()).view(*rows.shape, -1)  # [Q, K + 1, hidden]
        # `</audio>` stands between frames only: the published script drops a frame that it cuts in two.
        may = torch.zeros(rows.shape, dtype=source.dtype, device=source.device)
        may[1:, -1] = -torch.inf
        # A GPU's library has no good product of 2,049 outputs. Those that are added are never likely, nor looked at.
        more = -rows.shape[1] % _OUTPUTS.get(self.device.type, 1)
        heads, may = F.pad(heads, (0, 0, 0, more)), F.pad(may, (0, more), value=-torch.inf)
        self._heads = [linear(head, bias=bias) for head, bias in zip(heads, may, strict=True)]
        self._layers = [
            _load_layer(source, f"model.layers.{i}", config, quantize, activations) for i in range(config.num_layers)
        ]
        self._run_layers = self.operations.layers(self._layers, config.norm_eps)
        self._norm = source.load("model.norm.weight", (config.hidden_size,), activations)
        self.fingerprint = f"{config} {rounding(quantize)} {source.fingerprint} {layout.fingerprint}"
        """A text that differs for a decoder of other weights."""
        # [L, H, P, D], keys not rotated
        self.prefix_keys, self._prefix_values = self._run_prefix(
            source.load_rows(embedding, table, torch.tensor(layout.prefix)).to(activations)
        )

    def on(self, operations: Operations) -> LlamaDecoder:
        """Return the same weights on other operations."""
        made = copy.copy(self)
        made.operations = operations
        made._run_layers = operations.layers(self._layers, self.config.norm_eps)
        return made

    def without_layers(self) -> LlamaDecoder:
        """Return the same decoder without its layers, of the same sizes, so that the rest of a step can be measured."""
        made = copy.copy(self)
        made._layers = []
        made._run_layers = self.operations.layers([], self.config.norm_eps)
        return made

    def context_frames(self, context_tokens: int) -> int:
        """Return how many frames a context of so many tokens holds, the prefix taken off."""
        return (context_tokens - self.prefix) // self.num_codebooks

    def init_state(self, batch_size: int, context_frames: int, rewind_frames: int = 0) -> DecoderState:
        """Return fresh state for `batch_size` slots that remember `context_frames` and can be rewound by
        `rewind_frames`.
        """
        config = self.config
        # One frame more than can be rewound, and one for what a row writes that does not advance.
        depth = rewind_frames + 2
        size = self.num_codebooks * (context_frames + depth)
        ring = KeyValueRing.allocate(
            batch_size,
            config.num_layers,
            config.num_kv_heads,
            size,
            config.head_dim,
            self.prefix,
            self.device,
            self.dtype,
        )
        ring.values[:, :, :, : self.prefix] = self._prefix_values
        zeros = torch.zeros(batch_size, depth, dtype=torch.int64, device=self.device)
        return DecoderState(zeros[:, 0].clone(), zeros, ring)

    def last_units(self, state: DecoderState, slots: Tensor) -> Tensor:
        """Return the token that the next frame is fed first: [B] units. slots: [B]."""
        frames = state.frames[slots]
        last = state.lasts[slots, (frames - 1).remainder(state.lasts.shape[1])]
        return torch.where(frames == 0, self.num_codebooks * self.codebook_size, last)

    def units(self, codes: Tensor) -> Tensor:
        """codes: [B, Q] to units [B, Q]."""
        return codes + torch.arange(self.num_codebooks, device=codes.device) * self.codebook_size

    @torch.inference_mode()
    def begin_frame(self, state: DecoderState, slots: Tensor, context_frames: int, columns: int) -> FrameView:
        """Return positions and masks of the next frame of B rows; move the prefix in front of their slots' windows.

        slots: [B] int64, the slot of each row. columns: how many entries of the ring to look at; `columns_for` of the
        longest stream among them.
        """
        return self.operations.begin_frame(
            slots,
            state.frames,
            self.prefix_keys,
            state.ring,
            self.rotary,
            context_frames,
            self.num_codebooks,
            columns,
        )

    def columns_for(self, state: DecoderState, frames: int) -> int:
        """Return how many entries of the ring hold something for a longest stream of `frames`, in steps of 128."""
        held = self.prefix + self.num_codebooks * (frames + 1)
        return min(-(-held // 128) * 128, state.ring.keys.shape[3])

    @torch.inference_mode()
    def forward(self, units: Tensor, state: DecoderState, view: FrameView) -> Tensor:
        """Feed T tokens a row. units: [B, T]; view: of these T tokens. Returns the last layer's output [B, T,
        hidden], normed.
        """
        x, pending = self._run_layers(F.embedding(units, self._embedding), state.ring, view)
        return self.operations.norm(x, pending, self._norm, self.config.norm_eps)[1]

    @torch.inference_mode()
    def logits(self, hidden: Tensor, codebook: int) -> Tensor:
        """Return the logits of what may follow in this codebook: [B, hidden] to [B, K + 1], the last one `</audio>`,
        -inf where it may not stand.
        """
        return self._heads[codebook](hidden)[..., : self.codebook_size + 1]

    def draw(self, hidden: Tensor, codebook: int, sampler: SamplerState, frame: Drawing, few: bool) -> Tensor:
        """Draw this codebook's codes. hidden: [B, hidden]. See `sampler.draw`."""
        return self.operations.draw(self.logits(hidden, codebook), codebook, sampler, frame, few)

    @torch.inference_mode()
    def end_frame(self, codes: Tensor, state: DecoderState, slots: Tensor, active: Tensor) -> None:
        """Advance the slots of the active rows past the frame that was fed. codes: [B, Q]; slots: [B]; active: [B]
        bool.
        """
        frames = state.frames[slots]
        state.lasts[slots, frames.remainder(state.lasts.shape[1])] = self.units(codes)[:, -1]
        state.frames[slots] = frames + active

    @torch.inference_mode()
    def _run_prefix(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """Keys, before rotation, and values of the prefix: the same for every session. embeddings: [P, hidden]."""
        count, heads, eps = self.prefix, self.config.num_kv_heads, self.config.norm_eps
        operations = TorchOperations()  # runs once, and gives every session the same start whatever runs later
        x, pending = embeddings.unsqueeze(0), None
        position = torch.arange(count, device=self.device)[None]
        cos, sin = self.rotary(position)
        ring = KeyValueRing.allocate(1, 1, heads, 0, self.config.head_dim, count, self.device, embeddings.dtype)
        causal = torch.ones(count, count, dtype=torch.bool, device=self.device).tril()[None, None]
        view = FrameView(
            position[:, 0], position, position[:, :1], cos.unsqueeze(1), sin.unsqueeze(1), position, causal
        )
        keys, values = [], []
        for layer in self._layers:
            x, qkv = operations.project(x, pending, layer.norm1, eps, layer.qkv)
            x, pending = finish(operations, layer, eps, x, operations.attend(qkv, ring, 0, view))
            key, value = qkv[0].view(count, -1, self.config.head_dim).transpose(0, 1)[-2 * heads :].chunk(2)
            keys.append(key)
            values.append(value)
        return torch.stack(keys), torch.stack(values)
