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

And on the weights that the package ships:

prompts    people who begin to count, as codes             hours; several processes may share it by --seed
blocks     what the model says, in eight voices             half an hour
tests      prompts that it is judged on                     minutes
recite     learns to understand them, and to go on         hours
ship       a checkpoint folder of it                       seconds, at any time
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from recipes.demo import (
    blocks,
    clips,
    codes,
    corpus,
    decoder,
    encoder,
    export,
    joint,
    language,
    prompts,
    quantiser,
    recall,
    recipe,
    recite,
    shipped,
    strangers,
)
from recipes.demo.blocks import Markers
from recipes.demo.latents import Latents

STAGES = (
    *("corpus", "cache", "latents", "encoder", "quantiser", "decoder", "joint", "codes", "language", "export"),
    *("prompts", "blocks", "tests", "recite", "ship"),
)


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
    parser.add_argument("--count", type=int, default=20_000, help="prompts: so many of this seed")
    parser.add_argument("--voices", default="hibari=.5,flite=.22,espeak=.28", help="prompts: synthesisers and shares")
    parser.add_argument("--budget", type=float, default=7200.0, help="recite: CPU seconds in all")
    parser.add_argument("--falling", type=float, default=3600.0, help="recite: the last ones, in which the rate falls")
    parser.add_argument("--alone", type=float, default=0.5, help="recite: share of prompts that are not gone on with")
    parser.add_argument("--processes", type=int, default=1, help="recite: that train the same weights")
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
    elif options.stage == "prompts":
        shares = {name: float(share) for name, share in (part.split("=") for part in options.voices.split(","))}
        prompts.make(run.root / "prompts", shipped.codec(), options.count, options.seed, shares)
    elif options.stage == "blocks":
        path, codec = run.root / "blocks.npz", shipped.codec()
        if not path.is_file():  # what the shipped weights say already need not be learned again
            recall.blocks(recite.reciter(), Markers.of(codec), path)
        blocks.make(path, codec)
    elif options.stage == "tests":
        strangers.make(run.root / "tests", shipped.codec())
    elif options.stage == "recite":
        recite.train(run, options.budget, options.falling, options.alone, options.processes)
    elif options.stage == "ship":
        recite.ship(run.stages, run.root / "reciting")


if __name__ == "__main__":
    main()
