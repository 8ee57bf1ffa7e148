"""`--quantize auto`: what is measured, chosen for it, kept, and said. No timing decides here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from streaming import loading, quantize_auto
from streaming.errors import StreamingError, TooLargeError
from streaming.memory import Memory
from streaming.models.operations.native import library as native
from streaming.models.quantized_weights import Quantize
from streaming.quantize_auto import KINDS, choose, least_s, product_s, warn_if_slower


class _Machine:
    """Take so many milliseconds for a step with each kind of weights."""

    def __init__(self, none: float, int8: float, int4: float, products: float = 0.0) -> None:
        """products: which share of a step's time they are known to take."""
        self.ms, self.products = {"none": none, "int8": int8, "int4": int4}, products
        self.asked: list[Quantize] = []
        self.bounded: list[Quantize] = []

    def least(self, kind: Quantize) -> float:
        self.bounded.append(kind)
        return self.products * self.ms[kind] / 1e3

    def __call__(self, kind: Quantize) -> float:
        self.asked.append(kind)
        return self.ms[kind] / 1e3


def chosen(machine: _Machine, file: Path | None = None, key: str = "key", kinds: Sequence[Quantize] = KINDS) -> str:
    return choose(kinds, machine, machine.least, 0.08, 0.8, "A GPU", key, file)


@pytest.mark.parametrize(
    ("none", "int8", "int4", "kind", "asked"),
    [
        (60.0, 40.0, 20.0, "none", 1),
        (70.0, 64.0, 30.0, "int8", 2),
        (200.0, 100.0, 55.0, "int4", 3),
        (200.0, 100.0, 70.0, "int4", 3),
        (200.0, 170.0, 190.0, "int8", 3),
        (100.0, 150.0, 190.0, "none", 3),
    ],
)
def test_the_least_loss_that_is_fast_enough_is_taken(
    none: float, int8: float, int4: float, kind: str, asked: int
) -> None:
    """Pins int4 where bfloat16 would do, and integers on a processor that is slower with them."""
    machine = _Machine(none, int8, int4)
    assert chosen(machine) == kind
    assert machine.asked == list(KINDS[:asked])


@pytest.mark.parametrize(
    ("none", "int8", "int4", "kind", "asked"),
    [
        (60.0, 40.0, 20.0, "none", ["none"]),
        (200.0, 100.0, 55.0, "int4", ["int8", "int4"]),
        (400.0, 200.0, 55.0, "int4", ["int4"]),
        (400.0, 200.0, 100.0, "int4", ["int4"]),
        (200.0, 400.0, 500.0, "none", ["none"]),
    ],
)
def test_what_is_too_slow_by_its_products_alone_is_not_measured(
    none: float, int8: float, int4: float, kind: str, asked: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Pins 22 s of a start for reading weights that are far too many for this machine."""
    file, machine = tmp_path / "seconds.json", _Machine(none, int8, int4, products=0.5)
    with caplog.at_level("INFO"):
        assert chosen(machine, file) == kind
    assert machine.asked == asked
    assert ("none is too slow by its products alone" in caplog.messages[-1]) == ("none" not in asked)
    assert chosen(machine, file) == kind
    assert machine.asked == asked


def test_it_says_what_it_took_and_why(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        chosen(_Machine(90.0, 50.0, 30.0))
    assert caplog.messages[-1] == (
        "--quantize auto takes int8: a step of one session takes 50 ms of a frame's 80 (none 90); "
        "what loses less is too slow here; measured now"
    )


@pytest.mark.parametrize(("int4", "says"), [(120.0, "it will stutter"), (75.0, "leaves no room")])
def test_where_nothing_is_fast_enough_it_says_so_and_what_would_help(
    int4: float, says: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Pins a server that starts without a word and stutters."""
    chosen(_Machine(300.0, 200.0, int4))
    (record,) = caplog.records
    assert record.levelname == "WARNING" and says in record.message and "A GPU would help" in record.message
    assert f"int4: a step of one session takes {int4:.0f} ms of a frame's 80 (none 300, int8 200)" in record.message


def test_products_are_timed_once_a_kind() -> None:
    """Pins a bound that was taken twice: a busy machine gave int4 923 ms, and 91 when the fastest was looked for."""
    machine = _Machine(300.0, 200.0, 120.0, products=0.9)
    assert chosen(machine) == "int4"
    assert machine.bounded == list(KINDS) and machine.asked == ["int4"]


def test_what_was_measured_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Pins seconds lost at every start, and a choice that moves with what else the machine does."""
    file = tmp_path / "seconds.json"
    assert chosen(_Machine(90.0, 50.0, 30.0), file) == "int8"
    later = _Machine(1.0, 1.0, 1.0)
    with caplog.at_level("INFO"):
        assert chosen(later, file) == "int8"
    assert later.asked == []
    assert f"measured at an earlier start, see {file}" in caplog.text
    assert list(tmp_path.iterdir()) == [file]


def test_another_model_or_machine_is_measured_anew(tmp_path: Path) -> None:
    file = tmp_path / "seconds.json"
    assert chosen(_Machine(90.0, 50.0, 30.0), file, "one") == "int8"
    assert chosen(_Machine(20.0, 15.0, 10.0), file, "other") == "none"
    assert chosen(_Machine(1.0, 1.0, 1.0), file, "one") == "int8"


def test_a_kind_that_was_not_measured_before_is_measured_now(tmp_path: Path) -> None:
    """Pins what did not fit into memory at the first start and does now."""
    file = tmp_path / "seconds.json"
    assert chosen(_Machine(90.0, 50.0, 30.0), file, kinds=KINDS[1:]) == "int8"
    later = _Machine(40.0, 1.0, 1.0)
    assert chosen(later, file) == "none"
    assert later.asked == ["none"]


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{", '{"key": 3}', '{"key": {"none": "fast"}}', '{"key": {"none": NaN}}', '{"key": {"none": -1.0}}'],
)
def test_a_damaged_file_costs_a_measurement_and_nothing_else(tmp_path: Path, content: str) -> None:
    file = tmp_path / "seconds.json"
    file.write_text(content)
    machine = _Machine(90.0, 50.0, 30.0)
    assert chosen(machine, file) == "int8"
    assert machine.asked == ["none", "int8"]
    assert json.loads(file.read_text())["key"] == {"none": 0.09, "int8": 0.05}


def test_a_folder_that_cannot_be_written_to_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert chosen(_Machine(90.0, 50.0, 30.0), tmp_path / "nowhere" / "seconds.json") == "int8"
    assert "could not be kept" in caplog.text


def test_the_file_does_not_grow_for_ever(tmp_path: Path) -> None:
    file = tmp_path / "seconds.json"
    for key in range(70):
        chosen(_Machine(1.0, 1.0, 1.0), file, str(key))
    kept = json.loads(file.read_text())
    assert len(kept) == 64 and "69" in kept and "0" not in kept


class _Library:
    def __init__(self, instructions: str) -> None:
        self.native_instructions = instructions.encode


@pytest.mark.parametrize(
    ("instructions", "kind", "ms", "warns"),
    [
        ("SSE2", "int8", 9.0, True),
        ("SSE2", "int8", 4.0, False),
        ("NEON", "int4", 9.0, True),
        ("NEON", "none", 9.0, False),
        ("AVX2", "int8", 9.0, False),
    ],
)
def test_integers_that_are_slower_than_float32_are_told(
    instructions: str,
    kind: Quantize,
    ms: float,
    warns: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Pins an old processor on which --quantize makes things worse in silence."""
    monkeypatch.setattr(quantize_auto, "library", lambda: _Library(instructions))
    warn_if_slower(kind, lambda tried: 5e-3 if tried == "none" else ms / 1e3)
    assert ("slower than float32" in caplog.text) == warns
    assert not warns or f"({instructions}): 9.0 ms a product, float32 5.0" in caplog.text


def test_the_instruction_sets_without_products_of_bytes_are_named_as_the_source_names_them() -> None:
    """Pins a warning that never comes, since a name was changed in one place."""
    text = (native._SOURCE.parent / "integers.h").read_text(encoding="utf-8")
    assert all(f'#define INSTRUCTIONS "{name}"' in text for name in native.WIDENED)


@pytest.mark.parametrize("kind", KINDS)
def test_a_trial_multiplies(kind: Quantize) -> None:
    if native.library() is None:
        pytest.skip("no native operations here")
    assert product_s(kind) > 0
    assert least_s(kind, 1 << 24) > 0


def test_a_trial_of_numbers_of_bfloat16_reads_half_as_much() -> None:
    """Pins a checkpoint in bfloat16 that is called too slow, since its trial reads float32."""
    if native.library() is None:
        pytest.skip("no native operations here")
    kept = [quantize_auto._matrix("none", number)._kept[0] for number in (0.1, 0.5)]  # type: ignore[attr-defined]
    assert kept[0].nbytes == 2 * kept[1].nbytes


def test_without_native_operations_nothing_is_known_in_advance(without_native: None) -> None:
    """Pins a product that cannot be tried, and a kind that is left out for it."""
    assert least_s("int4", 1 << 24) == 0


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own; the native operations that are loaded stay."""
    native.library()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "streaming-continuation" / "quantize" / "seconds.json"


@pytest.mark.parametrize("model", ["demo", "random:tiny"])
@pytest.mark.parametrize(
    ("ms", "kind"), [((10.0, 9.0, 8.0), "none"), ((70.0, 20.0, 8.0), "int8"), ((170.0, 90.0, 8.0), "int4")]
)
def test_a_model_is_loaded_as_chosen(
    model: str, ms: tuple[float, float, float], kind: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if native.library() is None:
        pytest.skip("no native operations here")
    machine = _Machine(*ms)
    monkeypatch.setattr(loading, "_step_s", lambda make, config, codec, kind, context_tokens: machine(kind))
    models = loading.load_models(model, device="cpu", quantize="auto")
    assert f" {kind} " in models.decoder.fingerprint
    assert len(machine.asked) == KINDS.index(kind) + 1  # type: ignore[arg-type]
    loading.load_models(model, device="cpu", quantize="auto")
    assert len(machine.asked) == KINDS.index(kind) + 1  # type: ignore[arg-type]
    loading.load_models(model, device="cpu", quantize="auto", context_tokens=512)
    assert len(machine.asked) == 2 * KINDS.index(kind) + 2  # type: ignore[arg-type]
    assert len(json.loads(home.read_text())) == 2


def test_a_step_is_reckoned_from_some_of_its_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three layers take 30 ms more than none: so ten layers take 100 ms, and what is around them 5."""

    class Clock:
        def __init__(self, codec: object, decoder: object, *_: int) -> None:
            self.layers = len(decoder._layers)  # type: ignore[attr-defined]

        def rehearse(self, rows: int) -> float:
            assert rows == 1
            return 0.005 + 0.01 * self.layers

    models = loading.load_models("random:tiny", device="cpu")
    config = loading.replace(models.decoder.config, num_layers=10)
    made: list[int] = []

    def make(shape: loading.LlamaConfig, kind: Quantize) -> loading.LlamaDecoder:
        made.append(shape.num_layers)
        return loading.random_decoder(shape, torch.device("cpu"), torch.float32, kind)

    monkeypatch.setattr(loading, "FrameStep", Clock)
    assert loading._step_s(make, config, models.codec, "none", 1024) == pytest.approx(0.105)
    assert made == [3]


def test_a_step_without_layers_runs() -> None:
    """What is around the layers is measured as it runs, with the real step."""
    models = loading.load_models("random:tiny", device="cpu")
    config = loading.replace(models.decoder.config, num_layers=5)

    def make(shape: loading.LlamaConfig, kind: Quantize) -> loading.LlamaDecoder:
        return loading.random_decoder(shape, torch.device("cpu"), torch.float32, kind)

    assert loading._step_s(make, config, models.codec, "none", 64) > 0


def test_weights_that_do_not_fit_into_memory_are_left_out(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Pins a server that is refused although int8 would fit, and one that takes what does not."""
    if native.library() is None:
        pytest.skip("no native operations here")
    needed = loading.transformer_parameters(loading.DECODERS["tiny"])
    machine = _Machine(1.0, 1.0, 1.0)
    monkeypatch.setattr(loading, "_step_s", lambda make, config, codec, kind, context_tokens: machine(kind))
    monkeypatch.setattr(loading, "_memory_of", lambda device: Memory(10 * needed, int(1.5 * needed)))
    with caplog.at_level("INFO"):
        models = loading.load_models("random:tiny", device="cpu", quantize="auto")
    assert " int8 " in models.decoder.fingerprint and machine.asked == ["int8"]
    assert "with none the weights do not fit into memory" in caplog.text
    monkeypatch.setattr(loading, "_memory_of", lambda device: Memory(10 * needed, needed // 4))
    with pytest.raises(TooLargeError):
        loading.load_models("random:tiny", device="cpu", quantize="auto")


def test_without_a_compiler_it_takes_float32_and_says_what_would_help(
    home: Path, without_native: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Pins integers that PyTorch multiplies ten times more slowly than float32."""
    machine = _Machine(500.0, 1.0, 1.0)
    monkeypatch.setattr(loading, "_step_s", lambda make, config, codec, kind, context_tokens: machine(kind))
    models = loading.load_models("random:tiny", device="cpu", quantize="auto")
    assert " none " in models.decoder.fingerprint and machine.asked == ["none"]
    assert "A C compiler (Debian: apt install gcc libc6-dev), with which int8 and int4 run, would help" in caplog.text


def test_another_word_is_refused() -> None:
    with pytest.raises(StreamingError, match="'int2' is not supported: use auto, none, int8, int4"):
        loading.load_models("demo", device="cpu", quantize="int2")  # type: ignore[arg-type]
