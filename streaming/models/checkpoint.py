"""Checkpoint files: where they are, what they contain, and their tensors, one at a time, in the type that is wanted.

Only safetensors are read, never pickles, and no remote code is run. Tensors are named as on disk: those names have not
changed since the models were published, unlike the module layout of the libraries that read them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from streaming.config import ModelVoices
from streaming.errors import CheckpointError, HubUnreachableError
from streaming.models.download import Missing, missing, told

_PATTERNS = (
    "config.json",
    "generation_config.json",
    "model_notice.json",
    "tokenizer*",
    "special_tokens_map.json",
    "*.safetensors",
    "model.safetensors.index.json",
)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_MAX_CONFIG_BYTES = 1 << 20
_MAX_NOTICE = 300
_MAX_SUGGESTIONS, _MAX_SUGGESTION = 8, 80
_MAX_VOICES, _MAX_VOICE = 64, 40
_MAX_CODE_DIGITS = 6
_SAMPLED = 64
"""Numbers of a tensor that a fingerprint looks at: a model that was trained on differs in all of them."""
_ADVICE = "Give a folder with --model DIR (and --codec DIR), or use --model demo, which needs no download."


def locate(source: str | Path) -> Path:
    """Return the folder that holds a checkpoint's files: `source` itself, or a hub id's files, downloaded once.

    Raises `CheckpointError` for a folder without config.json, `HubUnreachableError` for a hub id that cannot be had.
    """
    try:
        path = Path(source).expanduser()
        is_folder = path.is_dir()
    except (OSError, RuntimeError, ValueError) as error:  # a name that is too long, an unknown user, a NUL
        reason = getattr(error, "strerror", None) or str(error)
        raise CheckpointError(f"{str(source)[:80]!r} cannot be a folder ({reason[:80]}). {_ADVICE}") from error
    if is_folder:
        if not (path / "config.json").is_file():
            raise CheckpointError(f"{path} is not a checkpoint: it has no config.json")
        return path
    if path.exists() or str(source).startswith((".", "/", "~")):
        raise CheckpointError(f"{path} is not a folder with a checkpoint. {_ADVICE}")
    try:
        with told(str(source), _to_download(str(source))):
            return Path(snapshot_download(str(source), allow_patterns=list(_PATTERNS)))
    except HFValidationError as error:
        raise CheckpointError(f"{source!r} is neither a folder nor a hub id. {_ADVICE}") from error
    except Exception as error:  # any failure on the way to the hub: its client's errors have no common base
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise HubUnreachableError(f"cannot get {source!r} from the model hub ({reason}). {_ADVICE}") from error


def _to_download(name: str) -> Missing:
    try:
        return missing(name, _PATTERNS)
    except HFValidationError:
        raise
    except Exception:  # no network, no such repository: the download itself says so, or finds all in the cache
        return Missing(0, 0)


def read_config(folder: Path) -> Mapping[str, Any]:
    """Return the checkpoint's config.json as it stands. Raises `CheckpointError` if it is not a JSON object."""
    return _read_object(folder / "config.json")


def read_generation_config(folder: Path) -> Mapping[str, Any]:
    """Return the checkpoint's generation_config.json or, as `transformers` does where there is none, its config.json,
    which held the same settings in older checkpoints. Raises `CheckpointError` if it is not a JSON object.
    """
    path = folder / "generation_config.json"
    return _read_object(path if path.is_file() else folder / "config.json")


@dataclass(frozen=True)
class ModelNotice:
    """Notes about a model for a person who is about to talk to it.

    notice: a sentence that says what it does, or None. suggestions: what one might say to it, a few words each. voices:
    those in which it goes on, where they are its own.
    """

    notice: str | None = None
    suggestions: tuple[str, ...] = ()
    voices: ModelVoices | None = None


def read_notice(folder: Path) -> ModelNotice:
    """Return what the checkpoint's model_notice.json says; most have none, and say nothing.

    It is `{"notice": "...", "suggestions": ["...", ...], "voices": {"codebook": 2, "names": {"21": "...", ...}}}`, and
    each may be left out. Raises `CheckpointError` for anything else, and for what does not print on a line.
    """
    path = folder / "model_notice.json"
    if not path.is_file():
        return ModelNotice()
    raw = _read_object(path)
    notice, suggestions = raw.get("notice"), raw.get("suggestions", [])
    if unknown := raw.keys() - {"notice", "suggestions", "voices"}:
        raise CheckpointError(f"{path} has {', '.join(sorted(unknown))}: only notice, suggestions and voices are known")
    if notice is not None and not _prints(notice, _MAX_NOTICE):
        raise CheckpointError(f"{path}: notice is to be one printable line of up to {_MAX_NOTICE} characters")
    if (
        not isinstance(suggestions, list)
        or len(suggestions) > _MAX_SUGGESTIONS
        or not all(_prints(one, _MAX_SUGGESTION) for one in suggestions)
    ):
        raise CheckpointError(
            f"{path}: suggestions are to be up to {_MAX_SUGGESTIONS} printable lines of up to {_MAX_SUGGESTION} "
            "characters"
        )
    return ModelNotice(notice, tuple(suggestions), _voices(path, raw["voices"]) if "voices" in raw else None)


def _voices(path: Path, raw: object) -> ModelVoices:
    match raw:
        case {"codebook": int(codebook), "names": dict(names), **rest} if (
            type(codebook) is int
            and codebook >= 0
            and not rest
            and 0 < len(names) <= _MAX_VOICES
            and all(code.isdecimal() and len(code) <= _MAX_CODE_DIGITS for code in names)
            and all(_prints(name, _MAX_VOICE) for name in names.values())
        ):
            return ModelVoices(codebook, {int(code): name for code, name in names.items()})
    raise CheckpointError(
        f"{path}: voices are to be a codebook, counted from 0, and by up to {_MAX_VOICES} of its codes names of up to "
        f"{_MAX_VOICE} printable characters"
    )


def _prints(text: object, most: int) -> bool:
    return isinstance(text, str) and 0 < len(text) <= most and text.isprintable()


def _read_object(path: Path) -> Mapping[str, Any]:
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_CONFIG_BYTES + 1)
        if len(text) > _MAX_CONFIG_BYTES:
            raise CheckpointError(f"{path} is larger than {_MAX_CONFIG_BYTES} bytes: that is no config")
        raw = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, no JSON, or a number of 4,301 digits
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return raw


def holds_numbers(tensor: Tensor) -> bool:
    """Return False for a tensor that has a shape alone, as on PyTorch's meta device or among its fake tensors."""
    return type(tensor) is Tensor and not tensor.is_meta


def fingerprint_of_files(folder: Path) -> str:
    """Return what tells a checkpoint's files apart without reading them: their names, sizes and times of change."""
    files = [*folder.glob("*.safetensors"), folder / "config.json"]
    told = sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file())
    return hashlib.sha256(repr(told).encode()).hexdigest()


class Fingerprint:
    """Tells apart the tensors of two models: a hash over some numbers of each, in whatever order they are read."""

    def __init__(self) -> None:
        self._sum = 0

    def note(self, name: str, tensor: Tensor) -> None:
        """Take a tensor into account: by its shape alone where it holds no numbers, as on PyTorch's meta device."""
        some = b""
        if holds_numbers(tensor):
            flat = tensor.reshape(-1)
            some = flat[:: max(1, len(flat) // _SAMPLED)][:_SAMPLED].float().cpu().numpy().tobytes()
        told = hashlib.sha256(f"{name} {list(tensor.shape)} ".encode() + some).digest()
        self._sum = (self._sum + int.from_bytes(told, "big")) % 2**256  # some tensors are read more than once

    def __str__(self) -> str:
        return f"{self._sum:064x}"


class TensorSource:
    """A checkpoint folder's tensors, on a device, in a type. Files are mapped, so only what is loaded takes memory.

    Raises `CheckpointError`, naming the file, for whatever is missing, truncated or of another shape.
    """

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
        self.folder, self.device, self.dtype = folder, device, dtype
        self.fingerprint = Fingerprint()
        self._files: dict[str, Any] = {}
        for path in self._paths(folder):
            try:
                file = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path} is damaged or truncated ({error}); download it again") from error
            self._files.update(dict.fromkeys(file.keys(), file))

    @staticmethod
    def _paths(folder: Path) -> list[Path]:
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            try:
                names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
                raise CheckpointError(f"cannot read {index}: {error}") from error
            if any(not isinstance(name, str) or Path(name).name != name for name in names):
                raise CheckpointError(f"{index} names files outside its folder")
        else:
            names = ["model.safetensors"]
        paths = [folder / name for name in names]
        missing = [path.name for path in paths if not path.is_file()]
        if not missing:
            return paths
        others = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
        if others and len(missing) == len(paths):
            shown = others[0] + (f" and {len(others) - 1} more" if len(others) > 1 else "")
            raise CheckpointError(
                f"{folder} has its weights in {shown}: only safetensors are read, because those files can hold code. "
                "Load the model with `transformers` and save it with `save_pretrained`, which writes safetensors"
            )
        raise CheckpointError(
            f"{folder} is incomplete: it lacks {', '.join(missing)} (only safetensors are read); download it again"
        )

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def load(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """Return a tensor of the checkpoint as `dtype` (default: the source's). It must have `shape`."""
        return self._mapped(name, shape).to(self.device, dtype or self.dtype, copy=True)

    def load_rows(self, name: str, shape: tuple[int, ...], rows: Tensor) -> Tensor:
        """Return only these rows of a tensor: [len(rows), ...]. The others are not read."""
        return self._mapped(name, shape)[rows].to(self.device, self.dtype)

    def _mapped(self, name: str, shape: tuple[int, ...]) -> Tensor:
        file = self._files.get(name)
        if file is None:
            raise CheckpointError(
                f"{self.folder} has no tensor {name!r}: not the checkpoint that its config.json describes"
            )
        tensor: Tensor = file.get_tensor(name)
        if tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"{self.folder}: tensor {name!r} is {list(tensor.shape)}, config.json makes it {list(shape)}"
            )
        self.fingerprint.note(name, tensor)
        return tensor
