"""Files that hold norm layers: .safetensors, .npz, .keras, .onnx, and PyTorch's .pt and .pth to read."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .framework import Framework, framework, library
from .record import Array, ConversionError

#: The key of a safetensors file's metadata that holds the settings.
KEY = "normkit"
#: Formats that hold a model, with its framework; and formats of arrays by name.
MODELS = {".keras": "keras", ".onnx": "onnx"}
ARRAYS = (".safetensors", ".npz")
#: How safetensors calls dtypes.
DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip


@dataclass
class Content:
    """What a file holds: arrays by name with the settings that are known, or a model."""

    framework: Framework | None
    arrays: dict[str, Array] = field(default_factory=dict)
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    model: Any = None


def read(path: Path, name: str | None = None) -> Content:
    """Read a file; ``name`` is the framework that it comes from, where the user says so."""
    suffix = path.suffix
    if not path.is_file():
        raise ConversionError(f"There is no file {str(path)!r}.")
    if suffix in MODELS:
        if name not in (None, MODELS[suffix], "tf_keras" if suffix == ".keras" else None):
            raise ConversionError(f"{path} is a model of {MODELS[suffix]}, not of {name}.")
        return Content(framework(MODELS[suffix]), model=load(path))
    if suffix in (".pt", ".pth"):
        return Content(framework(name or "torch"), _pickled(path))
    if suffix == ".safetensors":
        arrays, told = _safetensors(path)
    elif suffix == ".npz":
        arrays, told = _npz(path)
    else:
        raise ConversionError(f"Files end in {', '.join((*ARRAYS, *MODELS))}, .pt or .pth; received {str(path)!r}.")
    origin = told.get("framework")
    if name is not None and origin is not None and name != origin:
        raise ConversionError(f"{path} says that it comes from {origin}, not from {name}.")
    origin = name or origin
    return Content(framework(origin) if origin else None, arrays, told.get("layers", {}))


def load(path: Path) -> Any:
    """The model in a .keras or .onnx file."""
    if not path.is_file():
        raise ConversionError(f"There is no file {str(path)!r}.")
    if path.suffix == ".onnx":
        onnx = library("onnx")
        with _broken(path, Exception):
            return onnx.load(path)
    if path.suffix != ".keras":
        raise ConversionError(f"Models are .keras or .onnx files; received {str(path)!r}.")
    keras = library("keras")
    with _broken(path, Exception):
        return keras.saving.load_model(path, compile=False)


def _pickled(path: Path) -> dict[str, Array]:
    from .torch import array

    if not path.stat().st_size:
        raise ConversionError(f"{path} is empty.")
    torch = library("torch")
    with _broken(path, Exception):
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            if "GLOBAL" in str(error):  # the name of a class
                raise ConversionError(f"{path} holds more than arrays: save the state_dict() of the model.") from None
            raise ConversionError(f"{path} is no file that torch.save has written.") from None
    for key in ("state_dict", "model"):
        state = state[key] if isinstance(state, Mapping) and isinstance(state.get(key), Mapping) else state
    if not isinstance(state, Mapping):
        raise ConversionError(f"{path} holds no state dict but {type(state).__name__}.")
    within = {} if _tensors(state) else {k: v for k, v in state.items() if isinstance(v, Mapping) and _tensors(v)}
    if len(within) > 1:
        raise ConversionError(f"{path} holds several state dicts: {', '.join(map(str, within))}: save one by itself.")
    (state,) = within.values() or (state,)
    return {str(name): array(value) for name, value in state.items() if isinstance(value, torch.Tensor)}


def _tensors(state: Mapping[Any, Any]) -> bool:
    """Whether there are some among the values; numbers, such as a score, may be beside them."""
    torch = library("torch")
    return any(isinstance(value, torch.Tensor) and value.ndim for value in state.values())


def _safetensors(path: Path) -> tuple[dict[str, Array], dict[str, Any]]:
    """Arrays that are read from the disk when they are looked at: most of a model is none of ours."""
    safetensors = library("safetensors")
    with _broken(path, Exception), safetensors.safe_open(path, "numpy") as file:  # which checks the offsets
        told = _told(f"{KEY!r} in the metadata of {path}", json.loads((file.metadata() or {}).get(KEY, "{}")))
        with open(path, "rb") as raw:
            start = 8 + int.from_bytes(raw.read(8), "little")
            header = json.loads(raw.read(start - 8))
        size = path.stat().st_size - start
        data = np.asarray(np.memmap(path, mode="r", offset=start)) if size else np.empty(0, np.uint8)
    header.pop("__metadata__", None)
    return {name: _bits(spec, data) for name, spec in header.items()}, told


def _bits(spec: Mapping[str, Any], data: Array) -> Array:
    raw, kind = data[slice(*spec["data_offsets"])], DTYPES.get(spec["dtype"])
    if kind is None:
        return raw.view(np.void)  # of a quantized model, in which norm layers are not
    return raw.view(library("ml_dtypes").bfloat16 if kind == "bfloat16" else kind).reshape(spec["shape"])


def _npz(path: Path) -> tuple[dict[str, Array], dict[str, Any]]:
    with _broken(path, ValueError, OSError, EOFError, zipfile.BadZipFile), np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    beside = sidecar(path)
    return arrays, _told(str(beside), _json(beside)) if beside.is_file() else {}


def _told(where: str, found: Any) -> dict[str, Any]:
    """What is told of arrays: framework, and layers with their settings."""
    if not isinstance(found, dict) or not isinstance(found.get("framework", ""), str):
        raise ConversionError(
            f'{where} must hold an object such as {{"framework": "torch", "layers": {{}}}}; received {found!r:.60}.'
        )
    by_layer(f"layers of {where}", found.get("layers", {}))
    return found


def by_layer(where: str, found: Any) -> Any:
    """Settings of layers, after a look at what they are."""
    if not isinstance(found, Mapping) or not all(
        isinstance(k, str) and isinstance(v, Mapping) for k, v in found.items()
    ):
        raise ConversionError(f"{where} must hold each layer's arguments under its name; received {found!r:.60}.")
    return found


@contextlib.contextmanager
def _broken(path: Path, *errors: type[BaseException]) -> Iterator[None]:
    """What cannot be read is said in one sentence."""
    try:
        yield
    except (ConversionError, ImportError):
        raise
    except errors as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ConversionError(f"{path} cannot be read: {reason}") from None


def sidecar(path: Path) -> Path:
    """Where the settings of an .npz file are."""
    return path.with_name(path.name + ".json")


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConversionError(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise ConversionError(f"{path} is no JSON: {error}.") from None


def names_file(path: Path) -> dict[str, str]:
    """Names in the target by name in the source, from a JSON file."""
    found = _json(path)
    if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
        raise ConversionError(f"{path} must hold an object of texts: names in the source, and those in the target.")
    return found


def settings_file(path: Path) -> dict[str, dict[str, Any]]:
    """Settings of layers from a JSON file: ``{"bn*": {"layer": "BatchNorm2d", "eps": 1e-5, "momentum": 0.1}}``."""
    found = _json(path)
    return by_layer(str(path), found.get("layers", found) if isinstance(found, dict) else found)


def writable(path: Path, overwrite: bool, formats: tuple[str, ...] = (*ARRAYS, *MODELS)) -> None:
    """Refuse an output file that cannot be written, before anything is computed."""
    if path.suffix not in formats:
        raise ConversionError(f"The output is a file ending in {', '.join(formats)}; received {str(path)!r}.")
    outputs = [path, sidecar(path)] if path.suffix == ".npz" else [path]
    for output in outputs:
        if output.is_dir():
            raise ConversionError(f"The output must be a file; {str(output)!r} is a folder.")
        if output.exists() and not overwrite:
            raise ConversionError(f"{str(output)!r} exists: choose another name, or say --overwrite.")
        if output.exists() and not os.access(output, os.W_OK):
            raise ConversionError(f"{str(output)!r} is read-only.")
    if not path.parent.is_dir():
        raise ConversionError(f"There is no folder {str(path.parent)!r} to write to.")
    if not os.access(path.parent, os.W_OK):
        raise ConversionError(f"The folder {str(path.parent)!r} is read-only.")


def write(path: Path, told: Mapping[str, Any], arrays: Mapping[str, Array]) -> None:
    """Write arrays with what is told of them: framework, and layers with their settings. All of it or nothing."""
    text = json.dumps(told, allow_nan=False)
    if path.suffix == ".safetensors":
        numpy = library("safetensors.numpy")
        contiguous = {name: np.asarray(a, order="C") for name, a in arrays.items()}
        with replaced(path) as part:
            numpy.save_file(contiguous, part, metadata={KEY: text, "format": "np"})
        return
    for name, value in arrays.items():
        if value.dtype.kind == "V" or value.dtype.name == "bfloat16":
            raise ConversionError(f"{name} is bfloat16, which .npz files do not hold: write .safetensors.")
    with replaced(path) as part, replaced(sidecar(path)) as beside:
        with open(part, "wb") as file:
            np.savez(file, **arrays)
        beside.write_text(json.dumps(told, indent=1, allow_nan=False) + "\n", "utf-8")


def save(path: Path, model: Any) -> None:
    """Write a model to a .keras or .onnx file."""
    with replaced(path) as part:
        if path.suffix == ".onnx":
            library("onnx").save(model, part)
        else:
            model.save(part)


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A file next to ``path`` that takes its place if all goes well."""
    with tempfile.TemporaryDirectory(prefix=".normkit-", dir=path.parent) as folder:
        part = Path(folder) / path.name
        yield part
        os.replace(part, path)
