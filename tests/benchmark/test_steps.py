"""Step times by the number of sessions: read from a measurement, or computed."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import MethodType
from typing import cast

import numpy as np
import pytest
import torch

from streaming.benchmark import machine, step
from streaming.benchmark.__main__ import main
from streaming.benchmark.full import FullStep
from streaming.benchmark.steps import ROOFLINES, StepsError, computed, curve, measured, series_name
from streaming.benchmark.work import work_of
from streaming.models.llama import LlamaDecoder
from streaming.models.mimi import StreamingMimi

ROOT = Path(__file__).parents[2]
MEASURED = ROOT / "docs" / "results" / "steps-demo-two-cores.json"


def written(tmp_path: Path, **times_ms: list[float]) -> Path:
    path = tmp_path / "steps.json"
    series = {series_name(int(name[1:]), "whole step, speaking"): times for name, times in times_ms.items()}
    path.write_text(json.dumps({"series": series | {series_name(64, "whole step, listening"): [1.0]}}))
    return path


def test_between_two_numbers_of_sessions_times_lie_between_theirs(tmp_path: Path) -> None:
    steps = measured(written(tmp_path, n4=[40.0, 50.0, 60.0], n1=[10.0, 20.0, 30.0]))
    assert steps.widths == (1, 4), "and not those of another stage"
    median = np.full(3, 0.5)
    assert steps.quantile_ms(np.array([1, 2, 4]), median).tolist() == [20.0, 30.0, 50.0]
    assert steps.quantile_ms(np.array([2]), np.array([1.0])).tolist() == [40.0]
    assert steps.carries == 4
    with pytest.raises(StepsError, match="4 sessions at most"):
        steps.quantile_ms(np.array([5]), np.array([0.5]))


def test_a_server_carries_what_keeps_a_frame_in_time(tmp_path: Path) -> None:
    """The 99th percentile decides, as in `capacity`, and not the mean."""
    steps = measured(written(tmp_path, n1=[20.0], n3=[70.0] * 98 + [90.0] * 2, n2=[50.0]))
    assert steps.carries == 2 and steps.late(3) == pytest.approx(0.02, abs=0.01) and steps.late(2) == 0
    assert measured(written(tmp_path, n1=[100.0])).carries == 0
    assert measured(written(tmp_path, n1=[80.0])).carries == 0, "as long as a frame is late for the next one"


@pytest.mark.parametrize("text", ["", "{}", '{"series": {}}', '{"series": {"whole step, speaking, 1": []}}', "[1]"])
def test_a_file_without_step_times_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(StepsError, match=r"step --json"):
        curve(str(path), 1.0)


def test_what_step_writes_is_what_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage that gets another name there has no times here."""
    monkeypatch.setattr(machine, "block_to_read", lambda _: torch.ones(1000))
    monkeypatch.setattr(machine, "matrix_rate", lambda *_: 1e11)
    path = tmp_path / "steps.json"
    assert main(["step", "--slots", "1", "2", "--seconds", "0.01", "--json", str(path)]) == 0
    steps = measured(path)
    assert steps.widths == (1, 2) and all(len(times) >= 3 for times in steps.times_ms)


def test_a_step_s_table_is_its_times_against_the_floors_of_its_stages(
    codec: StreamingMimi, decoder: LlamaDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pins a share that is upside down, and a bandwidth counted in numbers instead of bytes: what is published is how
    near a step comes to what the machine can do.
    """
    block = torch.ones(1_000_000)
    taken = {"codec encode": 4.0, "codec decode": 5.0, "decoder, listening": 6.0, "decoder, speaking": 7.0}
    taken |= {
        "decoder, speaking and drawing": 8.0,
        "whole step, listening": 20.0,
        "whole step, speaking": 30.0,
        "reading": 2.0,
    }
    monkeypatch.setattr(step, "_load", lambda _: step._Models("tiny", codec, decoder))
    monkeypatch.setattr(machine, "block_to_read", lambda _: block)
    monkeypatch.setattr(machine, "matrix_rate", lambda *_: 1e30)
    monkeypatch.setattr(machine, "interleaved", lambda runs, *_: {name: [taken[name]] * 3 for name in runs})
    options = argparse.Namespace(
        slots=[2], seconds=1.0, context_tokens=82, codec_dtype="float32", quantize="none", random="mimi"
    )
    report = step.measure(options)
    assert report.facts["GB/s"] == pytest.approx(2.0), "4 MB in 2 ms"
    rows = {str(row["stage"]): row for row in report.rows}
    for name, row in rows.items():
        assert row["ms"] == taken[name] and row["share of floor"] == pytest.approx(row["floor ms"] / taken[name])
    reads = {stage.name: stage.work.read_bytes for stage in _stages_of(codec, decoder) if stage.work}
    for name, read in reads.items():
        assert rows[name]["floor ms"] == pytest.approx(1e3 * read / 2e9), name
    whole = rows["whole step, listening"]["floor ms"]
    assert whole == pytest.approx(
        sum(rows[n]["floor ms"] for n in ("codec encode", "decoder, listening", "codec decode"))
    )


def _stages_of(codec: StreamingMimi, decoder: LlamaDecoder) -> list[step._Stage]:
    return step._stages(step._Models("tiny", codec, decoder), 2, argparse.Namespace(context_tokens=82))


def test_the_whole_step_is_measured_over_full_contexts_the_codec_s_too(
    codec: StreamingMimi, decoder: LlamaDecoder
) -> None:
    """The decoder's context was full and the codec's empty: the whole step was cheaper than in a long conversation, and
    than the sum of its stages.
    """
    whole = [stage.run for stage in _stages_of(codec, decoder) if stage.parts]
    assert len(whole) == 2
    for run in whole:
        full = cast(MethodType, run).__self__
        assert isinstance(full, FullStep)
        state = full.step._device
        assert bool((state.decoder_state.frames[:2] == 20).all())
        for half in (state.codec_state.encoder, state.codec_state.decoder):
            assert bool((half.frames[:2] >= codec.config.window).all())


def test_a_stage_s_floor_counts_all_keys_and_values_that_its_slots_hold(
    codec: StreamingMimi, decoder: LlamaDecoder
) -> None:
    """Counted without the values, for one token a frame, or once for all codebooks, a step's floor is lower than any
    machine's, and the share of it that is published too small.
    """
    options = argparse.Namespace(context_tokens=2 + 4 * 50)
    stages = {stage.name: stage for stage in step._stages(step._Models("tiny", codec, decoder), 3, options)}
    position = 3 * 2 * 2 * 2 * 16 * 4  # slots, keys and values, layers, heads, their size, float32

    def state_bytes(name: str, model: StreamingMimi | LlamaDecoder) -> int:
        """What a stage reads beside the model's weights."""
        work = stages[name].work
        assert work is not None
        return work.read_bytes - work_of(stages[name].run, model).read_bytes

    assert state_bytes("decoder, listening", decoder) == 50 * 4 * position
    assert state_bytes("decoder, speaking", decoder) == 4 * 50 * 4 * position, "each of four passes reads all of them"
    assert state_bytes("codec encode", codec) == state_bytes("codec decode", codec) == 20 * position
    assert state_bytes("decoder, speaking and drawing", decoder) == 4 * 50 * 4 * position
    assert set(stages["whole step, speaking"].parts) == {
        "codec encode",
        "codec decode",
        "decoder, speaking and drawing",
    }
    assert set(stages["whole step, listening"].parts) == {"codec encode", "codec decode", "decoder, listening"}


def test_a_run_of_a_file_of_results_is_read(tmp_path: Path) -> None:
    """What was measured on a device that was lent for minutes is there, and nowhere else."""
    report = json.loads(written(tmp_path, n1=[20.0, 21.0]).read_text())
    path = tmp_path / "device.json"
    runs = {"step 1.3b": {"outcome": "ok", "report": report}, "step 8b": {"outcome": "failed with status 1"}}
    path.write_text(json.dumps({"device": "a GPU", "runs": runs}))
    steps = curve(f"{path}:step 1.3b", 1.0)
    assert (steps.widths, steps.name) == ((1,), "measured: device.json, step 1.3b")
    for run in ("step 8b", "step 70b"):
        with pytest.raises(StepsError, match=run):
            curve(f"{path}:{run}", 1.0)


def test_what_was_measured_is_what_the_page_says() -> None:
    steps = measured(MEASURED)
    assert steps.name.startswith("measured") and min(map(len, steps.times_ms)) >= 30
    medians = [float(np.median(times)) for times in steps.times_ms]
    assert medians == sorted(medians), "more sessions take longer"
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    row = next(line for line in page.splitlines() if line.startswith("| step, p50, ms |"))
    told = [float(cell) for cell in row.split("|")[2:-1]]
    assert told == [round(median) for median in medians]


def test_what_is_computed_is_what_the_page_of_figures_predicts() -> None:
    """docs/performance.md has 2.65 ms to read 1.3B with one full window, 34 GB of context at 256, 18.5 ms for 8B."""
    small, large = ROOFLINES["1.3b-h100"], ROOFLINES["8b-h100"]
    assert 1e3 * (small.weight_bytes + small.context_bytes) / small.bytes_per_s == pytest.approx(2.65, abs=0.03)
    assert 256 * small.context_bytes == pytest.approx(34e9, rel=0.02)
    assert 1e3 * large.weight_bytes / large.bytes_per_s == pytest.approx(18.5, abs=0.2)
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    for name in ROOFLINES:
        for share in (1.0, 0.35, 0.15):
            steps = computed(name, share)
            assert steps.name.startswith("computed") and steps.carries == computed(name, share).carries
            assert f"| {name}, {100 * share:g} % |" in page
            row = next(line for line in page.splitlines() if line.startswith(f"| {name}, {100 * share:g} % |"))
            assert row.split("|")[2:4] == [f" {steps.times_ms[0][0]:.1f} ms ", f" {steps.carries} "]


def test_a_computed_curve_may_vary_as_a_measured_one() -> None:
    still, lively = computed("1.3b-h100", 0.35), computed("1.3b-h100", 0.35, measured(MEASURED))
    assert "spread measured" in lively.name and "measured" not in still.name
    assert np.median(lively.times_ms[3]) == pytest.approx(still.times_ms[3][0], rel=0.02)
    assert 0 < lively.carries < still.carries, "what varies is in time for fewer"
