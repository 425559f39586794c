"""Divergences of numbers: eps, how statistics are computed, dtypes."""

from __future__ import annotations

from normkit.conformance.divergences.record import Divergence, Side

_TORCH = "https://github.com/pytorch/pytorch/issues/"
_KERAS_SOURCE = "https://github.com/keras-team/keras/tree/master/keras/src/layers/normalization"
_FLAX = "https://github.com/google/flax/blob/main/flax/nnx/nn/normalization.py"
_TF_KERNEL = "https://github.com/tensorflow/tensorflow/blob/master/tensorflow/core/kernels/fused_batch_norm_op.cc"
_HAIKU = "https://github.com/google-deepmind/dm-haiku/blob/main/haiku/_src/batch_norm.py"
_CHAN = "https://doi.org/10.1080/00031305.1983.10483115"
_ONNX = "https://onnx.ai/onnx/operators/onnx__"
_TRANSFORMERS = "https://github.com/huggingface/transformers/"

NUMBERS = (
    Divergence(
        "eps-default",
        "The eps that nobody wrote down",
        "defaults differ between frameworks, and between the layers of one",
        {"keras": "https://github.com/keras-team/keras-hub/issues/728"},
        (
            Side("1e-3", ("Keras",), "eps=1e-3"),
            Side("1e-5", ("torch", "ONNX", "Haiku", "Equinox"), "eps=1e-5"),
            Side("1e-6", ("Flax",), "eps=1e-6"),
        ),
        "eps is always written: defaults differ between frameworks and layers",
    ),
    Divergence(
        "eps-none",
        "What an eps of None means",
        "torch's RMSNorm takes the dtype's own eps; for float16 and bfloat16 that of float32",
        {"torch": "https://docs.pytorch.org/docs/stable/generated/torch.nn.RMSNorm.html"},
        (
            Side("2⁻²³, of float32", ("torch float32", "torch bfloat16"), "eps=2**-23"),
            Side("2⁻⁵², of float64", ("torch float64",), "eps=2**-52"),
        ),
        "an eps of None is the one of float32 (of float64 for float64 parameters)",
    ),
    Divergence(
        "eps-place",
        "Where eps stands in L2 normalization",
        "TensorFlow bounds the square of the norm by its eps of 1e-12, torch and Keras the norm, ONNX nothing",
        {"tf.nn": "https://www.tensorflow.org/api_docs/python/tf/math/l2_normalize"},
        (
            Side("floor of the square", ("tf.nn",), "normalize(eps=1e-6)"),
            Side("floor of the norm", ("torch", "Keras", "ONNX"), "normalize(eps=1e-12)"),
        ),
    ),
    Divergence(
        "eps-floor",
        "An eps that was raised",
        "TensorFlow's fused batch norm once raised eps to 1.001e-5, which keras.applications still carry",
        {"tf.nn": "https://www.tensorflow.org/api_docs/python/tf/compat/v1/nn/fused_batch_norm"},
        (
            Side("raised to 1.001e-5", ("TensorFlow 1",)),
            Side("as it is written", ("tf.nn",), "eps"),
        ),
        unseen="on the processor, the TensorFlow that is current takes eps as it is written",
    ),
    Divergence(
        "var-fast",
        "Variance as E[x²] - E[x]²",
        "the variance is E[x**2] - E[x]**2, which loses every digit where the mean is large against the spread",
        {"flax": _FLAX, "keras": "https://github.com/keras-team/keras/pull/18795", "haiku": _HAIKU},
        (
            Side(
                "E[x²] - E[x]²",
                ("Flax", "Linen", "jax.nn.standardize", "Haiku BatchNorm", "Keras BatchNormalization on torch"),
            ),
            Side("centred first", ("torch", "Keras", "Haiku", "Equinox", "ONNX"), "always"),
        ),
    ),
    Divergence(
        "affine-folded",
        "y as x·a + b",
        "the affine is folded to x * a + b, which cancels where |x| is large against its spread",
        {"torch": f"{_TORCH}5410", "keras": _KERAS_SOURCE, "tf.nn": _TF_KERNEL},
        (
            Side("x·a + b", ("torch", "tf.nn", "Keras on jax", "Keras on tensorflow")),
            Side("(x - mean)·a + b", ("Flax", "Equinox"), "always"),
        ),
    ),
    Divergence(
        "const-mean-rounding",
        "A mean that was rounded",
        "the mean is rounded to float32 before it is taken off, and what the rounding took is not put back",
        {
            "torch": f"{_TORCH}51102",
            "keras": "https://github.com/keras-team/keras/pull/18795",
            "textbook": _CHAN,
        },
        (
            Side("rounded", ("torch", "Keras", "Flax")),
            Side("rounded, and the rest taken off", (), "always"),
        ),
    ),
    Divergence(
        "square-overflow",
        "Squares that leave the range",
        "x**2 overflows float32 above 1.8e19, or its sum does, so that y is zero, infinite or NaN",
        {
            "torch": f"{_TORCH}162489",
            "keras": _KERAS_SOURCE,
            "flax": _FLAX,
            "tf.nn": "https://github.com/tensorflow/tensorflow/pull/25115",
            "textbook": _CHAN,
        },
        (
            Side("zeros", ("torch", "Keras", "Flax", "ONNX")),
            Side("x / rms(x)", (), "always"),
        ),
    ),
    Divergence(
        "layout-dependence",
        "The same numbers, laid out otherwise",
        "channels last takes another kernel, in which the variance is E[x**2] - E[x]**2, which loses every digit where "
        "the mean is large against the spread",
        {"torch": "https://github.com/pytorch/pytorch/blob/main/aten/src/ATen/native/cpu/group_norm_kernel.cpp"},
        (
            Side("wrong", ("torch channels_last",)),
            Side("right", ("torch contiguous",), "always"),
        ),
    ),
    Divergence(
        "accum-dtype",
        "The dtype that sums are taken in",
        "haiku's batch norm reduces in the dtype of x: squares of float16 leave its range at 256",
        {"haiku": _HAIKU, "mlx": "https://github.com/ml-explore/mlx/issues/4228"},
        (
            Side("that of x", ("Haiku",)),
            Side("float32 at least", ("torch", "Keras", "Flax"), "always"),
        ),
    ),
    Divergence(
        "out-dtype",
        "The dtype of y for float16 x and float32 parameters",
        "y is float32 by promotion in Flax, unless the layer is given a dtype",
        {"flax": _FLAX},
        (
            Side("that of x", ("torch", "Keras"), "always"),
            Side("float32", ("Flax", "Linen")),
        ),
    ),
    Divergence(
        "cast-point",
        "Whether RMS norm rounds before or after the weight",
        "in float16 and bfloat16, y is rounded before the weight is applied, and after it once more; or only after",
        {"transformers": f"{_TRANSFORMERS}issues/30236", "onnx": f"{_ONNX}RMSNormalization.html"},
        (
            Side("before and after", ("transformers Llama",), 'cast="input"'),
            Side("after", ("torch", "Keras", "Flax", "onnxruntime"), 'cast="output"'),
        ),
        "for float16 and bfloat16 x, the weight is applied on the other side of the rounding",
    ),
    Divergence(
        "weight-offset",
        "A weight that is a deviation from one",
        "Gemma and others scale by 1 + w, with w zero at first",
        {"transformers": f"{_TRANSFORMERS}blob/main/src/transformers/models/gemma/modeling_gemma.py"},
        (
            Side("1 + w", ("transformers Gemma",), "weight_offset=1.0"),
            Side("w", ("torch", "Keras", "Flax", "ONNX"), "weight_offset=0.0"),
        ),
        "a scale of 1 + w becomes w + 1, added once",
    ),
    Divergence(
        "rms-scaling-legacy",
        "A LayerNorm that calls itself RMS",
        "Keras's LayerNormalization(rms_scaling=True) divides by the root of the variance, without the mean",
        {"keras": f"{_KERAS_SOURCE}/layer_normalization.py"},
        (
            Side("x / sqrt(var)", ("Keras rms_scaling=True",)),
            Side("x / rms(x)", ("Keras RMSNormalization", "torch", "Flax", "ONNX"), "rms_norm"),
        ),
    ),
    Divergence(
        "mvn-eps",
        "MeanVarianceNormalization on a constant",
        "the formula of ONNX has no eps, its function body 1e-9 and E[x²] - E[x]², and onnxruntime gives NaN",
        {"onnx": f"{_ONNX}MeanVarianceNormalization.html"},
        (
            Side("NaN", ("onnxruntime",)),
            Side("0", ("ONNX",), "instance_norm"),
        ),
    ),
    Divergence(
        "lrn-alpha",
        "What alpha of local response normalization is divided by",
        "torch and ONNX divide alpha by the window's size, TensorFlow does not and says the window's radius",
        {"tf.nn": "https://www.tensorflow.org/api_docs/python/tf/nn/local_response_normalization"},
        (
            Side("the size", ("torch", "onnxruntime")),
            Side("nothing", ("tf.nn",)),
        ),
    ),
    Divergence(
        "apex-eps",
        "A function and a class with two defaults",
        "apex's fused_layer_norm has eps=1e-6, its FusedLayerNorm 1e-5",
        {"apex": "https://github.com/NVIDIA/apex/blob/master/apex/normalization/fused_layer_norm.py"},
        (
            Side("1e-6", ("apex function",), "eps=1e-6"),
            Side("1e-5", ("apex class",), "eps=1e-5"),
        ),
        unseen="apex is built for a GPU",
    ),
)
