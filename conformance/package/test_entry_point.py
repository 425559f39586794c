"""Another distribution adds a backend through the entry-point group ``normkit.backends``."""

import json

import pytest

from normkit.conformance.package import fresh

TOY = '''
import numpy as np

from normkit.backends import ArrayBackend, Entry


class ToyArray:
    """A NumPy array that nothing else computes with."""

    def __init__(self, value):
        self.value = value


class ToyBackend(ArrayBackend):
    name = "toy"

    def __init__(self):
        super().__init__(np)

    def shape(self, x):
        return x.value.shape

    def dtype(self, x):
        return str(x.value.dtype)

    def apply(self, plan, operands):
        y, stats = super().apply(plan, operands._replace(x=operands.x.value))
        return ToyArray(y), stats


ENTRY = Entry("toy", "toy_arrays", ("ToyArray",), "toy_arrays:ToyBackend")
DUPLICATE = Entry("numpy", "toy_arrays", ("ToyArray",), "toy_arrays:ToyBackend")
BACKEND = ToyBackend()
'''

USE = """
import json, sys
import numpy as np, toy_arrays, normkit
from normkit import backends
known = [entry.name for entry in backends.entries()]
y = normkit.layer_norm(toy_arrays.ToyArray(np.asarray([[1.0, 3.0]])), eps=0.0)
print(json.dumps([known, type(y).__name__, y.value.tolist(), type(backends.get("toy")).__name__]))
"""

REFUSED = """
import numpy as np, toy_arrays, normkit
try:
    normkit.layer_norm(toy_arrays.ToyArray(np.ones((1, 2))))
except Exception as error:
    print(type(error).__name__, error)
"""


def install(site, value):
    """An installed distribution, as far as importlib.metadata can tell, whose entry point resolves to ``value``."""
    (site / "toy_arrays.py").write_text(TOY)
    about = site / "toy_arrays-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-arrays\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[normkit.backends]\ntoy = toy_arrays:{value}\n")
    return site


def test_backend_of_another_distribution_serves_its_arrays(tmp_path):
    known, kind, y, backend = json.loads(fresh.run(USE, tmp_path, path=install(tmp_path, "ENTRY")))
    assert known[-1] == "toy"
    assert (kind, backend) == ("ToyArray", "ToyBackend")
    assert y == [[-1.0, 1.0]]  # (1, 3) less its mean 2, over its spread 1


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("BACKEND", "TypeError Entry point 'toy' of group 'normkit.backends' must be an Entry; received <toy_arrays."),
        ("DUPLICATE", "ValueError Entry point 'toy_arrays:DUPLICATE' redefines the backend 'numpy'."),
    ],
)
def test_unusable_entry_points_are_named(value, message, tmp_path):
    assert fresh.run(REFUSED, tmp_path, path=install(tmp_path, value)).startswith(message)


def test_arrays_of_nobody_are_refused(tmp_path):
    site = install(tmp_path, "ENTRY")
    (site / "toy_arrays-1.0.dist-info" / "entry_points.txt").write_text("")
    assert fresh.run(REFUSED, tmp_path, path=site).startswith("TypeError x must be an array of a supported library")
