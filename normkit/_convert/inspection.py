"""``normkit.inspect``: every norm layer of a model or a checkpoint, and what looks wrong."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from . import files
from .conversion import few
from .framework import Framework, framework, framework_of
from .record import Array, ConversionError, Momentum, Native
from .source import Fallback, flattened, layers_of, nameless, natives_of

HALF = ("float16", "bfloat16")
#: A weight of new statistics above this one is more likely that of the old ones.
HIGH = 0.5


@dataclass(frozen=True)
class Finding:
    """What looks wrong with a layer, why that matters, and what to do."""

    id: str
    layer: str
    reason: str
    fix: str


@dataclass(frozen=True)
class Row:
    """A norm layer, as its framework says it."""

    name: str
    layer: str
    #: The shape of its parameters.
    lengths: tuple[int, ...] | None
    #: None where the file does not say.
    eps: float | None
    momentum: float | None
    num_groups: int | None
    dtype: str
    #: The dtype of the running statistics; "" where there are none.
    statistics: str


@dataclass
class Inspection:
    """The norm layers of a model, and the findings."""

    framework: str
    rows: list[Row] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    #: Arrays of a file that may belong to a norm layer, and layers of a model that look like one: nothing says it.
    unknown: list[str] = field(default_factory=list)

    def json(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        return asdict(self)

    def grouped(self) -> dict[tuple[str, str, str], list[str]]:
        """The layers of each finding, by its id, reason and fix."""
        found: dict[tuple[str, str, str], list[str]] = {}
        for f in self.findings:
            found.setdefault((f.id, f.reason, f.fix), []).append(f.layer)
        return found

    def __str__(self) -> str:
        lines = [self.heading()]
        for row in self.rows:
            eps = "not known" if row.eps is None else f"{row.eps:g}"
            rate = "" if row.momentum is None else f", momentum {row.momentum:g}"
            lines.append(f"  {row.name or '(the layer)'}: {row.layer}{row.lengths or ''}, eps {eps}{rate}")
        for (kind, reason, fix), names in self.grouped().items():
            lines.append(f"{kind} ({few(names)}): {reason}. {fix}.")
        if self.unknown:
            lines.append(f"{len(self.unknown)} may be norm layers, which nothing says: {few(self.unknown)}")
        return "\n".join(lines)

    def heading(self) -> str:
        """How many there are."""
        number = len(self.rows)
        found = f"{number} norm layer{'s' * (number != 1)}" if number else "no norm layer was found"
        return f"{self.framework}: {found}"


def inspect(model: Any, *, framework: str | None = None, settings: Mapping[str, Any] | None = None) -> Inspection:
    """List the norm layers of a model or a checkpoint, and say what looks wrong with them.

    Parameters
    ----------
    model : what :func:`normkit.convert` takes as its source: a model, arrays by name, or the path of a file
        (.safetensors, .npz, .keras, .onnx, .pt, .pth)
    framework : what arrays or a file come from, where they do not say it
    settings : class and arguments of layers, for arrays and files, as in :func:`normkit.convert`

    Returns
    -------
    Inspection
        ``rows``, ``findings`` (each with id, layer, reason and fix), ``json()``; ``print`` it.

    Raises
    ------
    ConversionError
        A ValueError: the framework is unknown, the file cannot be read.
    ImportError
        A library is needed and not installed.

    Notes
    -----
    =========================  =======================================================================================
    id                         what was found
    =========================  =======================================================================================
    momentum-range             momentum below 0 or above 1
    momentum-sense             momentum weights the statistics that it should not: above 0.5 in torch, below elsewhere
    statistics-never-move      momentum keeps the old statistics for ever (torch: 0, or None in InstanceNorm)
    mixed-eps                  layers of one kind have several eps
    half-statistics            running statistics in float16 or bfloat16
    nonfinite-statistics       NaN or infinity in a running mean or variance
    nonfinite-parameters       NaN or infinity in weight or bias
    negative-variance          a running variance below zero
    zero-variance              a running variance of zero
    initial-statistics         mean 0 and variance 1 throughout: never trained, or never loaded
    group-norm-channels-last   torch's GroupNorm in a channels_last model
    no-statistics              torch's track_running_stats=False: inference depends on the batch
    statistics-frozen          the layer keeps its statistics while the rest of the model trains
    statistics-not-frozen      weight and bias are not trained, and the statistics still move
    =========================  =======================================================================================

    Examples
    --------
    >>> import torch
    >>> import normkit as nk
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8, momentum=0.9))
    >>> for finding in nk.inspect(model).findings:
    ...     print(finding.id)
    momentum-sense
    initial-statistics
    """
    reader, natives, unknown = _layers(model, framework, settings or {})
    result = Inspection(reader.name, unknown=unknown)
    for name, native in natives.items():
        arrays = {k: native.arrays[v] for k, v in names_of(reader, native).items() if v in native.arrays}
        result.rows.append(_row(reader, name, native, arrays))
        for check in CHECKS:
            for kind, reason, fix in check(reader, native, arrays):
                result.findings.append(Finding(kind, name, reason, fix))
    result.findings += _mixed_eps(result.rows)
    return result


def _layers(model, name, settings) -> tuple[Framework, dict[str, Native], list[str]]:
    fallback = Fallback(settings)
    if isinstance(model, str | os.PathLike):
        content = files.read(Path(model), name)
        if content.model is not None:
            assert content.framework is not None
            natives, strange = layers_of(content.framework, content.model)
            return content.framework, natives, list(strange)
        reader, flat = content.framework or _likely(Path(model), content.arrays), content.arrays
        fallback = fallback.over(content.settings)
    else:
        found = framework_of(model)
        if found is not None:
            natives, strange = layers_of(found, model)
            return found, natives, list(strange)
        if name is None:
            raise ConversionError(
                f"inspect takes a model, arrays with framework=NAME, or a path; received {type(model).__name__}."
            )
        reader = framework(name)
        flat = flattened(reader, model)
    natives, left = natives_of(reader, flat, fallback)
    return reader, natives, [key for key, reason in left.items() if "settings" in reason]


def _likely(path: Path, arrays: Mapping[str, Array]) -> Framework:
    """The framework whose names a file's arrays have."""
    for name in ("torch", "keras", "linen", "haiku"):
        groups, _ = framework(name).split(arrays)
        if any(framework(name).guess(group) for group in groups.values()):
            return framework(name)
    raise nameless(path)


def names_of(reader: Framework, native: Native) -> Mapping[str, str]:
    """Our names of a layer's arrays, and the framework's."""
    return reader.arrays.get(native.layer) or reader.arrays[""]


def _row(reader: Framework, name: str, native: Native, arrays: Mapping[str, Array]) -> Row:
    settings = native.settings
    parameters = [arrays[k] for k in ("weight", "bias") if k in arrays]
    statistics = [arrays[k] for k in ("mean", "var") if k in arrays]
    groups = settings.get("num_groups", settings.get("groups"))
    return Row(
        name=name,
        layer=settings.get("class", native.layer),
        lengths=tuple(next(iter(arrays.values())).shape) if arrays else None,
        eps=next((settings[k] for k in ("eps", "variance_epsilon", "epsilon") if k in settings), None),
        momentum=next((settings[k] for k in ("momentum", "decay_rate") if k in settings), None),
        num_groups=groups,
        dtype=_dtype(parameters),
        statistics=_dtype(statistics),
    )


def _dtype(arrays: list[Array]) -> str:
    return ", ".join(dict.fromkeys(a.dtype.name for a in arrays))


Check = Callable[[Framework, Native, Mapping[str, Array]], Iterator[tuple[str, str, str]]]


def _momentum(reader, native, arrays):
    settings = native.settings
    name = "decay_rate" if "decay_rate" in settings else "momentum"
    if "mean" not in arrays or name not in settings:
        return
    value = settings[name]
    if value is None:
        if native.layer.startswith("InstanceNorm"):
            yield ("statistics-never-move", "momentum=None leaves the statistics of torch's InstanceNorm as they are",
                   "Set momentum to 0.1")  # fmt: skip
        return
    weights, usual = ("new", 0.1) if reader.name == "torch" else ("old", 0.9)
    if not 0 <= value <= 1:
        yield ("momentum-range", f"{name} {value:g} is no share of the {weights} statistics: they grow without end",
               f"Set {name} to {usual}")  # fmt: skip
        return
    new: Any = Momentum(value, weights).of("new")
    if new == 0:
        yield ("statistics-never-move", f"{name} {value:g} never lets the new statistics in", f"Set {name} to {usual}")
    elif new > HIGH:
        other = new if weights == "old" else Momentum(value, weights).of("old")
        reason = f"{name} {value:g} weights the {weights} statistics: the last batch counts for {new:g}"
        yield ("momentum-sense", reason,
               f"Set {name} to {other:g}, if it comes from a framework where it weights the other ones")  # fmt: skip


def _half(reader, native, arrays):
    for key in ("mean", "var"):
        if key in arrays and arrays[key].dtype.name in HALF:
            kind = arrays[key].dtype.name
            limit = "overflow above 65504 and " if kind == "float16" else ""
            yield ("half-statistics", f"running statistics in {kind} {limit}stop moving when updates are small",
                   "Keep them in float32")  # fmt: skip
            return


def _values(reader, native, arrays):
    names = names_of(reader, native)
    for key in ("mean", "var", "weight", "bias"):
        if key in arrays:
            bad = int((~np.isfinite(arrays[key].astype(np.float64))).sum())
            what = "statistics" if key in ("mean", "var") else "parameters"
            fix = "Recalibrate on clean data" if what == "statistics" else "Take an earlier checkpoint"
            if bad:
                yield f"nonfinite-{what}", f"{names[key]} has {bad} values that are not finite", fix
    if "var" not in arrays:
        return
    var = arrays["var"].astype(np.float64)
    if (var < 0).any():
        yield ("negative-variance", f"{names['var']} is negative in {int((var < 0).sum())} channels: NaN comes out",
               "Check that it is the variance; recalibrate")  # fmt: skip
    zero = int((var == 0).sum())
    if zero and not native.mode.get("initial"):
        yield ("zero-variance", f"{names['var']} is zero in {zero} channels: there, x is multiplied by 1 / sqrt(eps)",
               "Prune these channels, or recalibrate")  # fmt: skip


def _initial(reader, native, arrays):
    if native.mode.get("initial"):
        yield ("initial-statistics", "there was no batch yet", "Load the statistics, or train or recalibrate")
    elif "mean" in arrays and arrays["mean"].size and not arrays["mean"].any() and (arrays["var"] == 1).all():
        yield ("initial-statistics", "mean is 0 and variance 1 throughout, as before the first batch",
               "Load the statistics, or train or recalibrate")  # fmt: skip


def _mode(reader, native, arrays):
    mode, settings = native.mode, native.settings
    if mode.get("channels_last") and native.layer == "GroupNorm":
        yield ("group-norm-channels-last", "on channels_last x, torch's GroupNorm takes its variance as E[x²] - E[x]²",
               "Use normkit's GroupNorm, or contiguous x")  # fmt: skip
    if settings.get("track_running_stats") is False and native.layer.startswith(("Batch", "Sync")):
        yield ("no-statistics", "track_running_stats=False normalizes by the batch in inference too",
               "Track them, or use group norm")  # fmt: skip
    if "mean" not in arrays:
        return
    if mode.get("model_training") and mode.get("frozen"):
        yield ("statistics-frozen", f"{mode['frozen']}: its statistics stay as they are while the model trains",
               f"{mode['thaw']}, if that is not intended")  # fmt: skip
    elif mode.get("training") and settings.get("requires_grad") is False:
        yield ("statistics-not-frozen", "weight and bias are not trained, and in train() the statistics still move",
               "Call eval() on the layer after train() on the model")  # fmt: skip


CHECKS: tuple[Check, ...] = (_momentum, _half, _values, _initial, _mode)


def _mixed_eps(rows: list[Row]) -> list[Finding]:
    """Layers of one class whose eps is not that of most."""
    found = []
    for layer in dict.fromkeys(row.layer for row in rows):
        same = [row for row in rows if row.layer == layer and row.eps is not None]
        values = [row.eps for row in same]
        if len(set(values)) > 1:
            usual = max(dict.fromkeys(values), key=values.count)
            for row in same:
                if row.eps != usual:
                    reason = f"eps is {row.eps:g}, and {usual:g} in {values.count(usual)} other {layer}"
                    found.append(Finding("mixed-eps", row.name, reason, "Check which one the model was trained with"))
    return found
