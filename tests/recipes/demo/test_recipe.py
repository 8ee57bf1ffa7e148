"""Features, quantiser, crops, tokens, export and the evaluation's own figures, each where the right answer is known."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from recipes.demo import clips, codes, corpus, export, features, free_speech, judges, language, quantiser
from recipes.demo.codec import Codec
from recipes.demo.recipe import CODEC, DECODER
from streaming.audio import FRAME
from streaming.models.token_layout import AUDIO, unit_name
from tests.reference import relative_error, speech


def test_a_frames_envelope_does_not_look_ahead() -> None:
    """A target that knows the next frame cannot be seen by a causal encoder."""
    pcm = torch.from_numpy(speech(6)).view(1, -1)
    changed = pcm.clone()
    changed[:, 4 * FRAME :] = 0.5 * torch.randn(2 * FRAME)
    assert torch.equal(features.envelope(pcm)[:, :4], features.envelope(changed)[:, :4])
    assert not torch.allclose(features.envelope(pcm)[:, 4], features.envelope(changed)[:, 4])


def test_the_envelope_of_a_louder_clip_differs_in_the_first_cepstrum_alone() -> None:
    """Orthonormal cepstra: a level is one number a window, and distances are those of log spectra."""
    pcm = 0.1 * torch.randn(1, 3 * FRAME)
    difference = features.envelope(2 * pcm)[0, 1] - features.envelope(pcm)[0, 1]
    by_window = difference.view(features.WINDOWS, features.CEPSTRA)
    assert by_window[:, 0].allclose(torch.tensor(math.log(2) * math.sqrt(features.MELS)), rtol=0.05)
    assert by_window[:, 1:].abs().max() < 0.3


def test_prosody_tells_pitch_and_voicing() -> None:
    pytest.importorskip("pyworld")
    time = np.arange(20 * FRAME) / 24_000
    wave = sum(0.1 * np.sin(2 * np.pi * 140 * harmonic * time) for harmonic in range(1, 9))
    assert isinstance(wave, np.ndarray)
    wave[10 * FRAME :] = 0.01 * np.random.default_rng(0).standard_normal(10 * FRAME)
    found = features.prosody(wave.astype(np.float32))
    assert (found[3:8, : features.WINDOWS] == 1).all() and (found[12:, : features.WINDOWS] == -1).mean() > 0.9
    height = found[3:8, features.WINDOWS :] * features.PITCH_SPREAD + features.PITCH_CENTRE
    assert np.exp(height) == pytest.approx(140, rel=0.01)


def test_every_codebook_leaves_less_and_a_second_fit_goes_on_from_the_first() -> None:
    """Codes keep their meaning when codebooks are fitted again: what was trained on them stays of use."""
    rows = torch.randn(4000, 6) * torch.tensor([3.0, 2, 1, 1, 0.5, 0.1])
    books, left = quantiser.fit(rows, [torch.zeros(32, 6)] * 3, rounds=8)
    assert 1 > left[0] > left[1] > left[2] > 0
    again, left_again = quantiser.fit(rows + 0.01 * torch.randn_like(rows), books, rounds=8)
    assert left_again[2] == pytest.approx(left[2], rel=0.1)
    moved = [relative_error(one, other) for one, other in zip(again, books, strict=True)]
    assert moved[0] < 0.1


def test_a_crop_is_of_one_clip_and_has_that_clips_prosody() -> None:
    """A crop across two clips teaches a change of text, or of voice, in the middle of a word."""
    lengths = np.array([5, 9, 7])
    clip = np.repeat(np.arange(3), lengths)
    pcm = np.repeat((100 * (clip + 1)).astype(np.int16)[:, None], FRAME, axis=1)
    prosody = np.repeat(clip.astype(np.float16)[:, None], features.PROSODY, axis=1)
    voice = clips.VoiceClips("one", pcm, prosody, np.concatenate([[0], lengths.cumsum()]), [1, 2, 3])
    waves, found = clips.Crops([voice], 6, seed=0).batch(40)
    assert len(found.unique()) == 2  # the first clip is too short
    for wave, numbers in zip(waves, found, strict=True):
        assert len(wave.unique()) == len(numbers.unique()) == 1


def test_held_out_text_is_two_blocks_in_a_hundred() -> None:
    assert [block for block in range(120) if corpus.held_out(block)] == [49, 99]


def test_token_ids_and_losses_are_those_of_the_tokenizer_and_of_transformers(tmp_path: Path) -> None:
    """The ids are computed in training and read from the tokenizer when served."""
    books, size = CODEC["num_quantizers"], CODEC["codebook_size"]
    frames = torch.randint(size, (2, 5, books), generator=torch.Generator().manual_seed(1))
    voice = codes.VoiceCodes("one", frames.flatten(0, 1).numpy().astype(np.int16), np.array([0, 5, 10]))
    ids = language.Sequences([voice], 4, seed=0).tokens(frames)
    model = language.loop(tmp_path).average
    export.write_decoder(tmp_path, model, torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    texts = [
        AUDIO + "".join(unit_name(code, book) for frame in clip for book, code in enumerate(frame))
        for clip in frames.tolist()
    ]
    assert tokenizer(texts, return_tensors="pt")["input_ids"].equal(ids)
    published = LlamaForCausalLM.from_pretrained(tmp_path)
    labels = ids.clone()
    labels[:, :2] = -100
    with torch.no_grad():
        wanted = published(input_ids=ids, labels=labels).loss
        assert language.token_losses(model, ids).mean() == pytest.approx(float(wanted), abs=1e-4)


def test_what_is_exported_is_loaded_by_the_code_of_the_released_models_and_speaks(tmp_path: Path) -> None:
    """In bfloat16, as shipped: under 30 MB, and every slot goes on from its prompt."""
    export.write_codec(tmp_path / "codec", Codec(CODEC).requires_grad_(False), torch.bfloat16)
    export.write_decoder(tmp_path / "decoder", language.loop(tmp_path).average, torch.bfloat16)
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors")) < 30e6
    codec = free_speech.load_codec(tmp_path / "codec")
    decoder = free_speech.load_decoder(tmp_path / "decoder", codec)
    heard, spoken = free_speech.speak(codec, decoder, [speech(3, seed=seed) for seed in range(2)], frames=4, seed=1)
    assert heard.shape == (2, 7 * FRAME) and np.isfinite(heard).all()
    assert spoken.shape == (2, 7, DECODER["num_quantizers"])
    assert not np.array_equal(spoken[0, 3:], spoken[1, 3:])


def test_repeats_are_found_and_ordinary_speech_has_none() -> None:
    draw = np.random.default_rng(0)
    spoken = draw.integers(0, 1024, (1, 60, 6))
    assert free_speech.repeats(spoken) == 0
    spoken[0, 30:50] = spoken[0, 10:30]
    spoken[0, 33, 1] += 1  # not to the letter
    assert free_speech.repeats(spoken) == pytest.approx(15 / 53, abs=2 / 53)


def test_the_ngram_learns_what_a_frame_tells_of_the_next() -> None:
    """A cycle is certain after its first turns; what it never saw costs at least a uniform choice's share."""
    cycle = np.tile(np.arange(10), 40)[:, None]
    assert free_speech.ngram_loss([cycle], [cycle[:100]]) < 0.2
    noise = np.random.default_rng(0).integers(0, 1024, (100, 1))
    assert free_speech.ngram_loss([cycle], [noise]) > math.log(1024)


def test_word_errors_are_the_least_edits() -> None:
    said = ["in", "the", "beginning", "god", "created"]
    assert judges.word_errors(said, said) == 0
    assert judges.word_errors(said, ["in", "beginning", "good", "created", "heaven"]) == 3
    assert judges.word_errors(said, []) == 5
