"""The layers of ``normkit.keras``: Keras's, whose ``call`` is normkit's on whatever backend Keras runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops

from normkit import _masked, functional
from normkit._dispatch import backend_of
from normkit._layer import call
from normkit._policies import SETTINGS, Policed, Policies, batch_norm, merged, with_settings

__all__ = [
    "BatchNormalization",
    "GroupNormalization",
    "InstanceNormalization",
    "LayerNormalization",
    "RMSNormalization",
]

Array = Any

#: As Keras has it: one value counts, with a variance of zero.
USUAL = Policies(single_value=None)
OURS = {**SETTINGS, "single_value": None}

# torch.compile follows the look-up of a type that is known, not the search for one that is not.
for known in (ops.zeros(1), keras.Variable(ops.zeros(1)).value):
    backend_of("x", known)


def widened(layer: Any, inputs: Array) -> Array:
    """Inputs in the wider of their dtype and the layer's, which an input that is not autocast may be narrower than."""
    given = keras.backend.standardize_dtype(inputs.dtype)
    if given == "float64":  # which Keras widens to on TensorFlow alone
        return inputs
    compute = layer.compute_dtype if keras.backend.is_float_dtype(given) else "float32"
    return ops.cast(inputs, keras.backend.result_type(given, compute))


def values(*variables: Any) -> tuple[Array | None, ...]:
    """What the layer's variables hold; ``None`` for those that it does not have."""
    return tuple(None if v is None else v.value for v in variables)


def along(mask: Array, inputs: Array) -> Array:
    """A mask over the first axes of inputs, as Keras makes them, as one that broadcasts to inputs."""
    missing = len(inputs.shape) - len(mask.shape)
    if missing > 0:
        mask = ops.expand_dims(mask, tuple(range(-missing, 0)))
    return ops.cast(mask, "bool")


class BatchNormalizationCall(Policed):
    """Batch norm by the batch, whose statistics are counted, or by the moving ones: as Keras chooses."""

    _policies = USUAL

    @property
    def trainable(self: Any) -> bool:
        """As Keras's: False is inference mode."""
        return keras.Layer.trainable.fget(self)

    @trainable.setter
    def trainable(self: Any, value: bool) -> None:
        keras.Layer.trainable.fset(self, value)
        self._set_affine()

    def build(self: Any, input_shape: tuple) -> None:
        """Make gamma and beta, and the moving statistics."""
        super().build(input_shape)  # type: ignore[misc]
        self._set_affine()

    def _set_affine(self: Any) -> None:  # where the layer is trainable
        for variable in (getattr(self, "gamma", None), getattr(self, "beta", None)):
            if variable is not None:
                variable.trainable = self.trainable and self._train_affine

    def call(self: Any, inputs: Array, training: Any = None, mask: Array | None = None) -> Array:
        x = widened(self, inputs)
        gamma, beta, mean, var = values(self.gamma, self.beta, self.moving_mean, self.moving_variance)
        options = {"axis": self.axis, "eps": self.epsilon}
        policies, training = self._policies, bool(training and self.trainable)
        if not any(policies.modes(training)):
            return ops.cast(functional.batch_norm(x, mean, var, gamma, beta, **options), self.compute_dtype)
        if mask is not None:
            mask = along(mask, x)
        train = _masked.batch_norm_train
        y, stats, _ = batch_norm(
            policies, training, call, train, x, mean, var, gamma, beta, everywhere=True, mask=mask, **options
        )
        if stats is not None:
            owner, backend = f"{type(self).__name__} {self.name!r}", backend_of("x", x)
            mean, var, _ = merged(owner, backend, (mean, var, 0), stats, self.momentum, False, policies)
            self.moving_mean.assign(mean)
            self.moving_variance.assign(var)
        return ops.cast(y, self.compute_dtype)


class LayerNormalizationCall:
    """Layer norm over any axes."""

    def call(self: Any, inputs: Array) -> Array:
        x = widened(self, inputs)
        gamma, beta = (shaped(p, self.axis, x) for p in values(self.gamma, self.beta))
        y = functional.layer_norm(x, gamma, beta, axis=self.axis, eps=self.epsilon)
        return ops.cast(y, self.compute_dtype)


class RMSNormalizationCall:
    """RMS norm over any axes."""

    def call(self: Any, x: Array) -> Array:
        inputs = widened(self, x)
        (scale,) = (shaped(p, self.axis, inputs) for p in values(self.scale))
        return functional.rms_norm(inputs, scale, axis=self.axis, eps=self.epsilon)


class GroupNormalizationCall:
    """Group norm, channels at any axis but the first."""

    def call(self: Any, inputs: Array) -> Array:
        x = widened(self, inputs)
        gamma, beta = values(self.gamma, self.beta)
        y = functional.group_norm(x, self.groups, gamma, beta, axis=self.axis, eps=self.epsilon)
        return ops.cast(y, self.compute_dtype)


def shaped(param: Array | None, axes: list[int], x: Array) -> Array | None:
    """A parameter with its axes in x's order: Keras has those of negative numbers first."""
    lengths = tuple(x.shape[a] for a in sorted(a % len(x.shape) for a in axes))
    # One of another size goes on as it is: the function says what is wrong with it.
    if param is None or tuple(param.shape) == lengths or math.prod(param.shape) != math.prod(n or 0 for n in lengths):
        return param
    return ops.reshape(param, lengths)


def signed_as(original: type, **more: Any) -> Callable:
    """Give an ``__init__`` that takes anything the signature of a class's own, in which Keras looks arguments up."""

    def sign(init: Any) -> Any:
        init.__signature__ = with_settings(original, more)
        return init

    return sign


@keras.saving.register_keras_serializable(package="normkit")
class BatchNormalization(BatchNormalizationCall, keras.layers.BatchNormalization):
    """:class:`keras.layers.BatchNormalization` with normkit's numbers.

    ``y = (x - mean) / sqrt(var + epsilon) * gamma + beta``, with mean and biased variance of the batch in training, of
    the moving statistics in inference and where ``trainable`` is false. Arguments, weights and moving statistics are
    those of :class:`keras.layers.BatchNormalization`; ``momentum`` is the weight of the old value.

    Notes
    -----
    Four things differ. ``mask`` may have any rank up to that of the inputs: one of fewer axes is over the first of
    them, as Keras makes masks, one of as many broadcasts to them. A batch without (unmasked) elements moves no
    statistics. The count of unmasked elements is exact. ``synchronized`` and ``renorm`` are refused.

    Arguments and attributes beside Keras's: ``single_value``, ``empty_batch``, ``nonfinite``, ``use_batch_stats`` and
    ``update_stats`` as in :class:`normkit.BatchNorm`, where ``training and trainable`` is what None follows;
    ``single_value=None`` is as Keras: one value counts, with a variance of zero. ``train_affine=False`` takes gamma and
    beta out of the trainable weights. ``get_config`` has those that are set.
    """

    @signed_as(keras.layers.BatchNormalization, **OURS)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        settings = {name: kwargs.pop(name) for name in OURS if name in kwargs}
        super().__init__(*args, **kwargs)
        for name, value in settings.items():
            setattr(self, name, value)
        for name in ("synchronized", "renorm"):
            if getattr(self, name, False):
                raise ValueError(
                    f"normkit.keras.BatchNormalization takes no {name}=True: use keras.layers.BatchNormalization for "
                    f"it, which normkit.replace leaves alone."
                )

    def get_config(self) -> dict[str, Any]:
        """The arguments: Keras's, and of ours those that say something."""
        said = {name: getattr(self, name) for name in OURS}
        return {**super().get_config(), **{n: v for n, v in said.items() if v != OURS[n]}}


@keras.saving.register_keras_serializable(package="normkit")
class LayerNormalization(LayerNormalizationCall, keras.layers.LayerNormalization):
    """:class:`keras.layers.LayerNormalization` with normkit's numbers: :func:`normkit.layer_norm`.

    Arguments and weights are those of :class:`keras.layers.LayerNormalization`, but that ``rms_scaling``, which divides
    by the wrong root, is refused. Any set of axes will do, on every backend.
    """

    @signed_as(keras.layers.LayerNormalization)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("rms_scaling"):
            raise ValueError(
                "normkit.keras.LayerNormalization takes no rms_scaling=True, which divides by the root of the "
                "variance: use normkit.keras.RMSNormalization."
            )
        super().__init__(*args, **kwargs)


@keras.saving.register_keras_serializable(package="normkit")
class RMSNormalization(RMSNormalizationCall, keras.layers.RMSNormalization):
    """:class:`keras.layers.RMSNormalization` with normkit's numbers: :func:`normkit.rms_norm`.

    Arguments and weights are those of :class:`keras.layers.RMSNormalization`. Any set of axes will do.
    """

    @signed_as(keras.layers.RMSNormalization)
    def __init__(self, axis: int | Sequence[int] = -1, *args: Any, **kwargs: Any) -> None:
        # Before 3.14 Keras takes a tuple for one axis.
        super().__init__(list(axis) if isinstance(axis, tuple) else axis, *args, **kwargs)


@keras.saving.register_keras_serializable(package="normkit")
class GroupNormalization(GroupNormalizationCall, keras.layers.GroupNormalization):
    """:class:`keras.layers.GroupNormalization` with normkit's numbers: :func:`normkit.group_norm`.

    Arguments and weights are those of :class:`keras.layers.GroupNormalization`.
    """


@keras.saving.register_keras_serializable(package="normkit")
class InstanceNormalization(GroupNormalizationCall, keras.layers.GroupNormalization):
    """Every channel of every sample by its own statistics: :func:`normkit.instance_norm`, which Keras has not.

    Arguments and weights are those of :class:`keras.layers.GroupNormalization` without ``groups``: there are as many as
    channels. In .weights.h5 files Keras names a model's layers by their class, so that such a file of a
    ``GroupNormalization(groups=-1)`` is not read into this layer: :func:`normkit.replace` such a layer, or
    :func:`normkit.convert` one model to the other.
    """

    def __init__(self, axis: int = -1, epsilon: float = 1e-3, **kwargs: Any) -> None:
        super().__init__(groups=-1, axis=axis, epsilon=epsilon, **kwargs)

    def build(self, input_shape: tuple) -> None:
        """Make gamma and beta for the channels of the inputs."""
        if len(input_shape) < 3:
            raise ValueError(
                f"InstanceNormalization takes inputs of samples, channels and at least one axis more; received inputs "
                f"of shape {tuple(input_shape)}."
            )
        super().build(input_shape)

    def get_config(self) -> dict[str, Any]:
        """The arguments."""
        config = super().get_config()
        del config["groups"]
        return config
