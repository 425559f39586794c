"""The rules of conversion, by id: what differs between frameworks and what is done about it."""

from __future__ import annotations

from dataclasses import dataclass

RULES = {
    "affine-pair": "a framework that has weight and bias together or not at all gets the missing one: ones or zeros",
    "axis-layout": "the channel axis is the one that was asked for: move the axes of x accordingly",
    "axis-param-shape": "parameters are reshaped by the rule of the framework, never by their size",
    "cast-point": "for float16 and bfloat16 x, the weight is applied on the other side of the rounding",
    "config-legacy": "arguments of an older version are read as what they mean",
    "debias": "a zero-debiased average is read as the average; it is written with a counter that debiases no more",
    "eps-default": "eps is always written: defaults differ between frameworks and layers",
    "eps-none": "an eps of None is the one of float32 (of float64 for float64 parameters)",
    "eqx-default-mode": "equinox's mode='ema' trains on running statistics; inference is the same",
    "freeze-semantics": "what is frozen differs: Keras's trainable=False stops the statistics too, torch's "
    "requires_grad=False does not, JAX libraries have no such switch",
    "gn-instance": "frameworks without instance norm have it as group norm with one channel per group",
    "gn-order": "numbers of groups and of channels are passed by keyword",
    "momentum-none": "a momentum of None has its own meaning: an average of all batches, or statistics that never move",
    "momentum-sense": "momentum is the weight of the old statistics, in torch of the new ones: m becomes 1 - m",
    "onnx-gn-body": "group norm is written as Reshape and InstanceNormalization: the function body of "
    "GroupNormalization-21 takes its variance as E[x²] - E[x]²",
    "onnx-gn18": "GroupNormalization-18 has a scale per group: it is repeated over the group's channels",
    "renorm-state": "batch renorm keeps a moving standard deviation of its own, which no other framework has",
    "runvar-bias": "the stored variance is kept as it is; from the next update on, the framework divides by another "
    "number (n or n - 1)",
    "runvar-bias-rank": "tf_keras divides by n - 1 where it is fused (x of rank 4 or 5), by n elsewhere",
    "state-names": "arrays are taken by name; what one side does not store is named",
    "subclass": "a subclass with a forward of its own is read as the norm layer that it holds",
    "sync-stats": "a layer that shares statistics among devices becomes one that does not",
    "weight-offset": "a scale of 1 + w becomes w + 1, added once",
}


@dataclass(frozen=True)
class Applied:
    """A rule that applied to a layer, and how."""

    layer: str
    rule: str
    text: str

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise KeyError(self.rule)
