// Calls whose sizes are known, as Python functions: what is left of them where x is small.
#pragma once
#include "arrays.h"

namespace normkit {

// bind(types, negated, like, packed, channel, shape, *sizes): sizes twice where there is a kernel for axis 1 last in memory too.
PyObject *bind(PyObject *, PyObject *const *values, Py_ssize_t count);

// apply(bound, x, weight, bias, mean, var, save): y, the packed statistics or None, and mean and variance of a batch or None;
// made only where x and the rest are plain arrays of those types in a known order, parameters have that shape, and no variance
// is negative: else None.
PyObject *apply(PyObject *, PyObject *const *values, Py_ssize_t count);

// pull_back(bound, x, dy, weight, bias, mean, var, stats, needs): the gradients of x, weight, bias, mean and var, as apply; None
// for each that is not needed.
PyObject *pull_back(PyObject *, PyObject *const *values, Py_ssize_t count);

}  // namespace normkit
