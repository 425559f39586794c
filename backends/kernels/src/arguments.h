// The arrays and sizes of a call from Python, and the kernel that runs on them.
#pragma once
#include "arrays.h"
#include "call.h"

namespace normkit {

enum Argument {
  X, DY, WEIGHT, BIAS, GIVEN_MEAN, GIVEN_VAR, Y, STATS, DWEIGHT, DBIAS, DMEAN, DVAR, ARGUMENTS
};
constexpr const char *kNames[ARGUMENTS] = {"x",   "dy",    "weight",  "bias",  "mean",  "var",
                                           "out", "stats", "dweight", "dbias", "dmean", "dvar"};

// A kernel and what it is to be called with.
struct Sized {
  long kind = -1;
  Args args{};
};

// False with an exception: nothing of Python's may be called while there is one.
bool integers(PyObject *const *values, Py_ssize_t count, int64_t *out);

// Reads kind, outer, groups, channels, inner, eps, offset, center; false as above.
constexpr Py_ssize_t kSizes = 8;
bool sizes(PyObject *const *values, long &kind, Args &a);

// Looks at the sign bits: a NaN with a sign counts as negative, and -0 does not.
bool any_negative(const Array &a);

// Mean and variance of a batch, out of the packed statistics of its channels.
struct Batch {
  Array mean, var;

  bool open(PyObject *of_mean, PyObject *of_var);
  bool check(int type, int64_t count) const;
  void take_out_of(const void *stats) const;
};

// Opens what is read, or what is written; false with a Python exception.
bool open(Array (&arrays)[ARGUMENTS], PyObject *const *values, bool backward, bool written);
bool is_written(int argument, bool backward);

// Runs a kernel; false with a Python exception. `batch`: null, or where a centred layer's mean and variance go.
bool run(Array (&arrays)[ARGUMENTS], const Sized &sized, bool backward, const Batch *batch = nullptr);

}  // namespace normkit
