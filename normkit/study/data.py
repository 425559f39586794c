"""The data of the study: scikit-learn's bundled sets, which are real and need no network."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np


class Split(NamedTuple):
    """Images or rows in float64, one-hot targets, and the labels; for training and for testing."""

    x: np.ndarray
    t: np.ndarray
    x_test: np.ndarray
    labels_test: np.ndarray


@functools.cache
def digits() -> Split:
    """8 x 8 images of digits, 1347 and 450, with mean 0 and spread 1 over all pixels: (samples, 64)."""
    from sklearn.datasets import load_digits

    x, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    x, labels = x[order], labels[order]
    mean, std = x[:1347].mean(), x[:1347].std()
    x = (x - mean) / std
    return Split(x[:1347], np.eye(10)[labels[:1347]], x[1347:], labels[1347:])


@functools.cache
def components(k: int = 10) -> np.ndarray:
    """The first k principal components of the digits, whitened: (1347, k)."""
    x = digits().x
    u, s, _ = np.linalg.svd(x - x.mean(0), full_matrices=False)
    return u[:, :k] * np.sqrt(len(x)) * (s[:k] / s[0])


@functools.cache
def table(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows as they are, and a target with mean 0 and spread 1: "wine", "breast_cancer" or "diabetes"."""
    from sklearn import datasets

    options = {"scaled": False} if name == "diabetes" else {}
    x, y = getattr(datasets, f"load_{name}")(return_X_y=True, **options)
    y = np.asarray(y, np.float64)
    return np.asarray(x, np.float64), (y - y.mean()) / y.std()
