"""Checkpoint files: found, read, and refused with a sentence that says what to do."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.errors
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from streaming import loading
from streaming.config import LlamaConfig, ModelVoices
from streaming.errors import CheckpointError, HubUnreachableError, StreamingError
from streaming.models import checkpoint
from streaming.models.checkpoint import ModelNotice, TensorSource, locate, read_config, read_notice
from tests.reference import CPU, load_codec, load_decoder

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
NOTICE = "model_notice.json"


def source(folder: Path, dtype: torch.dtype = torch.float32) -> TensorSource:
    return TensorSource(folder, CPU, dtype)


@pytest.fixture
def copy(decoder_dir: Path, tmp_path: Path) -> Path:
    """A decoder checkpoint that may be damaged."""
    return Path(shutil.copytree(decoder_dir, tmp_path / "copy"))


@pytest.fixture(scope="module")
def sharded(decoder_checkpoint: Callable[..., Path]) -> Path:
    folder = decoder_checkpoint(shards="100KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    return folder


def test_a_folder_is_its_own_location(decoder_dir: Path) -> None:
    """Pins a folder's name looked up on the hub."""
    assert locate(decoder_dir) == locate(str(decoder_dir)) == decoder_dir


def test_a_folder_without_a_config_is_no_checkpoint(tmp_path: Path) -> None:
    """Pins a traceback from deep inside for a mistyped folder."""
    with pytest.raises(CheckpointError, match=r"it has no config\.json"):
        locate(tmp_path)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/surely/not/here", "../nowhere"])
def test_a_path_that_is_not_there_is_not_asked_of_the_hub(name: str) -> None:
    """Pins "cannot reach the hub" for a mistyped path."""
    with pytest.raises(
        CheckpointError, match=r"is not a folder with a checkpoint.*--model DIR.*--model demo"
    ) as caught:
        locate(name)
    assert not isinstance(caught.value, HubUnreachableError)


def test_a_file_is_not_a_checkpoint(decoder_dir: Path) -> None:
    """Pins the weights' file given instead of its folder."""
    with pytest.raises(CheckpointError, match="is not a folder with a checkpoint"):
        locate(decoder_dir / WEIGHTS)


@pytest.mark.parametrize("name", ["two words/and more", "a/b/c", "what--is//this"])
def test_what_is_neither_a_folder_nor_a_hub_id_is_said_to_be_so(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pins the hub library's own validation error, which names none of our flags."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="--model demo"):
        locate(name)


def test_an_uncached_hub_id_without_a_network_says_what_to_do() -> None:
    """Pins a page of nested connection errors as the first thing that a new user sees."""
    with pytest.raises(HubUnreachableError, match=r"cannot get 'nobody/nothing' .*--model DIR.*--model demo") as caught:
        locate("nobody/nothing")
    assert caught.value.code == "hub_unreachable"
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("refused\nand more"),
        TimeoutError(),
        OSError(28, "No space left on device"),
        huggingface_hub.errors.LocalEntryNotFoundError("offline"),
        huggingface_hub.errors.OfflineModeIsEnabled("offline"),
    ],
    ids=repr,
)
def test_whatever_the_hub_raises_says_what_to_do(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Pins errors of the network and the disk that come out untyped."""

    def download(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(checkpoint, "snapshot_download", download)
    with pytest.raises(HubUnreachableError, match=r"--model DIR.*--model demo") as caught:
        locate("nobody/nothing")
    assert "\n" not in str(caught.value)


def test_only_safetensors_and_text_are_downloaded(monkeypatch: pytest.MonkeyPatch, decoder_dir: Path) -> None:
    """Pins gigabytes of pickles, or code, fetched along with the weights."""
    asked: dict[str, object] = {}

    def download(name: str, **options: object) -> str:
        asked.update(options, name=name)
        return str(decoder_dir)

    monkeypatch.setattr(checkpoint, "snapshot_download", download)
    assert locate("some/model") == decoder_dir
    assert asked["name"] == "some/model"
    patterns = asked["allow_patterns"]
    assert isinstance(patterns, list)
    assert "generation_config.json" in patterns, "which has what a client leaves open"
    assert not any(name.endswith((".bin", ".pt", ".py", "*")) and name != "tokenizer*" for name in patterns)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"]
)
def test_a_damaged_config_is_a_checkpoint_error(tmp_path: Path, content: bytes) -> None:
    """Pins a JSON, Unicode or recursion error, or a list taken for a config."""
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_config(tmp_path)


def test_a_config_of_many_megabytes_is_not_read(tmp_path: Path) -> None:
    """Pins a sparse file of a terabyte that is read into memory."""
    with open(tmp_path / "config.json", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(CheckpointError, match="that is no config"):
        read_config(tmp_path)


def test_a_sharded_checkpoint_equals_the_single_file(decoder_dir: Path, sharded: Path) -> None:
    """Pins a tensor read from the wrong shard: the 8B model has four."""
    single = load_file(decoder_dir / WEIGHTS)
    files = source(sharded)
    for name, tensor in single.items():
        assert torch.equal(files.load(name, tuple(tensor.shape)), tensor)
    assert load_decoder(sharded).prefix == 2


@pytest.mark.parametrize("size", [0, 7, 100, -1000, -1])
def test_a_truncated_file_is_named(copy: Path, size: int) -> None:
    """Pins a bus error at the first read, or weights that end in zeros, after a download that was cut off."""
    content = (copy / WEIGHTS).read_bytes()
    (copy / WEIGHTS).write_bytes(content[:size])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged or truncated .*download it again"):
        load_decoder(copy)


def test_missing_weights_are_named(copy: Path) -> None:
    """Pins FileNotFoundError for a folder with a config and a tokenizer alone."""
    (copy / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"is incomplete: it lacks model\.safetensors \(only safetensors"):
        load_decoder(copy)


def test_a_missing_shard_is_named(sharded: Path, tmp_path: Path) -> None:
    """Pins a download that stopped between two files."""
    folder = Path(shutil.copytree(sharded, tmp_path / "copy"))
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"lacks {shard.name}"):
        load_decoder(folder)


def test_a_folder_of_pickles_is_refused_unread(copy: Path) -> None:
    """Pins a pickle that runs its author's code when it is loaded."""
    (copy / WEIGHTS).unlink()

    class Hostile:
        def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
            return Path.touch, (copy / "ran",)  # type: ignore[return-value]

    (copy / "pytorch_model.bin").write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(CheckpointError, match=r"weights in pytorch_model\.bin: only safetensors are read") as raised:
        load_decoder(copy)
    assert "download" not in str(raised.value), "which would bring the same files again"
    assert not (copy / "ran").exists()


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/etc/passwd", "a/b.safetensors", "..", ""])
def test_an_index_that_leaves_its_folder_is_refused(copy: Path, name: str) -> None:
    """Pins a checkpoint that reads files which are not its own."""
    (copy / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(CheckpointError, match=r"outside its folder|lacks"):
        load_decoder(copy)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": {"a": []}}']
)
def test_a_damaged_index_is_a_checkpoint_error(copy: Path, content: str) -> None:
    """Pins a KeyError or TypeError in the loader."""
    (copy / INDEX).write_text(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        load_decoder(copy)


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "lm_head.weight", "model.norm.weight", "model.layers.1.mlp.up_proj.weight"]
)
@pytest.mark.parametrize("change", ["missing", "longer", "flat"])
def test_a_tensor_that_is_not_what_the_config_says_is_named(copy: Path, name: str, change: str) -> None:
    """Pins weights that broadcast into place, or rows read from a table of another vocabulary."""
    tensors = load_file(copy / WEIGHTS)
    tensor = tensors.pop(name)
    if change == "longer":
        tensors[name] = torch.cat((tensor, tensor[:1]))
    elif change == "flat":
        tensors[name] = tensor.reshape(1, -1)
    save_file(tensors, copy / WEIGHTS, {"format": "pt"})
    with pytest.raises(CheckpointError, match=name):
        load_decoder(copy)


def test_a_codec_with_a_tensor_of_another_shape_is_refused(codec_dir: Path, tmp_path: Path) -> None:
    """Pins a codec loaded with another's config."""
    folder = Path(shutil.copytree(codec_dir, tmp_path / "copy"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"codebook_size": 128}))
    with pytest.raises(CheckpointError, match=r"tensor .* is \[64\], config.json makes it \[128\]"):
        load_codec(folder)


def test_float32_files_load_as_bfloat16(decoder_dir: Path) -> None:
    """Pins a model that takes twice the memory that was asked for."""
    name, shape = "model.layers.0.mlp.up_proj.weight", (96, 64)
    low, full = source(decoder_dir, torch.bfloat16).load(name, shape), source(decoder_dir).load(name, shape)
    assert (low.dtype, full.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(low, full.bfloat16())
    assert source(decoder_dir, torch.bfloat16).load(name, shape, torch.float32).dtype == torch.float32


def test_rows_are_read_in_the_order_asked_for(decoder_dir: Path) -> None:
    """Pins rows sorted on the way, which would swap codes."""
    rows = torch.tensor([300, 2, 2, 17])
    shape = (LlamaConfig.from_dict(read_config(decoder_dir)).vocab_size, 64)
    table = source(decoder_dir).load("lm_head.weight", shape)
    assert torch.equal(source(decoder_dir).load_rows("lm_head.weight", shape, rows), table[rows])


def test_what_is_loaded_outlives_the_file(copy: Path) -> None:
    """Pins a tensor that is still a view of the mapped file: overwriting the file would change, or crash, the model."""
    loaded = source(copy).load("model.norm.weight", (64,))
    before = loaded.clone()
    with open(copy / WEIGHTS, "r+b") as file:
        file.write(bytes((copy / WEIGHTS).stat().st_size))
    assert torch.equal(loaded, before)


def test_a_tied_checkpoint_that_has_a_head_uses_it(copy: Path) -> None:
    """Pins the head guessed from the flag: files say what was trained, and some say `tied` and hold both."""
    config = json.loads((copy / "config.json").read_text())
    wanted = load_decoder(copy)
    (copy / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    hidden = torch.randn(1, 64)
    assert torch.equal(load_decoder(copy).logits(hidden, 0), wanted.logits(hidden, 0))


def test_models_that_do_not_belong_together_are_refused(
    decoder_checkpoint: Callable[..., Path], codec_checkpoint: Callable[..., Path], decoder_dir: Path, codec_dir: Path
) -> None:
    """Pins a server that starts and speaks noise, or fails at its first frame."""
    models = loading.load_models(decoder_dir, codec_dir, "cpu")
    assert models.codec.num_codebooks == models.decoder.num_codebooks == 4
    assert models.notice == ModelNotice(), "most say nothing of themselves"
    with pytest.raises(CheckpointError, match="do not belong together"):
        loading.load_models(decoder_checkpoint(num_codebooks=8), codec_checkpoint(num_quantizers=4), "cpu")
    with pytest.raises(CheckpointError, match=r"lacks <64_0>"):
        loading.load_models(decoder_dir, codec_checkpoint(codebook_size=128), "cpu")
    with pytest.raises(CheckpointError, match="not a Llama decoder"):
        loading.load_models(codec_dir, codec_dir, "cpu")
    with pytest.raises(CheckpointError, match="not a Mimi codec"):
        loading.load_models(decoder_dir, decoder_dir, "cpu")


def test_a_model_says_what_it_does_and_what_one_might_say_to_it(copy: Path) -> None:
    """What a person had to know was written in the code, for the demo alone."""
    assert read_notice(copy) == ModelNotice()
    (copy / NOTICE).write_text(
        '{"notice": "It counts.", "suggestions": ["one, two", "Montag, Dienstag, früh"]}', "utf-8"
    )
    assert read_notice(copy) == ModelNotice("It counts.", ("one, two", "Montag, Dienstag, früh"))
    (copy / NOTICE).write_text('{"suggestions": ["one"]}')
    assert read_notice(copy) == ModelNotice(None, ("one",))
    (copy / NOTICE).write_text('{"voices": {"codebook": 1, "names": {"7": "a deep voice"}}}')
    voices = read_notice(copy).voices
    assert voices == ModelVoices(1, {7: "a deep voice"})
    assert [voices.of(np.array(codes)) for codes in ([7, 1], [1, 7])] == [None, "a deep voice"]


def test_voices_in_a_codebook_that_the_model_has_not_are_refused(copy: Path, codec_dir: Path) -> None:
    """The first frame of the first turn would have ended its session."""
    (copy / NOTICE).write_text('{"voices": {"codebook": 63, "names": {"7": "a deep voice"}}}')
    with pytest.raises(CheckpointError, match="codebook 63"):
        loading.load_models(copy, codec_dir, "cpu")


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"notice": 3}',
        '{"notice": ""}',
        '{"notice": "two\\nlines"}',
        '{"notice": "\\u001b[2J"}',
        json.dumps({"notice": "x" * 301}),
        '{"suggestions": "one"}',
        '{"suggestions": [1]}',
        '{"suggestions": [""]}',
        '{"suggestions": ["one\\u0007"]}',
        json.dumps({"suggestions": ["x" * 81]}),
        json.dumps({"suggestions": ["one"] * 9}),
        '{"suggestion": ["one"]}',
        '{"voices": ["a deep voice"]}',
        '{"voices": {"codebook": 1, "names": {}}}',
        '{"voices": {"codebook": true, "names": {"7": "a deep voice"}}}',
        '{"voices": {"codebook": -1, "names": {"7": "a deep voice"}}}',
        '{"voices": {"codebook": 1, "names": {"x": "a deep voice"}}}',
        '{"voices": {"codebook": 1, "names": {"7": "\\u001b[2J"}}}',
        '{"voices": {"codebook": 1, "names": {"7": "a deep voice"}, "more": 1}}',
    ],
)
def test_a_notice_that_is_none_is_refused(copy: Path, text: str) -> None:
    """It is shown to people as it stands: control characters of somebody's file would reach their terminals."""
    (copy / NOTICE).write_text(text)
    with pytest.raises(CheckpointError, match=NOTICE):
        read_notice(copy)


def test_the_demo_says_what_it_does_and_suggests_what_it_can() -> None:
    """Whoever changes its weights changes the file beside them; what it suggests is what its page says it does."""
    said = read_notice(Path(loading.__file__).parent / "demo" / "voice" / "decoder")
    assert said.notice is not None and said.notice.startswith("The demo model")


@pytest.mark.parametrize("device", ["cuda:99", "nonsense", "cpu:x", "meta"])
def test_a_device_that_is_not_there_is_said_to_be_so(device: str) -> None:
    """Pins a CUDA error a minute into loading."""
    with pytest.raises(StreamingError, match="device"):
        loading.pick_device(device)
