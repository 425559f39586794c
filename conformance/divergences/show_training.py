"""Demonstrations of running statistics: what goes into them, and what a bad batch does to them."""

from __future__ import annotations

import numpy as np

import normkit as nk
from normkit.conformance.divergences import frameworks as f
from normkit.conformance.divergences.demonstration import Columns, shows

#: Two samples of one channel: mean 10, variance 4 (divided by n), 8 (by n - 1).
BATCH = np.array([[8.0], [12.0]], np.float32)


def _started(channels=1) -> nk.RunningStats:
    return nk.RunningStats(np.zeros(channels, np.float32), np.ones(channels, np.float32))


def _updated(x=BATCH, axis=1, given=None, **options) -> nk.RunningStats:
    return _started(x.shape[axis]).update(nk.batch_norm_train(x, axis=axis, **(given or {}))[1], **options)


def _layer(x=BATCH, **options) -> nk.BatchNorm:
    layer = nk.BatchNorm(x.shape[1], **options)
    layer(x)
    return layer


@shows("momentum-sense", "x = [8, 12]; running mean 0; 0.9 as the momentum", "running mean after one batch")
def momentum_sense() -> Columns:
    yield "torch", lambda: f.torch_batch_norm(BATCH, momentum=0.9).mean
    yield "tf.nn", lambda: f.tf_batch_norm(BATCH, momentum=0.9).mean
    yield "Keras", lambda: f.keras_batch_norm(BATCH, momentum=0.9).mean
    yield "tf_keras", lambda: f.keras_batch_norm(BATCH, "tf_keras", momentum=0.9).mean
    yield "Flax", lambda: f.flax_batch_norm(BATCH, momentum=0.9).mean
    yield "Equinox", lambda: f.equinox_batch_norm(0 * BATCH, BATCH, momentum=0.9, mode="ema").mean
    yield "ONNX", lambda: f.onnx_batch_norm(BATCH, momentum=0.9).mean
    yield "normkit update_rate", lambda: _layer(update_rate=0.9).running.mean
    yield "normkit momentum", lambda: _layer(momentum=0.9).running.mean


@shows("momentum-none", "two batches: x = [8, 12], then x = [28, 32]", "running mean after both, with momentum=None")
def momentum_none() -> Columns:
    def torch(kind):
        import torch

        layer = getattr(torch.nn, kind)(1, momentum=None, track_running_stats=True)
        for shift in (0, 20):
            x = torch.tensor(BATCH + shift)
            layer(x if kind == "BatchNorm1d" else x.reshape(1, 1, 2))
        return layer.running_mean

    def ours(momentum):
        stats = _started()
        for shift in (0, 20):
            stats = stats.update(nk.batch_norm_train(BATCH + np.float32(shift))[1], momentum=momentum)
        return stats.mean

    yield "torch BatchNorm", lambda: torch("BatchNorm1d")
    yield "torch InstanceNorm", lambda: torch("InstanceNorm1d")
    yield "Keras", lambda: f.keras_batch_norm(BATCH, momentum=None).mean
    yield "Flax", lambda: f.flax_batch_norm(BATCH, momentum=None).mean
    yield "normkit momentum=None", lambda: ours(None)
    yield "normkit momentum=1.0", lambda: ours(1.0)


@shows("runvar-bias", "x = [8, 12]; only the batch counts", "running variance after one batch")
def runvar_bias() -> Columns:
    yield "torch", lambda: f.torch_batch_norm(BATCH, momentum=1.0).var
    yield "tf.nn", lambda: f.tf_batch_norm(BATCH, momentum=1.0).var
    yield "Keras", lambda: f.keras_batch_norm(BATCH, momentum=0.0).var
    yield "Flax", lambda: f.flax_batch_norm(BATCH, momentum=0.0).var
    yield "Haiku", lambda: f.haiku_batch_norm(BATCH, 0.0).var
    yield "Equinox", lambda: f.equinox_batch_norm(BATCH, momentum=0.0, mode="ema").var
    yield "ONNX", lambda: f.onnx_batch_norm(BATCH, momentum=0.0).var
    yield "normkit unbiased=True", lambda: _updated(momentum=0.0, unbiased=True).var
    yield "normkit unbiased=False", lambda: _updated(momentum=0.0, unbiased=False).var


@shows("runvar-bias-rank", "x = [8, 12], of shape (2, 1) and of shape (1, 1, 2, 1)", "running variance after one batch")
def runvar_bias_rank() -> Columns:
    yield "tf_keras rank 4", lambda: f.keras_batch_norm(BATCH[None, None], "tf_keras", momentum=0.0).var
    yield "tf_keras rank 2", lambda: f.keras_batch_norm(BATCH, "tf_keras", momentum=0.0).var
    yield "normkit unbiased=True", lambda: _updated(momentum=0.0, unbiased=True).var
    yield "normkit unbiased=False", lambda: _updated(momentum=0.0, unbiased=False).var


@shows("debias", "x = [8, 12]; the new statistics weigh 0.1", "running mean after one batch")
def debias() -> Columns:
    yield "Haiku", lambda: f.haiku_batch_norm(BATCH, 0.9).mean
    yield "torch", lambda: f.torch_batch_norm(BATCH, momentum=0.1).mean
    yield "Keras", lambda: f.keras_batch_norm(BATCH, momentum=0.9).mean
    yield "Flax", lambda: f.flax_batch_norm(BATCH, momentum=0.9).mean
    yield "ONNX", lambda: f.onnx_batch_norm(BATCH, momentum=0.9).mean
    yield "normkit momentum=0.9", lambda: _updated(momentum=0.9).mean


@shows("init-update", "a layer is made, with x = [8, 12] where that is asked for", "running mean before the first step")
def init_update() -> Columns:
    def torch():
        import torch

        return torch.nn.BatchNorm1d(1).running_mean

    def keras():
        import keras

        layer = keras.layers.BatchNormalization()
        layer.build(BATCH.shape)
        return layer.moving_mean

    def linen():
        import jax
        from flax import linen

        layer = linen.BatchNorm(use_running_average=False)
        return layer.init(jax.random.key(0), BATCH)["batch_stats"]["mean"]

    def flax():
        from flax import nnx

        return nnx.BatchNorm(1, rngs=nnx.Rngs(0)).mean[...]

    yield "Haiku", lambda: f.haiku_batch_norm(BATCH, only_init=True).mean
    yield "torch", torch
    yield "Keras", keras
    yield "Flax", flax
    yield "Linen", linen
    yield "normkit", lambda: nk.BatchNorm(1).running.mean


@shows("single-value", "one sample of one channel, x = [5]", "y in training")
def single_value() -> Columns:
    x = BATCH[:1] - 3

    yield "torch", lambda: f.torch_batch_norm(x).y
    yield "Keras", lambda: f.keras_batch_norm(x).y
    yield "Flax", lambda: f.flax_batch_norm(x).y
    yield "Haiku", lambda: f.haiku_batch_norm(x).y
    yield "ONNX", lambda: f.onnx_batch_norm(x).y
    yield 'normkit single_value="raise"', lambda: nk.BatchNorm(1, single_value="raise")(x)
    yield 'normkit single_value="zero"', lambda: nk.BatchNorm(1, single_value="zero")(x)
    yield 'normkit single_value="running"', lambda: nk.BatchNorm(1, single_value="running")(x)


@shows("empty-batch", "x of shape (0, 1)", "running mean and variance after one batch")
def empty_batch() -> Columns:
    x = BATCH[:0]

    def both(trained):
        return np.concatenate([f.numbers(trained.mean), f.numbers(trained.var)])

    yield "torch", lambda: both(f.torch_batch_norm(x))
    yield "Keras", lambda: both(f.keras_batch_norm(x))
    yield "tf_keras", lambda: both(f.keras_batch_norm(x, "tf_keras"))
    yield "Flax", lambda: both(f.flax_batch_norm(x))
    yield 'normkit empty_batch="keep"', lambda: both(_layer(x, empty_batch="keep").running)


@shows("all-masked", "two channels of x = [8, 12], nothing of which is valid; 0.5 as the momentum", "running variance")
def all_masked() -> Columns:
    x = np.stack([BATCH.T[0], BATCH.T[0]], -1)[None]
    none = np.zeros((1, 2), bool)

    def keras():
        import keras

        layer = keras.layers.BatchNormalization(momentum=0.5)
        layer(x, training=True, mask=keras.ops.convert_to_tensor(none))
        return layer.moving_variance

    yield "Keras", keras
    yield "Flax", lambda: f.flax_batch_norm(x, none[..., None], momentum=0.5).var
    yield "normkit", lambda: _updated(x, -1, {"mask": none[..., None]}, momentum=0.5).var


@shows("mask-eps", "two channels of x = [2²³, 5, 5, 5], only the first valid", "running mean, less 2²³", tolerance=0.0)
def mask_eps() -> Columns:
    x = np.repeat(np.array([2.0**23, 5, 5, 5], np.float32), 2).reshape(1, 4, 2)
    first = np.array([[True, False, False, False]])

    def keras():
        import keras

        layer = keras.layers.BatchNormalization(momentum=0.0)
        layer(x, training=True, mask=keras.ops.convert_to_tensor(first))
        return f.numbers(layer.moving_mean) - 2.0**23

    yield "Keras", keras
    yield "Flax", lambda: f.numbers(f.flax_batch_norm(x, first[..., None], momentum=0.0).mean) - 2.0**23
    yield (
        "normkit mask",
        lambda: (
            _updated(x, -1, {"mask": first[..., None], "single_value": "zero"}, momentum=0.0, unbiased=False).mean
            - 2.0**23
        ),
    )


@shows(
    "mask-rank-axis", "x of shape (2, 3, 2) with a mask of that shape, true but for one", "y where it is valid, summed"
)
def mask_rank_axis() -> Columns:
    x = np.arange(12, dtype=np.float32).reshape(2, 3, 2)
    mask = np.ones(x.shape, bool)
    mask[0, 0, 0] = False

    def torch():
        import torch

        return torch.nn.BatchNorm1d(3)(torch.tensor(x), mask=torch.tensor(mask))

    def keras():
        import keras

        return keras.layers.BatchNormalization()(x, training=True, mask=keras.ops.convert_to_tensor(mask))

    def summed(y):
        return np.sum(f.numbers(y), where=mask)

    yield "torch", torch
    yield "Keras", keras
    yield "Flax", lambda: summed(f.flax_batch_norm(x, mask).y)
    yield "normkit mask", lambda: summed(nk.batch_norm_train(x, axis=-1, mask=mask)[0])


@shows("nan-propagation", "x = [8, 12, NaN]", "running mean after one batch")
def nan_propagation() -> Columns:
    x = np.array([[8], [12], [np.nan]], np.float32)

    yield "torch", lambda: f.torch_batch_norm(x).mean
    yield "Keras", lambda: f.keras_batch_norm(x).mean
    yield "Flax", lambda: f.flax_batch_norm(x).mean
    yield "Haiku", lambda: f.haiku_batch_norm(x).mean
    yield "ONNX", lambda: f.onnx_batch_norm(x).mean
    yield 'normkit nonfinite="propagate"', lambda: _layer(x, nonfinite="propagate").running.mean
    yield 'normkit nonfinite="skip"', lambda: _layer(x, nonfinite="skip").running.mean
    yield 'normkit nonfinite="raise"', lambda: _layer(x, nonfinite="raise").running.mean
