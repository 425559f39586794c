"""Demonstrations of modes: what is frozen, what stands for a batch, what many batches or devices add up to."""

from __future__ import annotations

import numpy as np

import normkit as nk
from normkit.conformance.divergences import frameworks as f
from normkit.conformance.divergences.demonstration import Columns, shows
from normkit.conformance.divergences.show_training import BATCH


@shows("freeze-semantics", "x = [8, 12]; a frozen layer is called in training", "running mean, at first 0")
def freeze_semantics() -> Columns:
    def torch():
        import torch

        layer = torch.nn.BatchNorm1d(1, momentum=0.5).requires_grad_(False)
        layer(torch.tensor(BATCH))
        return layer.running_mean

    def keras():
        import keras

        layer = keras.layers.BatchNormalization(momentum=0.5)
        layer.trainable = False
        layer(BATCH, training=True)
        return layer.moving_mean

    def ours(**switches):
        layer = nk.BatchNorm(1, momentum=0.5, train_affine=False, **switches)
        layer(BATCH)
        return layer.running.mean

    yield "torch", torch
    yield "Keras", keras
    yield "Flax", lambda: f.flax_batch_norm(BATCH, momentum=0.5).mean
    yield "normkit train_affine=False, use_batch_stats=False", lambda: ours(use_batch_stats=False)
    yield "normkit train_affine=False", ours


@shows("eval-without-stats", "x = [8, 12] in inference, before any training", "y")
def eval_without_stats() -> Columns:
    def torch(**options):
        import torch

        return torch.nn.BatchNorm1d(1, **options).eval()(torch.tensor(BATCH))

    def flax():
        import jax.numpy as jnp
        from flax import nnx

        return nnx.BatchNorm(1, use_running_average=True, rngs=nnx.Rngs(0))(jnp.asarray(BATCH))

    start = np.zeros(1, np.float32), np.ones(1, np.float32)
    yield "torch track_running_stats=False", lambda: torch(track_running_stats=False)
    yield "torch", torch
    yield "Keras", lambda: f.keras_layer("BatchNormalization", BATCH)
    yield "Flax", flax
    yield "normkit batch_norm_train", lambda: nk.batch_norm_train(BATCH)[0]
    yield "normkit batch_norm", lambda: nk.batch_norm(BATCH, *start)


@shows("instance-norm-stats", "an instance norm of one channel", "its running statistics")
def instance_norm_stats() -> Columns:
    def torch(**options):
        import torch

        return ", ".join(torch.nn.InstanceNorm1d(1, **options).state_dict()) or "none"

    def keras():
        import keras

        layer = keras.layers.GroupNormalization(-1, scale=False, center=False)
        layer.build((2, 3, 1))
        return ", ".join(v.name for v in layer.variables) or "none"

    def flax():
        from flax import nnx

        layer = nnx.InstanceNorm(1, use_scale=False, use_bias=False, rngs=nnx.Rngs(0))
        return ", ".join(str(path[-1]) for path, _ in nnx.to_flat_state(nnx.state(layer, nnx.Variable))) or "none"

    yield "torch track_running_stats=True", lambda: torch(track_running_stats=True)
    yield "torch", torch
    yield "Keras", keras
    yield "Flax", flax
    yield "normkit", lambda: ", ".join(nk.InstanceNorm(1, affine=False).state_dict()) or "none"


@shows("renorm-state", "a batch norm of one channel", "what it stores beside mean and variance")
def renorm_state() -> Columns:
    def keras(**options):
        import keras

        layer = keras.layers.BatchNormalization(scale=False, center=False, **options)
        layer.build((2, 1))
        return ", ".join(v.name for v in layer.variables if v.name not in ("moving_mean", "moving_variance")) or "none"

    def torch():
        import torch

        return beside(torch.nn.BatchNorm1d(1, affine=False))

    def ours():
        return beside(nk.BatchNorm(1, affine=False, r_max=3.0, d_max=5.0))

    def beside(layer):
        known = ("running_mean", "running_var", "num_batches_tracked")
        return ", ".join(name for name in layer.state_dict() if name not in known) or "none"

    yield "Keras renorm=True", lambda: keras(renorm=True)
    yield "Keras", keras
    yield "torch", torch
    yield "normkit r_max, d_max", ours


@shows("eqx-default-mode", "x = [8, 12] in training, after a batch of zeros", "y")
def eqx_default_mode() -> Columns:
    zeros = np.zeros(1, np.float32)
    updated = nk.RunningStats(zeros, zeros).update(nk.batch_norm_train(BATCH)[1], momentum=0.99, unbiased=False)

    yield "Equinox", lambda: f.equinox_batch_norm(0 * BATCH, BATCH).y
    yield "Equinox mode='batch'", lambda: f.equinox_batch_norm(0 * BATCH, BATCH, mode="batch").y
    yield "torch", lambda: f.torch_batch_norm(BATCH).y
    yield "Keras", lambda: f.keras_batch_norm(BATCH).y
    yield "Flax", lambda: f.flax_batch_norm(BATCH).y
    yield "normkit batch_norm", lambda: nk.batch_norm(BATCH, updated.mean, updated.var)
    yield "normkit batch_norm_train", lambda: nk.batch_norm_train(BATCH)[0]


@shows("recalibration-math", "two batches: x = [8, 12], then x = [28, 32]", "running variance of both together")
def recalibration_math() -> Columns:
    batches = [BATCH, BATCH + 20]

    def torch():
        import torch

        layer = torch.nn.BatchNorm1d(1)
        torch.optim.swa_utils.update_bn([torch.tensor(x) for x in batches], layer)
        return layer.running_var

    def averaged():
        stats = nk.RunningStats(np.zeros(1, np.float32), np.ones(1, np.float32))
        for x in batches:
            stats = stats.update(nk.batch_norm_train(x)[1], momentum=None)
        return stats.var

    def recalibrated():
        import torch

        model = torch.nn.Sequential(torch.nn.BatchNorm1d(1))
        nk.recalibrate(model, [torch.tensor(x) for x in batches])
        return model[0].running_var

    yield "torch update_bn", torch
    yield "normkit momentum=None", averaged
    yield "normkit recalibrate", recalibrated


@shows(
    "sync-stats", "x = [8, 12] and [0, 0] on two devices, of which 8, 12 and the first 0 are valid", "the mean of all"
)
def sync_stats() -> Columns:
    x = np.stack([BATCH, 0 * BATCH])
    mask = np.array([[[True], [True]], [[True], [False]]])

    def flax():
        import jax
        import jax.numpy as jnp
        from flax import linen

        layer = linen.BatchNorm(use_running_average=False, momentum=0.0, axis_name="devices")
        variables = layer.init(jax.random.key(0), x[0])

        def step(x, mask):
            return layer.apply(variables, x, mask=mask, mutable=["batch_stats"])[1]["batch_stats"]["mean"]

        return jax.vmap(step, axis_name="devices")(jnp.asarray(x), jnp.asarray(mask))[0]

    yield "Flax", flax
    yield "normkit mask", lambda: nk.batch_norm_train(x.reshape(4, 1), mask=mask.reshape(4, 1))[1].mean


@shows("mom-checkpoint", "x = [8, 12], forward and backward once; 0.5 as the momentum", "running mean")
def mom_checkpoint() -> Columns:
    def torch(checkpointed, once=False):
        import torch
        from torch.utils.checkpoint import checkpoint

        layer = (nk.torch if once else torch.nn).BatchNorm1d(1, momentum=0.5)
        x = torch.tensor(BATCH, requires_grad=True)
        if once:
            with nk.torch.count_once():
                checkpoint(layer, x, use_reentrant=False).sum().backward()
        else:
            (checkpoint(layer, x, use_reentrant=False) if checkpointed else layer(x)).sum().backward()
        return layer.running_mean

    yield "torch checkpoint", lambda: torch(True)
    yield "torch", lambda: torch(False)
    yield "normkit count_once()", lambda: torch(True, True)
