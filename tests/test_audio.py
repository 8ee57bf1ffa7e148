"""PCM values: conversion, framing, resampling, audio files in, WAV files out."""

from __future__ import annotations

import contextlib
import functools
import sys
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import torchaudio
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from streaming.audio import (
    FRAME,
    FRAME_RATE,
    SAMPLE_RATE,
    AudioReader,
    Framer,
    RecordingResampler,
    Resampler,
    WavWriter,
    level_dbfs,
    read_audio,
    to_float,
    to_int16,
)
from streaming.errors import AudioError


def tone(rate: float, seconds: float, hz: float = 440.0, amplitude: float = 0.5) -> NDArray[np.float32]:
    t = np.arange(round(rate * seconds)) / rate
    return (amplitude * np.sin(2 * np.pi * hz * t)).astype(np.float32)


def test_a_frame_is_eighty_milliseconds() -> None:
    assert SAMPLE_RATE / FRAME == FRAME_RATE


class TestConversion:
    def test_int16_survives_the_way_to_float_and_back(self) -> None:
        """Scaling by 32,767 one way and 32,768 the other loses a step at every conversion."""
        every = np.arange(-32_768, 32_768).astype(np.int16)
        np.testing.assert_array_equal(to_int16(to_float(every)), every)

    def test_full_scale_and_beyond_are_clipped(self) -> None:
        """1.0 wraps around to -32,768 when it is cast without clipping: a loud click."""
        loud = np.array([1.0, -1.0, 1.5, -7.0, 3e38], np.float32)
        assert to_int16(loud).tolist() == [32_767, -32_768, 32_767, -32_768, 32_767]

    def test_what_is_not_a_number_is_silence(self) -> None:
        bad = np.array([np.nan, np.inf, -np.inf], np.float32)
        assert to_int16(bad).tolist() == [0, 32_767, -32_768]

    def test_samples_are_rounded_not_cut(self) -> None:
        """Cutting towards zero adds distortion that rounding does not."""
        assert to_int16(np.array([0.9 / 32_768, -0.9 / 32_768], np.float32)).tolist() == [1, -1]


class TestLevel:
    def test_silence_and_nothing_have_the_floor(self) -> None:
        assert level_dbfs(np.zeros(480, np.int16)) == level_dbfs(np.zeros(0, np.float32)) == -96.0

    def test_a_full_scale_sine_has_minus_three(self) -> None:
        assert level_dbfs(tone(SAMPLE_RATE, 1.0, amplitude=1.0)) == pytest.approx(-3.01, abs=0.01)

    def test_broken_samples_give_a_level(self) -> None:
        assert level_dbfs(np.array([np.nan, np.inf, 1e38], np.float32)) <= 0.0


class TestFramer:
    @given(st.lists(st.integers(0, 5_000), max_size=12), st.booleans())
    def test_frames_are_the_pieces_whatever_their_sizes(self, sizes: list[int], as_float: bool) -> None:
        samples = np.arange(sum(sizes)).astype(np.int16)
        framer: Framer[Any] = Framer[Any](np.float32) if as_float else Framer[Any](np.int16)
        frames: list[NDArray[Any]] = []
        begin = 0
        for size in sizes:
            frames.extend(framer.push(samples[begin : begin + size]))
            begin += size
        assert framer.pending_samples == len(samples) % FRAME
        assert all(frame.shape == (FRAME,) for frame in frames)
        together = to_int16(np.concatenate([np.zeros(0, np.int16), *frames, framer.flush()]))
        np.testing.assert_array_equal(together, samples)
        assert framer.pending_samples == len(framer.flush()) == 0

    def test_frames_are_not_views_of_what_is_still_to_come(self) -> None:
        """A frame that shares memory with the framer's rest changes when the caller's buffer is used again."""
        framer = Framer(np.int16)
        buffer = np.ones(FRAME + 5, np.int16)
        framer.push(buffer)
        buffer[:] = 9
        np.testing.assert_array_equal(framer.flush(), np.ones(5))


class TestResampler:
    @pytest.mark.parametrize("rate", [8_000, 16_000, 44_100, 48_000])
    @pytest.mark.parametrize("quality", ["LQ", "HQ"])
    def test_a_tone_stays_a_tone(self, rate: int, quality: str) -> None:
        resampler = Resampler(rate, quality=quality)  # type: ignore[arg-type]
        source = tone(rate, 0.5)
        pieces = [resampler.push(source[begin : begin + 441]) for begin in range(0, len(source), 441)]
        result = np.concatenate([*pieces, resampler.flush()])
        assert abs(len(result) - SAMPLE_RATE // 2) <= 2
        middle = slice(1_000, -1_000)
        np.testing.assert_allclose(result[middle], tone(SAMPLE_RATE, 0.5)[: len(result)][middle], atol=2e-3)

    def test_equal_rates_change_nothing_and_need_no_soxr(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "soxr", None)
        source = tone(SAMPLE_RATE, 0.1)
        resampler = Resampler(SAMPLE_RATE)
        assert resampler.push(source) is source
        assert len(resampler.flush()) == 0

    def test_a_missing_soxr_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "soxr", None)
        with pytest.raises(AudioError, match="pip install soxr"):
            Resampler(48_000)

    def test_after_flush_it_is_as_new(self) -> None:
        """A resampler that keeps the last turn's tail begins the next one with a click."""
        resampler = Resampler(SAMPLE_RATE, 48_000)
        source = tone(SAMPLE_RATE, 0.1)
        first = np.concatenate([resampler.push(source), resampler.flush()])
        second = np.concatenate([resampler.push(source), resampler.flush()])
        np.testing.assert_array_equal(first, second)


@functools.lru_cache(maxsize=1)  # a table of taps may take 60 MB, and seconds
def _resample(rate: int) -> torchaudio.transforms.Resample:
    return torchaudio.transforms.Resample(rate, SAMPLE_RATE)


def torchaudios(samples: NDArray[np.float32], rate: int) -> NDArray[np.float32]:
    """Return a wave resampled as the published script does."""
    resampled: NDArray[np.float32] = _resample(rate)(torch.from_numpy(samples)).numpy()
    return resampled


class TestRecordingResampler:
    @pytest.mark.parametrize(
        "rate", [8_000, 11_025, 16_000, 22_050, 22_254, 24_000, 32_000, 44_100, 48_000, 88_200, 96_000, 192_000]
    )
    def test_it_is_torchaudios_whatever_the_pieces(self, rate: int) -> None:
        """Pins another filter than the published script's, which gives other codes; an end that is a sample short; and
        a seam between pieces. A second recording begins as new.
        """
        random = np.random.default_rng(rate)
        resampler = RecordingResampler(rate)
        for length in (1, 2, 7, 333, *random.integers(1, rate, 3)):
            samples = (0.3 * random.standard_normal(int(length))).astype(np.float32)
            cuts = np.sort(random.integers(0, length + 1, 8))
            pieces = [resampler.push(piece) for piece in np.split(samples, cuts)]
            ours, wanted = np.concatenate([*pieces, resampler.flush()]), torchaudios(samples, rate)
            assert ours.dtype == np.float32 and ours.shape == wanted.shape, length
            np.testing.assert_allclose(ours, wanted, rtol=0, atol=3e-7)

    @given(st.lists(st.integers(0, 400), max_size=8))
    def test_pieces_make_no_difference_to_the_last_bit(self, sizes: list[int]) -> None:
        samples = np.random.default_rng(1).standard_normal(sum(sizes)).astype(np.float32)
        one, other = RecordingResampler(44_100), RecordingResampler(44_100)
        pieces = [one.push(piece) for piece in np.split(samples, np.cumsum(sizes[:-1]))] if sizes else []
        ours = np.concatenate([*pieces, one.flush()])
        np.testing.assert_array_equal(ours, np.concatenate([other.push(samples), other.flush()]))

    def test_rates_without_a_common_divisor_take_no_gigabytes(self) -> None:
        """torchaudio's table of taps has a billion entries here; those that are not zero are 700,000."""
        resampler = RecordingResampler(44_101)
        source = tone(44_101, 0.5)
        result = np.concatenate([resampler.push(source), resampler.flush()])
        middle = slice(1_000, -1_000)
        np.testing.assert_allclose(result[middle], tone(SAMPLE_RATE, 0.5)[: len(result)][middle], atol=2e-3)


class TestReading:
    @pytest.mark.parametrize(("rate", "channels"), [(16_000, 1), (44_100, 2), (24_000, 2), (48_000, 1)])
    def test_a_recording_is_what_the_published_script_makes_of_it(
        self, tmp_path: Path, rate: int, channels: int
    ) -> None:
        """The mean of its channels is taken first. None of it needs soxr."""
        source = 0.3 * np.random.default_rng(0).standard_normal((rate + 77, channels))
        soundfile.write(tmp_path / "a.wav", source, rate, subtype="PCM_16")
        samples, _ = soundfile.read(tmp_path / "a.wav", dtype="float32", always_2d=True)
        wanted = torchaudios(samples.mean(axis=1), rate)
        np.testing.assert_allclose(read_audio(tmp_path / "a.wav"), wanted, rtol=0, atol=3e-7)

    @pytest.mark.parametrize(
        ("rate", "channels", "subtype", "whole"),
        [
            (24_000, 1, "PCM_16", True),
            (24_000, 2, "PCM_16", False),
            (16_000, 1, "PCM_16", False),
            (24_000, 1, "PCM_24", False),
        ],
    )
    def test_it_tells_whether_sixteen_bits_hold_it(
        self, tmp_path: Path, rate: int, channels: int, subtype: str, whole: bool
    ) -> None:
        soundfile.write(tmp_path / "a.wav", np.zeros((rate, channels)), rate, subtype=subtype)
        with AudioReader(tmp_path / "a.wav") as reader:
            assert reader.sixteen_bits is whole

    @pytest.mark.parametrize(
        ("name", "rate", "channels", "subtype"),
        [
            ("a.wav", 8_000, 1, "PCM_16"),
            ("a.wav", 16_000, 1, "PCM_24"),
            ("a.wav", 24_000, 1, "PCM_16"),
            ("a.wav", 44_100, 2, "PCM_16"),
            ("a.wav", 48_000, 2, "FLOAT"),
            ("a.wav", 48_000, 6, "PCM_32"),
            ("a.wav", 22_050, 1, "PCM_U8"),
            ("a.flac", 44_100, 2, "PCM_16"),
            ("a.ogg", 48_000, 1, "VORBIS"),
            ("a.aiff", 32_000, 1, "PCM_16"),
        ],
    )
    def test_any_rate_channels_and_format(
        self, tmp_path: Path, name: str, rate: int, channels: int, subtype: str
    ) -> None:
        source = np.repeat(tone(rate, 0.5)[:, None], channels, axis=1)
        soundfile.write(tmp_path / name, source, rate, subtype=subtype)
        samples = read_audio(tmp_path / name)
        assert samples.dtype == np.float32
        assert abs(len(samples) - SAMPLE_RATE // 2) <= 2
        expected = tone(SAMPLE_RATE, 0.5)[: len(samples)]
        coarse = subtype in ("PCM_U8", "VORBIS")
        np.testing.assert_allclose(samples[1_000:-1_000], expected[1_000:-1_000], atol=0.05 if coarse else 2e-3)

    def test_channels_are_mixed_by_their_mean(self, tmp_path: Path) -> None:
        """Adding channels clips; taking the first loses whoever speaks into the second."""
        stereo = np.stack([np.full(2_400, 0.5), np.full(2_400, 0.0)], axis=1)
        soundfile.write(tmp_path / "a.wav", stereo, SAMPLE_RATE, subtype="FLOAT")
        np.testing.assert_allclose(read_audio(tmp_path / "a.wav"), 0.25)

    def test_a_long_file_comes_in_small_blocks(self, tmp_path: Path) -> None:
        soundfile.write(tmp_path / "a.wav", tone(48_000, 5.0), 48_000)
        with AudioReader(tmp_path / "a.wav") as reader:
            assert reader.seconds == pytest.approx(5.0)
            assert max(len(block) for block in reader.blocks()) < SAMPLE_RATE

    def test_samples_that_are_not_numbers_are_silence(self, tmp_path: Path) -> None:
        soundfile.write(tmp_path / "a.wav", np.full(4_800, np.nan, np.float32), 48_000, subtype="FLOAT")
        assert not read_audio(tmp_path / "a.wav").any()

    def test_a_missing_file_is_told(self, tmp_path: Path) -> None:
        with pytest.raises(AudioError, match=r"nowhere\.wav: no such file"):
            read_audio(tmp_path / "nowhere.wav")

    def test_a_directory_is_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(AudioError, match="not a file"):
            read_audio(tmp_path)

    @pytest.mark.parametrize("content", [b"", b"not audio at all", bytes(range(256)) * 64])
    def test_what_is_not_audio_is_told(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "a.wav").write_bytes(content)
        with pytest.raises(AudioError, match=r"a\.wav: not an audio file"):
            read_audio(tmp_path / "a.wav")

    def test_a_raw_name_is_not_taken_for_headerless_audio(self, tmp_path: Path) -> None:
        """soundfile goes by the name of a path and asks for a rate with a TypeError."""
        (tmp_path / "a.raw").write_bytes(bytes(1_000))
        with pytest.raises(AudioError, match="not an audio file"):
            read_audio(tmp_path / "a.raw")

    @pytest.mark.parametrize("rate", [1, 999, 768_001, 2**31 - 1])
    def test_a_rate_that_is_none_of_audio(self, tmp_path: Path, rate: int) -> None:
        """At a rate of 1 Hz, 8 KB became 384 MB."""
        path = tmp_path / "odd.wav"
        soundfile.write(path, np.zeros(4000, np.int16), rate)
        with pytest.raises(AudioError, match=f"{rate} Hz is not a sample rate of audio"):
            read_audio(path)

    def test_a_file_without_samples_is_told(self, tmp_path: Path) -> None:
        soundfile.write(tmp_path / "a.wav", np.zeros(0), 48_000)
        with pytest.raises(AudioError, match="holds no audio"):
            read_audio(tmp_path / "a.wav")

    def test_a_file_that_is_damaged_in_the_middle(self, tmp_path: Path) -> None:
        rng = np.random.default_rng(0)
        soundfile.write(tmp_path / "a.flac", 0.1 * rng.standard_normal(48_000), 48_000)
        whole = (tmp_path / "a.flac").read_bytes()
        (tmp_path / "a.flac").write_bytes(whole[: len(whole) // 2])
        with pytest.raises(AudioError, match="damaged"):
            read_audio(tmp_path / "a.flac")

    def test_a_missing_soundfile_is_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "soundfile", None)
        with pytest.raises(AudioError, match="pip install soundfile"):
            AudioReader(tmp_path / "a.wav")


class TestWriting:
    def test_what_is_written_is_read(self, tmp_path: Path) -> None:
        with WavWriter(tmp_path / "a.wav") as wav:
            wav.write(np.array([1, -2], np.int16))
            wav.write(np.array([0.5], np.float32))
        with wave.open(str(tmp_path / "a.wav")) as file:
            assert file.getparams()[:4] == (1, 2, SAMPLE_RATE, 3)
            assert np.frombuffer(file.readframes(3), "<i2").tolist() == [1, -2, 16_384]
        assert [path.name for path in tmp_path.iterdir()] == ["a.wav"]

    def test_two_channels_are_written_side_by_side(self, tmp_path: Path) -> None:
        with WavWriter(tmp_path / "a.wav", channels=2) as wav:
            wav.write(np.array([[1, 2], [3, 4]], np.int16))
        samples, _ = soundfile.read(tmp_path / "a.wav", dtype="int16")
        assert samples.tolist() == [[1, 2], [3, 4]]

    def test_nothing_is_there_before_it_is_whole(self, tmp_path: Path) -> None:
        with WavWriter(tmp_path / "a.wav") as wav:
            wav.write(np.zeros(10, np.int16))
            assert not (tmp_path / "a.wav").exists()
        assert (tmp_path / "a.wav").exists()

    def test_a_failure_leaves_the_older_file_and_nothing_else(self, tmp_path: Path) -> None:
        """A half-written WAV under the final name is taken for the result by whoever looks only at the name."""
        (tmp_path / "a.wav").write_bytes(b"older")
        with contextlib.suppress(RuntimeError), WavWriter(tmp_path / "a.wav") as wav:
            wav.write(np.zeros(10, np.int16))
            raise RuntimeError
        assert [path.name for path in tmp_path.iterdir()] == ["a.wav"]
        assert (tmp_path / "a.wav").read_bytes() == b"older"

    def test_a_missing_directory_is_told(self, tmp_path: Path) -> None:
        with pytest.raises(AudioError, match="there is no directory"):
            WavWriter(tmp_path / "nowhere" / "a.wav")

    def test_a_device_is_not_replaced(self) -> None:
        """Renaming onto /dev/null as root breaks the machine."""
        with pytest.raises(AudioError, match="not a file that can be replaced"):
            WavWriter("/dev/null")

    def test_a_link_stays_a_link(self, tmp_path: Path) -> None:
        (tmp_path / "there").mkdir()
        (tmp_path / "a.wav").symlink_to(tmp_path / "there" / "b.wav")
        with WavWriter(tmp_path / "a.wav") as wav:
            wav.write(np.zeros(1, np.int16))
        assert (tmp_path / "a.wav").is_symlink()
        assert (tmp_path / "there" / "b.wav").is_file()
