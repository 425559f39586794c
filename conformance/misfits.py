"""Arrays that fit together and some that do not, and how a refusal must read."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest

from normkit._dispatch import backend_of
from normkit.backends import NAMES

#: What messages say of arrays, as patterns.
SUPPORTED = re.escape(f"an array of a supported library ({', '.join(NAMES)}, or any with __array_namespace__)")
FLOATING = re.escape("of a real floating-point dtype (bfloat16, float16, float32, float64)")


def refused(call: Callable, error: type[Exception], text: str) -> None:
    """``call`` raises exactly this kind of error, with one sentence that is the pattern from end to end."""
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert caught.type is error
    assert re.fullmatch(text, message), message
    assert message.endswith(".") and ". " not in message and "\n" not in message


def arrays(library) -> SimpleNamespace:
    """x of four channels along axis 1, what goes with it, and what does not."""
    rng = np.random.default_rng(0)

    def floats(*shape):
        return library.array(rng.random(shape), "float32")

    one = floats(1)
    scalar = backend_of("one", one).namespace(one).reshape(one, ())  # an adapter gives it an axis
    return SimpleNamespace(
        x=floats(2, 4, 3), weight=floats(4), bias=floats(4), mean=floats(4), var=floats(4),
        matrix=floats(2, 4), square=floats(3, 3), row=floats(3), lone=floats(1, 4, 1), scalar=scalar,
        no_channel=floats(2, 0, 3), no_column=floats(2, 4, 0), short=floats(3), turned=floats(3, 4),
        negative=library.array(np.array([1.0, 2.0, -0.5, 1.0]), "float32"),
        ints=library.array(np.ones((2, 4, 3)), "int32"), int_weight=library.array(np.ones(4), "int32"),
        lengths=library.array(np.array([4, 1]), "int32"),
        flags=library.array(np.ones((2, 4, 3), bool), "bool"),
        wide_flags=library.array(np.ones((2, 4, 2), bool), "bool"),
    )  # fmt: skip


def elsewhere(library):
    """Four ones on another device of the library, where it has one without hardware."""
    xp = library.xp
    device = {"torch": lambda: "meta", "strict": lambda: xp.Device("device1")}.get(library.name)
    if device is None:
        pytest.skip(f"{library.name} has one device here")
    return xp.ones(4, device=device())
