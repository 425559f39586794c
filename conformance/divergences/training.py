"""Divergences of training: momentum, running statistics, modes, masks, batches with nothing in them."""

from __future__ import annotations

from normkit.conformance.divergences.record import Divergence, Side

_TORCH = "https://github.com/pytorch/pytorch/issues/"
_KERAS = "https://github.com/keras-team/keras/issues/"
_KERAS_SOURCE = "https://github.com/keras-team/keras/tree/master/keras/src/layers/normalization"
_FLAX = "https://github.com/google/flax/blob/main/flax/nnx/nn/normalization.py"
_LINEN = "https://github.com/google/flax/blob/main/flax/linen/normalization.py"
_HAIKU = "https://github.com/google-deepmind/dm-haiku/blob/main/haiku/_src/batch_norm.py"
_EQUINOX = "https://github.com/patrick-kidger/equinox/blob/main/equinox/nn/_batch_norm.py"
_TF_KERNEL = "https://github.com/tensorflow/tensorflow/blob/master/tensorflow/core/kernels/fused_batch_norm_op.cc"

TRAINING = (
    Divergence(
        "momentum-sense",
        "What momentum is the weight of",
        "momentum weights the new value in torch, the old one in normkit, Keras, Flax and ONNX",
        {"torch": f"{_TORCH}15298", "transformers": "https://github.com/huggingface/transformers/pull/19454"},
        (
            Side("the new statistics", ("torch", "tf.nn", "tinygrad", "apex"), "update_rate"),
            Side(
                "the old statistics", ("Keras", "tf_keras", "Flax", "Haiku", "Equinox", "ONNX", "Chainer"), "momentum"
            ),
        ),
        "momentum is the weight of the old statistics, in torch of the new ones: m becomes 1 - m",
    ),
    Divergence(
        "momentum-none",
        "What a momentum of None means",
        "torch's batch norm averages all batches, its instance norm never moves its statistics, others refuse",
        {"torch": f"{_TORCH}194504"},
        (
            Side("the average of all batches", ("torch BatchNorm",), "momentum=None"),
            Side("statistics that never move", ("torch InstanceNorm",), "momentum=1.0"),
            Side("refused", ("Keras", "Flax")),
        ),
        "a momentum of None has its own meaning: an average of all batches, or statistics that never move",
    ),
    Divergence(
        "runvar-bias",
        "What the stored variance is divided by",
        "the stored variance is divided by n, where the definition and torch divide by n - 1",
        {"torch": f"{_TORCH}1410", "keras": _KERAS_SOURCE, "flax": _FLAX, "tf.nn": _TF_KERNEL},
        (
            Side("n - 1", ("torch", "tf.nn", "Chainer", "tinygrad"), "unbiased=True"),
            Side("n", ("Keras", "Flax", "Haiku", "Equinox", "ONNX"), "unbiased=False"),
        ),
        "the stored variance is kept as it is; from the next update on, the framework divides by another number (n or "
        "n - 1)",
    ),
    Divergence(
        "runvar-bias-rank",
        "One layer, two divisors of the stored variance",
        "tf_keras takes TensorFlow's fused kernel, which divides by n - 1, for x of rank 4 and 5, and divides by n "
        "elsewhere",
        {"tf_keras": "https://github.com/keras-team/tf-keras/tree/master/tf_keras/layers/normalization"},
        (
            Side("n - 1", ("tf_keras rank 4",), "unbiased=True"),
            Side("n", ("tf_keras rank 2",), "unbiased=False"),
        ),
        "tf_keras divides by n - 1 where it is fused (x of rank 4 or 5), by n elsewhere",
    ),
    Divergence(
        "debias",
        "Whether running statistics are rid of where they started",
        "haiku divides its moving average by 1 - momentum ** steps, so that the zero that it starts from is gone after "
        "one batch; others keep a part of their start",
        {"haiku": _HAIKU, "equinox": "https://github.com/patrick-kidger/equinox/issues/1010"},
        (
            Side("debiased", ("Haiku",)),
            Side("with a part of the start", ("torch", "Keras", "Flax", "ONNX"), "momentum=0.9"),
        ),
        "a zero-debiased average is read as the average; it is written with a counter that debiases no more",
    ),
    Divergence(
        "init-update",
        "Whether making a layer's state counts a batch",
        "haiku's init with is_training=True stores the statistics of the batch it is given; others start from (0, 1)",
        {"haiku": _HAIKU, "flax": _LINEN},
        (
            Side("the batch is stored", ("Haiku",)),
            Side("mean 0, variance 1", ("torch", "Keras", "Flax", "Linen"), "always"),
        ),
    ),
    Divergence(
        "single-value",
        "Training on one value per channel",
        "one value has no variance: torch refuses it (in instance norm in inference too), Keras, Flax and ONNX answer "
        "with the bias and store a variance of zero",
        {"torch": f"{_TORCH}1381", "keras": _KERAS_SOURCE, "flax": _FLAX},
        (
            Side("refused", ("torch",), 'single_value="raise"'),
            Side("the bias", ("Keras", "Flax", "Haiku", "ONNX"), 'single_value="zero"'),
            Side("by running statistics", (), 'single_value="running"'),
        ),
        "a single_value that was set is left out where only normkit's layers can be told",
    ),
    Divergence(
        "empty-batch",
        "Training on a batch of no elements",
        "the running statistics become NaN in Keras and Flax, for good; torch leaves them alone",
        {"torch": f"{_TORCH}36530", "keras": _KERAS_SOURCE, "flax": _FLAX},
        (
            Side("statistics are kept", ("torch",), 'empty_batch="keep"'),
            Side("statistics become NaN", ("Keras", "tf_keras", "Flax")),
        ),
        "an empty_batch that was set is left out where only normkit's layers can be told",
    ),
    Divergence(
        "all-masked",
        "Training on a batch of padding only",
        "Keras takes zeros for the batch's statistics, and Flax 0/0; there is nothing to learn from such a batch",
        {"keras": f"{_KERAS}19848", "flax": _FLAX},
        (
            Side("zeros are stored", ("Keras",)),
            Side("NaN is stored", ("Flax",)),
            Side("statistics are kept", (), "always"),
        ),
    ),
    Divergence(
        "mask-eps",
        "What masked sums are divided by",
        "Keras divides by the number of valid elements plus 1e-7, which float32 sees where there is one",
        {"keras": f"{_KERAS_SOURCE}/batch_normalization.py", "flax": _FLAX},
        (
            Side("count + 1e-7", ("Keras",)),
            Side("count", ("Flax",), "mask"),
        ),
    ),
    Divergence(
        "mask-rank-axis",
        "Which masks fit",
        "Keras wants a mask of one dimension less than x, and the channels last; Flax takes what broadcasts to x; "
        "torch has none",
        {"keras": f"{_KERAS}19848", "torch": f"{_TORCH}81985"},
        (
            Side("what broadcasts to x", ("Flax",), "mask"),
            Side("refused", ("Keras", "torch")),
        ),
    ),
    Divergence(
        "nan-propagation",
        "What one NaN does to running statistics",
        "one batch with a NaN makes them NaN for good, which shows in inference only",
        {"torch": f"{_TORCH}88474"},
        (
            Side("NaN for good", ("torch", "Keras", "Flax", "Haiku", "ONNX"), 'nonfinite="propagate"'),
            Side("the batch is left out", (), 'nonfinite="skip"'),
            Side("refused", (), 'nonfinite="raise"'),
        ),
        "a nonfinite that was set is left out where only normkit's layers can be told",
    ),
    Divergence(
        "freeze-semantics",
        "Whether what is frozen still updates its statistics",
        "Keras's trainable=False is inference; torch's requires_grad=False freezes the parameters only",
        {"keras": f"{_KERAS}9522", "keras-7085": f"{_KERAS}7085"},
        (
            Side("statistics stop too", ("Keras",), "train_affine=False, use_batch_stats=False"),
            Side("statistics go on", ("torch", "Flax"), "train_affine=False"),
        ),
        "what is frozen differs: Keras's trainable=False stops the statistics too, torch's requires_grad=False does "
        "not, JAX libraries have no such switch",
    ),
    Divergence(
        "eval-without-stats",
        "Inference without running statistics",
        "torch's track_running_stats=False takes the batch's own statistics in inference too; elsewhere there always "
        "are running ones",
        {"torch": "https://docs.pytorch.org/docs/stable/generated/torch.nn.BatchNorm1d.html"},
        (
            Side("the batch's own", ("torch track_running_stats=False",), "batch_norm_train"),
            Side("running statistics", ("torch", "Keras", "Flax"), "batch_norm"),
        ),
    ),
    Divergence(
        "instance-norm-stats",
        "Whether instance norm has running statistics",
        "only torch's has, on request, and does not count its batches",
        {"torch": "https://docs.pytorch.org/docs/stable/generated/torch.nn.InstanceNorm2d.html"},
        (
            Side("on request", ("torch track_running_stats=True",)),
            Side("none", ("torch", "Keras", "Flax"), "always"),
        ),
    ),
    Divergence(
        "renorm-state",
        "What batch renormalization stores",
        "Keras keeps a moving standard deviation beside the variance; normkit corrects to the running variance",
        {"keras": f"{_KERAS}19063"},
        (
            Side("moving_stddev, renorm_mean, renorm_stddev", ("Keras renorm=True",)),
            Side("none", ("Keras", "torch"), "r_max, d_max"),
        ),
        "batch renorm keeps a moving standard deviation of its own, which no other framework has",
    ),
    Divergence(
        "eqx-default-mode",
        "What a batch is normalized by in training",
        "equinox's default mode normalizes by running statistics in training too; its mode='batch' by the batch's",
        {"equinox": _EQUINOX},
        (
            Side("running statistics", ("Equinox",), "batch_norm"),
            Side("the batch's own", ("Equinox mode='batch'", "torch", "Keras", "Flax"), "batch_norm_train"),
        ),
        "equinox's mode='ema' trains on running statistics; inference is the same",
    ),
    Divergence(
        "recalibration-math",
        "The variance of all batches together",
        "torch's update_bn averages the batches' variances with equal weights: what is between the batches is lost, "
        "and a short one counts fully",
        {"torch": "https://github.com/pytorch/pytorch/pull/30559"},
        (
            Side("the average of variances", ("torch update_bn",), "momentum=None"),
            Side("the variance of all", (), "recalibrate"),
        ),
    ),
    Divergence(
        "sync-stats",
        "How devices share statistics",
        "Flax, haiku and equinox average the devices' statistics with equal weights, whatever each has seen; torch's "
        "SyncBatchNorm weights them by count",
        {"torch": f"{_TORCH}22192", "flax": _FLAX},
        (
            Side("equal weights", ("Flax",)),
            Side("weighted by count", (), "mask"),
        ),
        "a layer that shares statistics among devices becomes one that does not",
    ),
    Divergence(
        "mom-checkpoint",
        "How often a checkpointed layer counts a batch",
        "activation checkpointing runs the forward pass again, and torch's batch norm updates its statistics again",
        {"torch": f"{_TORCH}96136"},
        (
            Side("twice", ("torch checkpoint",)),
            Side("once", ("torch",), "count_once()"),
        ),
    ),
)
