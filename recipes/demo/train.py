"""`python -m recipes.demo.train --stage …`: makes the demo model, stage by stage, each resumable.

corpus     the voices read the text                        FLAC, once; several processes may share it by --source
cache      the corpus decoded into flat files              derived; picks up what the corpus has gained
latents    the space of what a frame sounds like           seconds
encoder    learns to see the latents                       hours
quantiser  codebooks in the space, from what it sees       minutes
decoder    learns to speak from codes                      hours
joint      encoder and decoder, with each other            hours
codes      the corpus as the encoder's codes               minutes
language   learns to go on                                 hours
export     two checkpoint folders                          seconds, at any time
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from recipes.demo import clips, codes, corpus, decoder, encoder, export, joint, language, quantiser, recipe
from recipes.demo.latents import Latents

STAGES = ("corpus", "cache", "latents", "encoder", "quantiser", "decoder", "joint", "codes", "language", "export")


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m recipes.demo.train", description=__doc__.splitlines()[0])
    parser.add_argument("--stage", required=True, choices=STAGES)
    parser.add_argument("--root", type=Path, default=recipe.root(), help="corpus, caches, checkpoints, logs")
    parser.add_argument("--minutes", type=float, default=600.0, help="of training, by the clock")
    parser.add_argument("--device", default="cpu", help="of encoder, decoder and language model")
    parser.add_argument("--batch", type=int, default=0, help="crops a step; 0 is what a CPU likes")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--frames", type=int, default=recipe.CONTEXT_FRAMES, help="language: of a crop")
    parser.add_argument("--source", help="corpus: only this synthesiser's voices")
    parser.add_argument("--oracle", action="store_true", help="quantiser, decoder, codes: before the encoder is there")
    parser.add_argument("--judged", action="store_true", help="decoder, joint: with an adversary")
    parser.add_argument("--rate", type=float, default=1.0, help="of learning, times the stage's own; less to cool down")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    run = recipe.Run(
        options.root, torch.device(options.device), options.batch, options.minutes, options.seed, options.rate
    )
    run.stages.mkdir(parents=True, exist_ok=True)
    if options.stage == "corpus":
        corpus.make(run.corpus, options.source)
    elif options.stage == "cache":
        clips.build(run.corpus, run.cache)
    elif options.stage == "latents":
        Latents.fit(clips.Crops(clips.load(run.cache, "train"), encoder.FRAMES, run.seed), 60).save(run.stages)
    elif options.stage == "encoder":
        encoder.train(run)
    elif options.stage == "quantiser":
        quantiser.make(run, options.oracle)
    elif options.stage == "decoder":
        decoder.train(run, options.oracle, options.judged)
    elif options.stage == "joint":
        joint.train(run, options.judged)
    elif options.stage == "codes":
        codes.make(run, options.oracle)
    elif options.stage == "language":
        language.train(run, options.frames)
    elif options.stage == "export":
        export.export(run.stages, run.root / "export")


if __name__ == "__main__":
    main()
