"""Prompts, blocks and the stage that learns from them: targets where they belong, and a stream that equals training."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from recipes.demo import blocks, loop, prompts, recall, recite, sequences, shipped
from recipes.demo.blocks import MANNER, Book, Markers
from recipes.demo.codec import Codec
from recipes.demo.evaluate import sampling_of
from recipes.demo.prompts import Prompt, Speaker
from recipes.demo.recipe import CODEC, CONTEXT_FRAMES
from recipes.demo.recite import Reciter
from recipes.demo.sequences import number
from recipes.demo.train import main
from streaming.audio import FRAME, read_audio
from streaming.benchmark.likelihood import PROMPT
from streaming.config import Sampling
from streaming.loading import load_engine
from streaming.models.checkpoint import read_notice

BOOKS = CODEC["num_quantizers"]


@pytest.fixture(scope="module")
def codec() -> Codec:
    return shipped.codec()


@pytest.fixture(scope="module")
def markers(codec: Codec) -> Markers:
    return Markers.of(codec)


@pytest.fixture(scope="module")
def reciter() -> Reciter:
    return Reciter(shipped.language_model())


@pytest.fixture
def book(markers: Markers) -> Book:
    """Every block is two frames that name voice and block."""
    said = [
        [np.full((2, BOOKS), 8 * block % 1000 + voice) for block in range(len(sequences.BLOCKS))]
        for voice in range(len(prompts.PITCHES))
    ]
    return Book(markers, said)


def test_the_voices_that_people_are_told_of_are_those_of_the_markers(markers: Markers) -> None:
    """With another codec the markers are others, and a person would be told of another voice, or of none."""
    voices = read_notice(shipped.FOLDER / "decoder").voices
    assert voices is not None and voices.codebook == MANNER[0]
    assert list(voices.names) == markers.voices.tolist(), "from the deepest to the highest"


def test_codes_are_learned_against_all_tokens(reciter: Reciter) -> None:
    """transformers, which has no mask, drew another codebook's token: only codes of the same one had been compared."""
    hidden = torch.randn(3, reciter.model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    codes = torch.tensor([0, 5, CODEC["codebook_size"]])
    tokens = reciter.tokens(codes, 0)
    assert tokens[2] == reciter.end
    every, of_book = reciter.all_logits(hidden), reciter.logits(hidden, 0)
    assert every.shape == (3, reciter.model.config.vocab_size)
    torch.testing.assert_close(every[:, tokens], of_book[:, codes])
    assert (reciter.tokens(torch.tensor([5]), 3) == reciter.units[3][5]).all()


def test_a_number_of_two_words_can_be_said_apart() -> None:
    """People who count slowly, and machines that paste recordings, were understood worst: they pause within 21."""
    said: list[str] = []

    def say(text: str, mark: str) -> NDArray[np.float32]:
        said.append(text + mark)
        return np.ones(2400, np.float32)

    speaker = Speaker("test", say, None)
    whole = prompts._say(speaker, number(21), ",", None)
    apart = prompts._say(speaker, number(21), ",", 0.1)
    for single in (number(7), number(20), number(100), sequences.sequence("day")[0]):
        prompts._say(speaker, single, ",", 0.1)
    assert said == ["twenty-one,", "twenty", "one,", "seven,", "twenty,", "one hundred,", "Monday,"]
    assert len(apart) - 2 * len(whole) == 2400


def _prompt(begin: list[int], said: list[int], pitch: float = 200.0, gap: float = 0.8) -> Prompt:
    codes = np.random.default_rng(1).integers(1024, size=(len(begin), BOOKS)).astype(np.int16)
    targets = np.array(begin, np.int16)
    return Prompt(codes, targets, np.full(len(begin), said[-1], np.int16), pitch, gap, said, "test")


def test_a_spoken_prompt_has_its_targets_in_the_pauses_behind_its_items() -> None:
    """Pins targets that are off by an item, or that lie under a word."""

    def tone(text: str, mark: str) -> NDArray[np.float32]:
        return np.sin(np.arange(9600, dtype=np.float32) * 0.1)  # 0.4 s

    items = [number(1), number(2), number(3)]
    wave, spans = prompts.speak(Speaker("tone", tone, None), items, random.Random(7), [])
    frames = len(wave) // FRAME
    begin, told = prompts.label(frames, items, spans)
    for frame in range(frames):
        end = (frame + 1) * FRAME
        before = [place for place, (_, ends) in enumerate(spans) if ends - prompts.EARLY * 24_000 <= end]
        if begin[frame] >= 0:
            assert sequences.ITEMS[begin[frame]] == number(len(before) + 1)
            assert not any(start + FRAME < end < ends - 2 * FRAME for start, ends in spans)
        if told[frame] >= 0:
            assert sequences.ITEMS[told[frame]] in items
    assert {int(target) for target in begin if target >= 0} == {2, 3, 4}
    assert begin[-1] == 4 or len(begin) > spans[-1][1] // FRAME + prompts.AFTER


def test_trimming_leaves_what_is_loud() -> None:
    wave = np.zeros(24_000, np.float32)
    wave[9600:14_400] = 0.5
    trimmed = prompts.trim(wave)
    assert 4800 <= len(trimmed) <= 4800 + 2 * 480
    assert np.square(trimmed).sum() == np.square(wave).sum()
    assert not prompts.trim(np.zeros(100, np.float32)).any()


def test_a_shard_reads_as_it_was_written(tmp_path: Path) -> None:
    written = [_prompt([-1, 2, 3], [1, 2]), _prompt([-1, 5], [4], pitch=0.0, gap=0.0)]
    prompts.save(tmp_path / "a.npz", written)
    for before, after in zip(written, prompts.load(tmp_path / "a.npz"), strict=True):
        for name in ("codes", "begin", "item"):
            assert np.array_equal(getattr(before, name), getattr(after, name))
        assert (before.pitch, before.gap, before.said, before.source) == (after.pitch, after.gap, after.said, "test")


def test_markers_are_told_apart_by_their_first_code_and_are_not_heard(codec: Codec, markers: Markers) -> None:
    """Pins a marker that clicks: it is between any two words that the demo says."""
    assert len(set(markers.codes[:, 0].tolist())) == len(sequences.ITEMS)
    assert len(set(markers.voices.tolist())) == 8 and len(set(markers.paces.tolist())) == 3
    assert len({*markers.ones.tolist(), int(markers.silence[blocks.ONES])}) == 11
    quiet = np.repeat(markers.silence[None], 6, 0)
    loudest = 0.0
    for item in range(0, len(sequences.ITEMS), 5):
        codes = torch.from_numpy(np.concatenate([quiet, markers.frame(item, item % 8, item % 3), quiet]))
        loudest = max(loudest, float(codec.synthesise(codes[None]).square().mean().sqrt()))
    assert loudest < 10 ** (-55 / 20)


def test_what_is_said_is_a_marker_its_blocks_and_a_pause(book: Book, markers: Markers) -> None:
    one, twenty, behind_it = book.say([number(1), number(21)], voice=3, pace=2)
    assert [len(one), len(twenty), len(behind_it)] == [1 + 2 + blocks.PAUSES[2], 1 + 2, 2 + blocks.PAUSES[2]]
    assert one[0].tolist() == markers.frame(1, 3, 2)[0].tolist()
    assert one[0, 0] != twenty[0, 0] and one[0, 2] == twenty[0, 2]
    assert twenty[0, blocks.ONES] == markers.ones[1] and one[0, blocks.ONES] == markers.silence[blocks.ONES]
    assert np.array_equal(one[1:], behind_it)  # the digit's block
    assert (one[3:] == markers.silence).all()


@pytest.mark.parametrize(("pitch", "voice"), [(60.0, 0), (120.0, 0), (129.0, 0), (131.0, 1), (207.0, 4), (400.0, 7)])
def test_the_nearest_voice_is_by_pitch(pitch: float, voice: int) -> None:
    assert blocks.voice_of(pitch) == voice


def test_a_row_goes_on_in_the_speakers_voice_and_ends_where_the_sequence_does(
    book: Book, markers: Markers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pins a target one frame late, and a continuation whose end is cut off without `</audio>`."""
    monkeypatch.setattr(recite, "CONTINUATION", 34)
    ninety_nine = _prompt([-1] * 5 + [99, 99, 100], [98, 99], pitch=104.0)
    rows = recite.Rows([ninety_nine], markers, book, seed=0, alone=0.0)
    found = [rows.row(ninety_nine) for _ in range(20)]
    for row in found:
        cut = int(np.flatnonzero((row["said"] != -100).any(1))[0])
        first = 100 if cut == 8 else 99
        marker = markers.frame(first, 0, 1)[0]
        assert row["begin"][cut] == markers.codes[first, 0] and row["said"][cut, 0] == -100
        assert row["begin"][cut + 1] != -100 and row["said"][cut + 1, 0] == -100  # how the block begins is decided, too
        assert row["said"][cut].tolist() == [-100, marker[1], -100, -100, *marker[4:]]
        assert row["manner"][cut].tolist() == [-100, -100, marker[2], marker[3], -100, -100]
        assert (row["manner"][cut + 1 :] == -100).all()
        if first == 99:  # the next marker's decision is of the same kind as the first
            assert row["begin"][cut + 7] == markers.codes[100, 0] == row["given"][cut + 7, 0]
        assert (row["begin"][-1] == CODEC["codebook_size"]) and len(row["begin"]) == len(row["given"]) + 1
        told = row["said"][cut:] != -100
        assert (row["given"][cut:] == row["said"][cut:])[told].mean() > 1 - 8 * recite.CORRUPTED
        assert (row["begin"][6 : cut + 1] != -100).all() and (row["begin"][1:6] == -100).all()
    assert {len(row["given"]) for row in found} == {6 + 12, 7 + 12, 8 + 5}


def test_a_row_without_a_prompt_teaches_what_comes_after_what_was_said(book: Book, markers: Markers) -> None:
    """Pins a demo that loses the thread once the context has slid past the prompt."""
    rows = recite.Rows([], markers, book, seed=0, alone=0.0)
    begin_blocks = {int(block[0, 0]) for said in book.said for block in said}
    ends = set()
    for _ in range(60):
        row = rows.loose()
        begins = np.flatnonzero(row["begin"] != -100)
        assert begins[0] > 0  # something was heard before
        for place in begins[begins < len(row["given"])]:  # a marker, how a block begins, or the frame behind that
            marker, behind = (row["given"][at, 0] in markers.codes[:, 0] for at in (place, place - 1))
            assert marker or behind or row["begin"][place] in begin_blocks or row["begin"][place - 1] in begin_blocks
            if marker and not behind:
                assert row["begin"][place] == row["given"][place, 0]
        told = (row["said"] != -100).any(1)
        if told.any():
            assert np.flatnonzero(told).tolist() == list(range(begins[0], len(row["given"])))
        ends.add(bool(row["begin"][-1] == CODEC["codebook_size"]))
    assert ends == {True, False}


def test_behind_the_end_of_any_prompt_the_marker_alone_tells_what_is_said(book: Book, markers: Markers) -> None:
    """Pins a demo that understands a prompt and cannot say the first word: it had learned words behind words only."""
    prompt = _prompt([-1] * 20 + [7], [6])
    rows = recite.Rows([prompt], markers, book, seed=0, alone=0.0)
    heard = {tuple(frame) for frame in prompt.codes.tolist()}
    found = [row for row in (rows.loose() for _ in range(60)) if tuple(row["given"][0]) in heard]
    assert found
    for row in found:
        cut = int(np.flatnonzero((row["said"] != -100).any(1))[0])
        assert 1 <= cut < 12 and row["given"][cut, 0] in markers.codes[:, 0]
        assert (row["begin"][: cut + 1] == -100).all() and (row["manner"] == -100).all()
        assert row["said"][cut, 0] == -100 and (row["said"][cut + 1, 1:] != -100).all()
        assert row["begin"][cut + 1] != -100 == row["said"][cut + 1, 0] and (row["said"][cut + 2] != -100).all()


def test_most_batches_are_beginnings_which_the_marker_alone_tells(book: Book, markers: Markers) -> None:
    """Pins a first word that is wrong behind the right marker: what stood before it had always given it away, and one
    code in fifty, how a block begins, was lost among those that follow from the code before.
    """
    prompt = _prompt([-1] * 20 + [7], [6])
    rows = recite.Rows([prompt], markers, book, seed=0, alone=0.0)
    said = set()
    for _ in range(200):
        row = rows.beginning()
        cut = int(np.flatnonzero((row["said"] != -100).any(1))[0])
        assert 1 <= cut <= 11 and row["given"][cut, 0] in markers.codes[:, 0]
        item = int(np.flatnonzero(markers.codes[:, 0] == row["given"][cut, 0])[0])
        second = [cut + 3, cut + 4] if len(sequences.ITEMS[item].blocks) == 2 else []  # each block's beginning counts
        decided = [place for place in (cut + 1, *second) if place < len(row["given"])]
        assert np.flatnonzero(row["begin"] != -100).tolist() == decided
        assert np.flatnonzero((row["said"] == -100)[cut:, 0]).tolist() == [0, *(place - cut for place in decided)]
        assert (row["said"][cut + 1 :, 1:] != -100).all() and (row["manner"] == -100).all()
        voice = int(np.flatnonzero(markers.voices == row["given"][cut, 2])[0])
        assert row["begin"][cut + 1] == book.say([sequences.ITEMS[item]], voice, 0)[0][1, 0]
        said.add(len(row["given"]) - cut)
    assert {3, 4, 5} <= said and max(said) > 5
    sizes = [rows.batch(2).given.shape[0] for _ in range(40)]
    assert set(sizes) == {1, 2 * recite.BEGINNINGS_SIZE}  # there is one prompt


def test_losses_are_of_the_positions_that_predict(reciter: Reciter, book: Book, markers: Markers) -> None:
    """Against a plain forward pass, token by token: pins logits that are read one token late."""
    prompt = _prompt([-1, -1, -1, -1, 7, 7], [6])
    rows = recite.Rows([prompt], markers, book, seed=0, alone=0.0)
    row = rows.row(prompt)
    batch = recite.collate([row, recite.lay(prompt, 2, [], False, markers, None)])
    with torch.no_grad():
        found = recite.losses(reciter, batch)
        ids = [*reciter.prefix.tolist()]
        for frame in row["given"]:
            ids += [int(reciter.units[book_number, code]) for book_number, code in enumerate(frame)]
        logits = reciter.model(torch.tensor([ids])).logits[0]
    said: list[float] = []
    for frame, codes in enumerate(row["said"]):
        for number_of_book, code in enumerate(codes):
            if code != -100:
                scores = logits[len(reciter.prefix) - 1 + frame * BOOKS + number_of_book]
                said.append(float(scores.logsumexp(0) - scores[reciter.units[number_of_book, code]]))
    assert float(found["said"]) == pytest.approx(np.mean(said), rel=1e-4)
    begins = []
    for frame, code in enumerate(row["begin"]):
        if code != -100:
            scores = logits[len(reciter.prefix) - 1 + frame * BOOKS]
            token = reciter.end if code == CODEC["codebook_size"] else reciter.units[0, code]
            begins.append(float(scores.logsumexp(0) - scores[token]))
    assert float(found["begin"]) == pytest.approx(np.mean(begins), rel=1e-4)


def test_the_engine_goes_on_as_the_trained_graph_does(codec: Codec, reciter: Reciter) -> None:
    """Greedy, frame by frame through the engine with the end allowed, against one forward pass a token in training's
    graph: pins a codec, positions or a prefix that differ between training and serving.
    """
    pcm = read_audio(PROMPT)[: 30 * FRAME]
    spoken = 5
    with torch.no_grad():
        codes = codec.quantizer.encode(codec.latent(torch.from_numpy(pcm)[None]))[0]
        for _ in range(spoken):
            frame: list[int] = []
            for number_of_book in range(BOOKS):
                given = torch.cat((codes, torch.tensor([frame + [0] * (BOOKS - len(frame))])))
                hidden = reciter.hidden(given[None])[0, len(codes), number_of_book]
                frame.append(int(reciter.logits(hidden[None], number_of_book).argmax()))
            if frame[0] == CODEC["codebook_size"]:  # it ends by itself
                break
            codes = torch.cat((codes, torch.tensor([frame])))
        wanted = codec.synthesise(codes[None])[0, 30 * FRAME :].numpy()
    assert len(codes) < CONTEXT_FRAMES
    with load_engine("demo", device="cpu", max_sessions=1) as engine, engine.open(temperature=0) as session:
        for frame_of_pcm in pcm.reshape(-1, FRAME):
            session.listen(frame_of_pcm)
        heard = np.concatenate([np.zeros(0, np.float32), *session.speak(max_frames=spoken)])
    assert len(heard) == len(wanted)
    assert np.abs(heard - wanted).max(initial=0) <= 1e-3 * np.abs(wanted).max(initial=0)


def test_the_stage_takes_up_what_appears_resumes_and_ends_with_its_budget(
    tmp_path: Path, book: Book, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By CPU seconds of all its runs: pins a stage that begins its schedule anew, and one that needs all of its
    material before it begins.
    """
    monkeypatch.setattr(loop, "_LOG_STEPS", 1)
    counting = [_prompt([-1] * 4 + [place + 1] * 3, [place]) for place in range(1, 7)]
    prompts.save(tmp_path / "prompts" / "001-0000.npz", counting)
    prompts.save(tmp_path / "tests" / "trained" / "codes.npz", counting[:2])

    threads = ("--threads", str(torch.get_num_threads()))

    def run(budget: str) -> list[dict[str, float]]:
        main(["--stage", "recite", "--root", str(tmp_path), "--batch", "2", "--budget", budget, *threads])
        return [json.loads(line) for line in (tmp_path / "stages" / "recite.jsonl").read_text().splitlines()]

    first = run("1.0")
    assert first[0]["begin"] > 0 and "said" not in first[0]  # there are no blocks yet
    assert first[-1]["kind"] == "check" and 0 <= first[-1]["trained"] <= 1 and 0 <= first[-1]["trained voice"] <= 1
    named = {f"{voice}-{block}": codes for voice, said in enumerate(book.said) for block, codes in enumerate(said)}
    np.savez(tmp_path / "blocks.npz", **named)  # type: ignore[arg-type]
    both = run("2.5")
    assert both[-1]["steps"] > first[-1]["steps"] and both[-1]["seconds"] >= 2.5
    assert any("said" in row for row in both[len(first) :])
    assert run("2.5")[-1]["steps"] == both[-1]["steps"]


def test_what_is_shipped_draws_more_surely_at_the_default_sampling_that_it_names(
    tmp_path: Path, reciter: Reciter
) -> None:
    """Pins an export whose temperature is the training's, where one draw in some hundred breaks a word; and weights
    that are sharper each time that training goes on from what is shipped.
    """
    recite.ship(tmp_path / "stages", tmp_path / "made", torch.float32)
    made = Reciter(shipped.language_model(tmp_path / "made"))
    codes = torch.randint(CODEC["codebook_size"], (1, 3, BOOKS), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        trained, after, before = (
            some.logits(some.hidden(codes)[0, 3, :1], 0) for some in (recite.reciter(), made, reciter)
        )
    assert after == pytest.approx(trained * recite.SHARPNESS, rel=1e-3, abs=1e-3)
    assert after == pytest.approx(before, rel=1e-3, abs=1e-3)
    named = sampling_of(tmp_path / "made" / "decoder")
    assert (named["temperature"], named["top_k"]) == (Sampling().temperature, Sampling().top_k)
    assert sum(file.stat().st_size for file in (tmp_path / "made").rglob("*.json")) < 2_000_000


def test_blocks_are_recalled_as_they_were_said_most_often() -> None:
    """Without the blocks, training that goes on from shipped weights would make others, all to be learned anew."""
    says = np.arange(6 * BOOKS).reshape(6, BOOKS)  # each block of its own length
    book = {block: says[: 2 + number % 4] + number for number, block in enumerate(sequences.BLOCKS)}
    whole = [np.concatenate([book[block] for block in item.blocks]) for item in sequences.ITEMS]
    wrong = [np.zeros_like(said) if place % 3 else said[:-1] for place, said in enumerate(whole)]
    for block, recalled in zip(sequences.BLOCKS, recall._parted([whole, wrong, whole]), strict=True):
        assert np.array_equal(recalled, book[block]), block
    assert not len(recall._parted([[said[:0] for said in whole]])[0])


def test_an_item_that_is_recalled_ends_where_its_pause_begins(markers: Markers) -> None:
    with torch.no_grad():
        said = recall.items(recite.reciter(), markers, 2, 12, range(1, 4))
    assert all(3 <= len(codes) <= 9 for codes in said), "one, two and three, at half a second each"
    assert all((codes[-1] != markers.silence).any() for codes in said)
