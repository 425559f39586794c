"""Descriptions of a kernel's call, as TensorFlow's programs have them, written by hand: most make no sense."""

from __future__ import annotations

from normkit.backends.kernels.programs import SLOTS


def described(head="0 0 4 1 6 1 1e-05 0.0 1", **types):
    """A layer norm's forward call of float32 without parameters, but for this."""
    return " ".join([head, *(str({"x": 0, "y": 0, **types}.get(name, -1)) for name in SLOTS)])


MEANINGLESS = {
    "nothing": "",
    "words": "layer norm",
    "too little": described()[:-3],
    "too much": described() + " 0",
    "no such kernel": described("0 3 4 1 6 1 1e-05 0.0 1"),
    "no size": described("0 0 4 1 0 1 1e-05 0.0 1"),
    "a negative size": described("0 0 -4 1 -6 1 1e-05 0.0 1"),
    "sizes past all numbers": described(f"0 0 {2**40} 1 {2**40} 1 1e-05 0.0 1"),
    "a size past all numbers": described(f"0 0 {2**70} 1 6 1 1e-05 0.0 1"),
    "channels in groups": described("0 1 4 2 6 1 1e-05 0.0 1"),
    "no such dtype": described(weight=4),
    "a size that there is none of": described("other 0 0 4 1 6 1 1e-05 0.0 1"),
    "no x": described(x=-1, y=-1, weight=0),
    "no y": described(y=-1),
    "y of another dtype": described(y=1),
    "backward, and no dy": described("1 0 4 1 6 1 1e-05 0.0 1", rstd=0),
    "forward, and dy": described(dy=0, rstd=0),
    "backward, and no statistics": described("1 0 4 1 6 1 1e-05 0.0 1", dy=0),
    "statistics in half precision": described(x=2, y=2, rstd=2),
    "statistics one by one": described(mean=0, residue=0, var=0, rstd=0),
    "a mean, and no variance": described("0 1 4 1 6 1 1e-05 0.0 1", given_mean=0),
    "a given mean of rows": described(given_mean=0, given_var=0),
    "statistics of given ones": described("0 1 4 1 6 1 1e-05 0.0 1", given_mean=0, given_var=0, rstd=0),
    "a gradient in a forward call": described(weight=0, dweight=0),
    "the gradient of a mean that is not given": described("1 0 4 1 6 1 1e-05 0.0 1", dy=0, rstd=0, dmean=0),
    "a gradient of another dtype": described("1 0 4 1 6 1 1e-05 0.0 1", dy=0, rstd=0, weight=0, dweight=1),
}
