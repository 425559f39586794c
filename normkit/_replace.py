"""Give a model's norm layers normkit's numbers, and take them back."""

from __future__ import annotations

from typing import Any

from ._report import NormLayer, Report, framework_of, kind_of, named
from .backends.models import original_of

#: What a layer holds where settings of ours are not at their defaults.
OWN = {"_policies", "_train_affine"}


def replace(model: Any) -> Report:
    """Give every norm layer of a model normkit's forward pass. :func:`restore` takes it back.

    The layers stay the objects that they are, with their parameters, buffers, hooks and mode: only their class
    changes, to a subclass of the one they had. An optimizer that holds the parameters goes on.

    Parameters
    ----------
    model : a torch.nn.Module, a keras.Layer (a model too) or a flax.nnx.Module, which may be a norm layer itself

    Returns
    -------
    Report
        What was replaced, and what was left with the reason: a subclass with a forward pass of its own, a norm that
        normkit has not, a lazy layer that is not built, a layer that was replaced before.

    Raises
    ------
    TypeError
        model is of no framework whose layers are known.
    ValueError
        The model has no norm layer, or it is compiled, scripted, exported or quantized: nothing is changed then.

    Examples
    --------
    >>> import torch
    >>> import normkit as nk
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.LayerNorm(16), torch.nn.BatchNorm1d(16))
    >>> nk.replace(model)
    Sequential: 2 norm layers replaced, 0 left
        1 torch.nn.LayerNorm, replaced
            1
        1 torch.nn.BatchNorm1d, replaced
            2
    """
    models = framework_of("replace", model)
    models.refuse(model)
    verdicts = [(layer, names, models.verdict(layer)) for layer, names in named(models, model)]
    norms = [(layer, names, verdict) for layer, names, verdict in verdicts if verdict is not None]
    if not norms:
        count = f"{len(verdicts)} layer{'s' * (len(verdicts) != 1)}, with itself"
        raise ValueError(f"replace found no norm layer in {type(model).__name__}, which has {count}.")
    changed, left = [], []
    for layer, names, verdict in norms:
        kind = kind_of(original_of(layer) or type(layer))
        if isinstance(verdict, str):
            left.append(NormLayer(names[0], kind, verdict, names[1:]))
        else:
            changed.append(NormLayer(names[0], kind, "", names[1:]))
            object.__setattr__(layer, "__class__", verdict)
    if changed:
        models.changed(model)
    return Report(type(model).__name__, "replaced", tuple(changed), tuple(left))


def restore(model: Any) -> Report:
    """Give back the class to every layer that :func:`replace` gave another: the model is what it was.

    What the layers learned since is kept, and settings that are normkit's alone are not. Layers of ``normkit.torch``,
    ``normkit.keras`` or ``normkit.flax`` that were built as such stay.

    Parameters
    ----------
    model : a model that went through :func:`replace`, or a copy of it

    Returns
    -------
    Report

    Raises
    ------
    TypeError
        model is of no framework whose layers are known.
    ValueError
        No layer of it was replaced.

    Examples
    --------
    >>> import torch
    >>> import normkit as nk
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.LayerNorm(16))
    >>> report = nk.replace(model)
    >>> nk.restore(model)
    Sequential: 1 norm layer restored, 0 left
        1 torch.nn.LayerNorm, restored
            1
    """
    models = framework_of("restore", model)
    changed = []
    for layer, names in named(models, model):
        original = original_of(layer)
        if original is not None:
            changed.append(NormLayer(names[0], kind_of(original), "", names[1:]))
            for name in OWN & vars(layer).keys():
                delattr(layer, name)
            object.__setattr__(layer, "__class__", original)
    if not changed:
        raise ValueError(f"restore found no layer in {type(model).__name__} that normkit.replace had changed.")
    models.changed(model)
    return Report(type(model).__name__, "restored", tuple(changed))
