"""``normkit.convert``: norm-layer state from one framework to another, by name."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from .. import _validate as check
from . import files
from .framework import BAD_INPUT, MINOR, SWITCHES, Framework, framework, framework_of
from .record import (
    Array,
    ConversionError,
    Native,
    Norm,
    Say,
    argument,
    at,
    checked,
    ones,
    plain_weight,
    rescaled,
    whole,
)
from .rules import Applied
from .source import Fallback, Settings
from .source import of as source_of


@dataclass
class Conversion:
    """What was converted, and every rule that applied."""

    source: str
    target: str
    #: The neutral records, by the name in the target.
    norms: dict[str, Norm] = field(default_factory=dict)
    #: The layers as the target says them: class, arguments, arrays.
    natives: dict[str, Native] = field(default_factory=dict)
    rules: list[Applied] = field(default_factory=list)
    #: Arrays of a file that belong to no norm layer, layers of a model that are not known, and why.
    left: dict[str, str] = field(default_factory=dict)
    #: The model that was written to, where one was given.
    model: Any = None

    @property
    def layers(self) -> dict[str, Any]:
        """The layers as objects of the target framework, made anew."""
        return {name: at(name, framework(self.target).make, native) for name, native in self.natives.items()}

    @property
    def layer(self) -> Any:
        """The only layer."""
        if len(self.natives) != 1:
            raise ConversionError(f"There is not one layer but {len(self.natives)}: take layers[name].")
        return next(iter(self.layers.values()))

    def arrays(self) -> dict[str, Array]:
        """The arrays by the names that they have in a file of the target framework."""
        target = framework(self.target)
        return {k: v for name, native in self.natives.items() for k, v in target.join(name, native).items()}

    def json(self) -> dict[str, Any]:
        """The report, ready for JSON: no arrays."""
        return {
            "source": self.source,
            "target": self.target,
            "layers": layers_json(self.natives),
            "rules": [{"layer": a.layer, "rule": a.rule, "text": a.text} for a in self.rules],
            "left_out": self.left,
        }

    def __str__(self) -> str:
        lines = [f"{self.source} to {self.target}: {len(self.natives)} norm layer{'s' * (len(self.natives) != 1)}"]
        for (rule, text), names in _grouped(self.rules).items():
            lines.append(f"  {rule}: {text} ({few(names)})")
        lines += [f"  left out: {few(list(self.left))}"] if self.left else []
        return "\n".join(lines)


def convert(
    source: Any,
    to: Any,
    *,
    framework: str | None = None,
    names: Mapping[str, str] | None = None,
    settings: Settings | None = None,
    eps: float | None = None,
    momentum: float | None = None,
    defaults: bool = False,
    axis: int | None = None,
    ndim: int | None = None,
    count: int | None = None,
) -> Conversion:
    """Carry the state of norm layers (batch, layer, group, instance, RMS norm) from one framework to another.

    Layers are told by name, never by position, and arrays are copied bit by bit. eps is always written, momentum
    translated (torch weights the new statistics, all others the old ones), and a stored variance never changed unless
    ``count`` asks for it. Other layers (convolutions, linear ones) are not touched. What only normkit's layers can be
    told (``use_batch_stats``, ``update_stats``, ``virtual_batch_size``, ``r_max``, ``d_max``) is told to those, and
    refused elsewhere; how they take bad input (``single_value``, ``empty_batch``, ``nonfinite``) is left out elsewhere,
    as a rule says. A batch norm that is frozen (Keras's ``trainable=False``, ``FrozenBatchNorm2d``, and
    ``use_batch_stats=False`` with ``train_affine=False``) stays so; where the target has no such layer, a rule says to
    keep it in inference mode.

    Parameters
    ----------
    source : a model or a layer of torch, Keras, tf_keras, nnx, equinox (``(model, state)`` with batch norm), linen
        (``(layer, variables)``), ONNX (a ModelProto) or normkit; a mapping of arrays by name (a state dict, the
        variables of linen, ``(params, state)`` of haiku) with ``framework``; or the path of a file, see Notes
    to : the name of a framework (torch, keras, tf_keras, nnx, linen, haiku, equinox, onnx, normkit), for new layers; or
        a model, whose norm layers are filled in place (equinox and linen return a new one)
    framework : what a mapping or a file comes from; files that normkit wrote say it themselves
    names : the target's name by the source's, for layers whose names differ by more than "." and "/"
    settings : for a mapping or a file, which hold no eps and no momentum: by layer name or pattern (``"blocks.*"``),
        the class ("layer") and its arguments, in the source framework's own names; later patterns override earlier ones
    eps, momentum : for those layers of a mapping or a file of which nothing else says it, in the sense of the source
    defaults : take the source framework's defaults for what is still not said
    axis : the channel axis of the new batch, group and instance norms; by default the source's. Give it where the axes
        of x move as well, such as -1 from torch to a channels-last Keras model
    ndim : the rank of x, where the source does not say it and the target must know (haiku, ONNX, Keras's batch norm)
    count : values per channel in a training batch: running variances are multiplied by n / (n - 1), or its inverse,
        where the target divides by another number than the source; by default they stay as they are

    Returns
    -------
    Conversion
        ``layers`` (objects, by name; ``layer`` where it is one; linen: (module, variables); haiku: (transformed,
        params, state); equinox: (layer, state) for batch norm), ``model`` (what was filled), ``arrays()`` (as a file
        has them), ``norms`` (the neutral records), ``rules`` (each with layer, id and text), ``left`` (arrays that
        belong to no norm layer, layers that are not known), ``json()``; ``print`` it.

    Raises
    ------
    ConversionError
        A ValueError: the framework or the layer is unknown, a setting is missing, names do not match, shapes or dtypes
        do not fit, or the target has no equivalent. Nothing was changed.
    ImportError
        A library is needed and not installed.

    Notes
    -----
    ``.safetensors`` files hold settings in their metadata (key "normkit"), ``.npz`` files in FILE.json next to them;
    both are written by ``normkit convert`` and are read if they are there. ``.keras`` and ``.onnx`` hold settings
    themselves.

    ==============  =============  ===================  ==========  ================  =========  ===========
    record          torch          Keras, tf_keras      linen, nnx  haiku             equinox    ONNX
    ==============  =============  ===================  ==========  ================  =========  ===========
    weight          weight         gamma; RMS: scale    scale       scale             weight     scale
    bias            bias           beta                 bias        offset            bias       B, bias
    mean            running_mean   moving_mean          mean        mean_ema/average  in State   input_mean
    var             running_var    moving_variance      var         var_ema/average   in State   input_var
    eps             eps            epsilon              epsilon     eps               eps        epsilon
    momentum (old)  1 - momentum   momentum             momentum    decay_rate        momentum   momentum
    axis            1, trailing    axis                 axis        data_format       1, shape   1, axis
    num_groups      num_groups     groups               num_groups  groups            groups     num_groups
    ==============  =============  ===================  ==========  ================  =========  ===========

    Examples
    --------
    >>> import torch
    >>> import normkit as nk
    >>> norm = torch.nn.BatchNorm2d(4, momentum=0.25)
    >>> layer = nk.convert(norm, "normkit").layer
    >>> layer.momentum
    0.75
    """
    axis = axis if axis is None else whole(argument("axis"), axis)
    ndim, count = (
        n if n is None else checked(check.positive_int, argument(name), n)
        for name, n in (("ndim", ndim), ("count", count))
    )
    reader, found, left = source_of(source, framework, Fallback(settings or {}, eps, momentum, defaults))
    if not found:
        raise ConversionError(_nothing(reader, left))
    if isinstance(to, str):
        writer, filled = _named(to), None
    else:
        writer = framework_of(to)  # type: ignore[assignment]
        if writer is None:
            raise ConversionError(
                f"Convert to the name of a framework, or to a model of one; received {type(to).__name__}."
            )
        filled = {name: (native, _read(writer, name, native, [])) for name, native in writer.layers(to)}
    result = Conversion(reader.name, writer.name, left=left)
    targets = _targets(found, filled, names or {}, writer.separator)
    for name, native in found.items():
        target = targets[name]
        norm = _read(reader, name, native, result.rules)
        norm = at(name, functools.partial(norm.but, ndim=norm.ndim or ndim))
        if norm.kind in ("layer_norm", "rms_norm"):
            norm = norm.but(axis=_last(norm))
        if filled is not None:
            norm = _moved(norm, filled[target][1], name, target, result.rules)
        elif axis is not None and norm.kind not in ("layer_norm", "rms_norm"):
            norm = at(name, _with_axis, norm, axis, target, result.rules)
        result.norms[target] = norm
        native = _write(writer, target, norm, count, result.rules)
        old = None if filled is None else filled[target][0]
        native = native if old is None else _fitting(writer, target, norm, native, old)
        result.natives[target] = at(target, _switched, writer, norm, native, old, _sayer(target, result.rules))
    if filled is not None:
        result.model = writer.put(to, result.natives)
    return result


def convert_file(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    to: str,
    *,
    like: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    **options: Any,
) -> Conversion:
    """Convert a file to a file; :func:`convert` has the options.

    ``.safetensors`` and ``.npz`` hold the arrays of the norm layers, by the target's names, and their settings.
    ``.keras`` and ``.onnx`` hold a model: ``like`` is the file of one, whose norm layers are filled.
    """
    output = Path(target)
    writer = _named(to)
    files.writable(output, overwrite)
    if output.exists() and output.samefile(source):
        raise ConversionError(f"{str(output)!r} is the input too, and would lose all but its norm layers.")
    model_of = files.MODELS.get(output.suffix)
    if model_of is None:
        if like is not None:
            raise ConversionError(f"--like belongs to an output in {' or '.join(files.MODELS)}; received {output}.")
        if not writer.has_files:
            raise ConversionError(f"{to} saves arrays by position, not by name: convert the model in Python.")
        result = convert(source, to, **options)
        files.write(output, {"framework": to, "layers": layers_json(result.natives)}, result.arrays())
        return result
    if model_of != to:
        raise ConversionError(f"{output} would be a model of {model_of}, not of {to}.")
    if like is None:
        raise ConversionError(
            f"{output} holds a whole model: say with --like FILE which one is to get the norm layers."
        )
    result = convert(source, files.load(Path(like)), **options)
    files.save(output, result.model)
    return result


def layers_json(natives: Mapping[str, Native]) -> dict[str, dict[str, Any]]:
    """Class and settings of layers, ready for JSON."""
    return {
        name: {"layer": native.layer, **{k: repr(v) if callable(v) else v for k, v in native.settings.items()}}
        for name, native in natives.items()
    }


def _named(name: str) -> Framework:
    return framework(name)


def _read(reader: Framework, name: str, native: Native, rules: list[Applied]) -> Norm:
    say = _sayer(name, rules)
    if "class" in native.settings:
        say("subclass", f"{native.settings['class']} is read as {native.layer}")
    norm = at(name, reader.read, native, say)
    switches = {key: native.settings[key] for key in SWITCHES if key in native.settings}
    norm = norm.but(trainable=norm.trainable and switches.get("train_affine") is not False)
    if norm.frozen and switches.get("use_batch_stats") is None:
        switches["use_batch_stats"] = False
    by_running = switches.get("use_batch_stats") is False
    norm = norm.but(frozen=by_running and not norm.trainable and not switches.get("update_stats"), switches=switches)
    if norm.kind != "rms_norm" and (norm.weight is None) != (norm.bias is None):
        say("state-names", "there is a {} and no {}".format(*("weight", "bias")[:: 1 if norm.bias is None else -1]))
    return norm


def _write(writer: Framework, name: str, norm: Norm, count: int | None, rules: list[Applied]) -> Native:
    say = _sayer(name, rules)
    if count is not None and norm.var is not None:
        said: list[str] = []
        at(name, writer.write, norm, lambda rule, text: said.append(rule))
        if "runvar-bias" in said:
            other = "unbiased" if norm.variance == "biased" else "biased"
            norm = at(name, rescaled, norm, count, other)
            n = f"{count} / {count - 1}" if other == "unbiased" else f"{count - 1} / {count}"
            say("runvar-bias", f"the stored variance is multiplied by {n}, as asked")
    native = at(name, writer.write, norm, say)
    say("eps-default", f"eps is {norm.eps:g}")
    return native


def _switched(writer: Framework, norm: Norm, new: Native, old: Native | None, say: Say) -> Native:
    """The layer, told what the one it comes from was told beyond what other frameworks' layers can be."""
    told = {key: value for key, value in norm.switches.items() if value is not None}
    has = writer.switches(new.layer) if old is None else old.settings
    if norm.frozen and "use_batch_stats" not in has:
        told = {key: value for key, value in told.items() if key not in ("use_batch_stats", "update_stats")}
        if not writer.freezes(new if old is None else old):
            say("freeze-semantics", "keep it in its inference mode while the rest of the model trains")
    lost = [f"{key}={value!r}" for key, value in told.items() if key not in has and key not in MINOR]
    if lost:
        name = writer.title or writer.name
        raise ConversionError(f"{norm.kind} with {' and '.join(lost)} has no equivalent in {name}: set None first.")
    for key, rule in BAD_INPUT.items():
        if key in told and key not in has:
            say(rule, f"{key}={told[key]!r} is left out")
    said = told if old is None else norm.switches
    return replace(new, settings={**new.settings, **{key: value for key, value in said.items() if key in has}})


def _sayer(name: str, rules: list[Applied]) -> Callable[[str, str], None]:
    return lambda rule, text: rules.append(Applied(name, rule, text))


def _targets(
    found: Mapping[str, Native], filled: Mapping[str, Any] | None, names: Mapping[str, str], separator: str
) -> dict[str, str]:
    """The target's name of every layer of the source."""
    for name in names:
        if name not in found:
            raise ConversionError(f"{argument('names')} has {name!r}, and the source has: {few(found)}.")
    if filled is None:
        targets = {name: names.get(name, _spelled(name).replace(".", separator)) for name in found}
    else:
        by_spelling = {_spelled(name): name for name in filled}
        targets = {name: names.get(name, by_spelling.get(_spelled(name), "")) for name in found}
        if len(found) == len(filled) == 1 and not names:
            targets = {name: next(iter(filled)) for name in found}
        lost = [name for name, target in targets.items() if target not in filled]
        extra = [name for name in filled if name not in targets.values()]
        if lost or extra:
            sides = [f"the source has {few(lost)}, which the target has not"] if lost else []
            sides += [f"the target has {few(extra)}, which the source has not"] if extra else []
            raise ConversionError(
                f"Norm layers differ: {'; '.join(sides)}: give {argument('names')}, a mapping from one to the other."
            )
    twice = {target for target in targets.values() if list(targets.values()).count(target) > 1}
    if twice:
        raise ConversionError(f"Several layers would have the name {min(twice)!r}.")
    return targets


def _spelled(name: str) -> str:
    return name.replace("/", ".")


def _with_axis(norm: Norm, axis: int, name: str, rules: list[Applied]) -> Norm:
    if norm.ndim and norm.channel_axis() == axis % norm.ndim:
        return norm.but(axis=(axis,))
    if norm.axis != (axis,):
        _sayer(name, rules)("axis-layout", f"the channels are at axis {axis}, and were at axis {norm.axis[0]}")
    return norm.but(axis=(axis,))


def _moved(norm: Norm, target: Norm, name: str, at: str, rules: list[Applied]) -> Norm:
    """The record as the layer that it is written to has it: its axes, its weight offset, both weight and bias."""
    where, say = at or "the target", _sayer(at, rules)
    kinds = {norm.kind, target.kind}
    if kinds == {"instance_norm", "group_norm"}:
        groups = norm.num_groups if norm.kind == "group_norm" else target.num_groups
        if groups == norm.lengths[0]:  # the same function
            norm = norm.but(kind=target.kind, num_groups=target.num_groups)
            kinds = {norm.kind}
    if len(kinds) > 1:
        raise ConversionError(f"{name or 'the source'} is {norm.kind}, and {where} is {target.kind}.")
    if norm.num_groups != target.num_groups:
        raise ConversionError(
            f"{name or 'the source'} has {norm.num_groups} groups, and {where} has {target.num_groups}."
        )
    if len(norm.axis) > 1 and _last(norm) != _last(target):
        raise ConversionError(
            f"{name or 'the source'} normalizes axes {norm.axis}, and {where} normalizes axes {target.axis}."
        )
    if norm.lengths != target.lengths:
        raise ConversionError(
            f"{name or 'the source'} has channels {norm.lengths}, and {where} has channels {target.lengths}."
        )
    if target.weight_offset != norm.weight_offset:
        norm = plain_weight(norm.but(weight_offset=norm.weight_offset - target.weight_offset), say)
    if target.cast != norm.cast:
        say("cast-point", f"the weight is applied {'before' if target.cast == 'output' else 'after'} rounding")
    lacking = {
        key: value
        for key, value in (("weight", ones(norm)), ("bias", ones(norm) * 0))
        if getattr(target, key) is not None and getattr(norm, key) is None
    }
    for key in lacking:
        say("affine-pair", f"{key} is {'ones' if key == 'weight' else 'zeros'}")
    # What the layer does by itself is no matter for the writer.
    return norm.but(axis=target.axis, ndim=target.ndim or norm.ndim, cast="output", weight_offset=0.0, **lacking)


def _last(norm: Norm) -> tuple[int, ...]:
    return tuple(a - norm.ndim if norm.ndim and a >= 0 else a for a in norm.axis)


def _fitting(writer: Framework, name: str, norm: Norm, new: Native, old: Native) -> Native:
    """The arrays for a layer that exists: those that it has, of the same shape, of a dtype that holds the values."""
    where = name or "the target"
    stored = writer.stored(new.layer, norm).keys() - {*writer.counters}  # and not what only new layers must have
    arrays = {k: v for k, v in new.arrays.items() if k in old.arrays or k in stored}
    missing = sorted(old.arrays.keys() - arrays.keys() - {*writer.counters})
    extra = sorted(arrays.keys() - old.arrays.keys())
    if missing or extra:
        words = [f"has {few(missing)}, which the source has not"] if missing else []
        words += [f"has no {few(extra)}, which the source has"] if extra else []
        raise ConversionError(f"{where} {' and '.join(words)}.")
    for key, value in arrays.items():
        if value.shape != old.arrays[key].shape:
            raise ConversionError(f"{key} of {where} has shape {old.arrays[key].shape}; received shape {value.shape}.")
        there = old.arrays[key].dtype
        with np.errstate(all="ignore"):
            same = there == value.dtype or np.array_equal(
                value, value.astype(there).astype(value.dtype), equal_nan=value.dtype.kind == "f"
            )
        if not same:
            raise ConversionError(f"{key} of {where} is {there}, which cannot hold these values in {value.dtype}.")
    return Native(new.layer, new.settings, arrays)


def _nothing(reader: Framework, left: Mapping[str, str]) -> str:
    if not left:
        return "The source has no norm layers."
    name, reason = next(((n, r) for n, r in left.items() if "settings" in r), next(iter(left.items())))
    return f"No array is known to belong to a norm layer of {reader.name}; {name}: {reason}."


def _grouped(rules: Iterable[Applied]) -> dict[tuple[str, str], list[str]]:
    found: dict[tuple[str, str], list[str]] = {}
    for a in sorted(rules, key=lambda a: a.rule):
        found.setdefault((a.rule, a.text), []).append(a.layer or "the layer")
    return found


def few(names: Iterable[str]) -> str:
    """The first names, and how many more there are."""
    listed = [n or "the layer" for n in names]
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")
