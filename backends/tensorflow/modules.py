"""A kernel's call in XLA on a batch of unknown length, as a StableHLO module: XLA learns the length as it compiles."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import tensorflow as tf

from normkit.backends.kernels.programs import TARGET
from normkit.backends.protocol import Array

#: A shape whose unknown length is that of the batch, and a dtype.
Layout = tuple[Sequence[int | None], Any]

#: What TensorFlow is told of the module: of this version it is asked whether there are unknown lengths.
VERSION = 9
_LENGTH = "tensor<1xi64>"
_TYPES = {tf.float64: "f64", tf.float32: "f32", tf.float16: "f16", tf.bfloat16: "bf16"}


def call(
    operation: Callable, text: str, operands: Sequence[Array], given: Sequence[Layout], results: Sequence[Layout]
) -> list[Array]:
    """The results of the kernel that ``text`` describes, for whose handler the batch's length is the first operand.

    ``operation`` is TensorFlow's; x is the first of the operands, and the batch its first axis.
    """
    return operation(
        args=list(operands),
        version=VERSION,
        module=_module(text, given, results),
        Tout=[dtype for _, dtype in results],
        Sout=[list(shape) for shape, _ in results],
        platforms=["CPU"],
    )


def _module(text: str, operands: Sequence[Layout], results: Sequence[Layout]) -> str:
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
    taken, made = _joined(["%n", *arrays, *shapes]), _joined(found)
    takes = _joined([_LENGTH, *kinds, *of_shapes])
    lines = [
        f"%d = stablehlo.get_dimension_size %a0, dim = 0 : ({kinds[0]}) -> tensor<i32>",
        "%l = stablehlo.convert %d : (tensor<i32>) -> tensor<i64>",
        f"%n = stablehlo.reshape %l : (tensor<i64>) -> {_LENGTH}",
    ]
    for name, (shape, _) in zip(shapes, results, strict=True):
        lines += _shape(name, shape)
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


def _kind(shape: Sequence[int | None], dtype: Any) -> str:
    return f"tensor<{'x'.join(['?' if n is None else str(n) for n in shape] + [_TYPES[dtype]])}>"


def _shape(name: str, shape: Sequence[int | None]) -> list[str]:
    """Lines after which ``name`` is the shape, of ``%n`` where it is unknown."""
    lengths = ["%n" if n is None else f"{name}_{a}" for a, n in enumerate(shape)]
    kinds = _joined([_LENGTH] * len(lengths))
    lines = []
    for length, n in zip(lengths, shape, strict=True):
        if n is not None:
            lines.append(f"{length} = stablehlo.constant dense<{n}> : {_LENGTH}")
    whole = f"({kinds}) -> tensor<{len(lengths)}xi64>"
    return [*lines, f"{name} = stablehlo.concatenate {_joined(lengths)}, dim = 0 : {whole}"]
