"""A kernel's call in XLA where lengths are unknown, as a StableHLO module: XLA learns them as it compiles."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import tensorflow as tf

from normkit.backends.kernels.programs import STATS, TARGET
from normkit.backends.protocol import Array
from normkit.core.plan import Plan

#: A shape and a dtype.
Layout = tuple[Sequence[int | None], Any]
#: A length that is known, or what has it in the module; and a layout of those.
Length = int | str
Named = tuple[Sequence[Length], Any]

#: What TensorFlow is told of the module: of this version it asks whether there are unknown lengths.
VERSION = 9
_LENGTH = "tensor<1xi64>"
_TYPES = {tf.float64: "f64", tf.float32: "f32", tf.float16: "f16", tf.bfloat16: "bf16"}


def shapes(plan: Plan, names: Sequence[Any], layouts: Mapping[str, Layout]) -> list[Sequence[Any]]:
    """The layouts' shapes, with the names of x's axes in the place of lengths that the plan does not know."""
    lengths = [names[a] if n is None else n for a, n in enumerate(plan.shape)]
    unknown = iter([names[a] for a, n in enumerate(plan.shape) if n is None])
    view = [next(unknown) if n is None else n for n in plan.view]
    stats = [1 if a in plan.axes else n for a, n in enumerate(view)]

    def named(slot: str, shape: Sequence[Any]) -> Sequence[Any]:
        if slot in ("x", "dy", "y"):
            return lengths
        return [shape[0], *stats] if slot == STATS else shape

    return [named(slot, shape) for slot, (shape, _) in layouts.items()]


def call(
    operation: Callable, plan: Plan, text: str, given: Mapping[str, Array], results: Mapping[str, Layout]
) -> list[Array]:
    """The results of the kernel that ``text`` describes, whose handler is told the product of the unknown lengths.

    ``operation`` is TensorFlow's; ``results`` have ones for unknown lengths. x comes first of what is given.
    """
    names = [f"%n{a}" for a in range(len(plan.shape))]
    operands = {slot: (a.shape if slot == STATS else plan.param_shape, a.dtype) for slot, a in given.items()}
    takes, makes = (
        list(zip(shapes(plan, names, layouts), (dtype for _, dtype in layouts.values()), strict=True))
        for layouts in (operands, results)
    )
    return operation(
        args=list(given.values()),
        version=VERSION,
        module=_module(text, takes, makes),
        Tout=[dtype for _, dtype in makes],
        Sout=[[None if isinstance(n, str) else n for n in shape] for shape, _ in makes],
        platforms=["CPU"],
    )


def _module(text: str, operands: Sequence[Named], results: Sequence[Named]) -> str:
    """Shapes of results are operands too: from those, once they are numbers, XLA has the results' own."""
    kinds, found = ([_kind(*layout) for layout in layouts] for layouts in (operands, results))
    arrays = [f"%a{k}" for k in range(len(operands))]
    shapes = [f"%s{k}" for k in range(len(results))]
    of_shapes = [f"tensor<{len(shape)}xi64>" for shape, _ in results]
    places = [1 + len(arrays) + k for k in range(len(shapes))]
    attributes = (
        f'api_version = 3 : i32, backend_config = "{text}", '
        f"indices_of_shape_operands = dense<{places}> : tensor<{len(places)}xi64>"
    )
    lines, product = [], ""
    for axis, n in enumerate(operands[0][0]):
        if isinstance(n, str):
            lines += [
                f"%d{axis} = stablehlo.get_dimension_size %a0, dim = {axis} : ({kinds[0]}) -> tensor<i32>",
                f"%l{axis} = stablehlo.convert %d{axis} : (tensor<i32>) -> tensor<i64>",
                f"{n} = stablehlo.reshape %l{axis} : (tensor<i64>) -> {_LENGTH}",
            ]
            if product:
                lines.append(f"%p{axis} = stablehlo.multiply {product}, {n} : {_LENGTH}")
            product = f"%p{axis}" if product else n
    for name, (shape, _) in zip(shapes, results, strict=True):
        lines += _shape(name, shape)
    taken, made = _joined([product, *arrays, *shapes]), _joined(found)
    takes = _joined([_LENGTH, *kinds, *of_shapes])
    lines += [
        f"%r:{len(results)} = stablehlo.custom_call @{TARGET}({taken}) {{{attributes}}} : ({takes}) -> ({made})",
        f"return {_joined(f'%r#{k}' for k in range(len(results)))} : {made}",
    ]
    arguments = _joined(f"{name}: {kind}" for name, kind in zip(arrays, kinds, strict=True))
    body = "\n    ".join(lines)
    return f"""module attributes {{jax.uses_shape_polymorphism = true}} {{
  func.func public @main({arguments}) -> ({made}) {{
    {body}
  }}
}}"""


def _joined(parts: Iterable[str]) -> str:
    return ", ".join(parts)


def _kind(shape: Sequence[Length], dtype: Any) -> str:
    return f"tensor<{'x'.join(['?' if isinstance(n, str) else str(n) for n in shape] + [_TYPES[dtype]])}>"


def _shape(name: str, shape: Sequence[Length]) -> list[str]:
    """Lines after which ``name`` is the shape."""
    parts = [n if isinstance(n, str) else f"{name}_{a}" for a, n in enumerate(shape)]
    lines = []
    for part, n in zip(parts, shape, strict=True):
        if part is not n:
            lines.append(f"{part} = stablehlo.constant dense<{n}> : {_LENGTH}")
    whole = f"({_joined([_LENGTH] * len(parts))}) -> tensor<{len(parts)}xi64>"
    return [*lines, f"{name} = stablehlo.concatenate {_joined(parts)}, dim = 0 : {whole}"]
