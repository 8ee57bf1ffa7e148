"""The models that a measurement of the step runs: a checkpoint's, or of a released shape with random weights."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from dataclasses import dataclass

from streaming.benchmark import machine
from streaming.config import CONTEXT_TOKENS
from streaming.loading import DEMO, DTYPES, RANDOM, load_models
from streaming.models.llama import LlamaDecoder
from streaming.models.mimi import StreamingMimi
from streaming.models.random_weights import DECODERS
from streaming.options import count


@dataclass(frozen=True)
class StepModels:
    """A decoder with its codec."""

    name: str
    codec: StreamingMimi
    decoder: LlamaDecoder

    def facts(self) -> dict[str, str | int | float]:
        """Return what a report says of them first."""
        return {
            "model": self.name,
            "device": machine.name_of(self.codec.device),
            "decoder's operations": self.decoder.operations.name,
            "codec's operations": self.codec.operations.name,
        }


def add_arguments(parser: argparse.ArgumentParser, *slots: int, sizes: Collection[str] = DECODERS) -> None:
    """slots: how many sessions there are unless told otherwise; none: the measurement does not ask, or asks itself.
    sizes: of random weights.
    """
    parser.add_argument(
        "--model", default=DEMO, metavar="demo|HUB_ID|DIR", help="The Llama-Mimi checkpoint (default: demo)."
    )
    parser.add_argument(
        "--codec", metavar="HUB_ID|DIR", help="The Mimi checkpoint (default: kyutai/mimi, or the demo's)."
    )
    parser.add_argument("--random", choices=sizes, help="Measure random weights, made in memory, instead of --model.")
    parser.add_argument("--device", default="auto", help="Where it runs: auto, cpu or cuda[:N] (default: auto).")
    parser.add_argument(
        "--dtype", choices=("auto", *DTYPES), default="auto", help="The type that the decoder computes in."
    )
    parser.add_argument(
        "--quantize", choices=("none", "int8", "int4"), default="none", help="How the decoder's weights are kept."
    )
    parser.add_argument(
        "--context-tokens", type=count, default=CONTEXT_TOKENS, metavar="N", help="The context, which is filled."
    )
    if slots:
        parser.add_argument(
            "--slots", type=count, nargs="+", default=list(slots), metavar="B", help="How many sessions a step has."
        )


def load(options: argparse.Namespace) -> StepModels:
    """Raises as loading does."""
    name = options.model if options.random is None else RANDOM + options.random
    models = load_models(name, options.codec, options.device, options.dtype, options.quantize)
    return StepModels(models.name, models.codec, models.decoder)
