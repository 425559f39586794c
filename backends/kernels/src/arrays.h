// Arrays of Python as plain memory: the buffer protocol, and PyTorch through the DLPack C exchange API.
#pragma once
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "dlpack.h"
#include "kernels.h"

namespace normkit {

// One argument's memory for the duration of a call. Nothing is copied or converted: what does not fit raises.
class Array {
 public:
  Array() = default;
  Array(const Array &) = delete;
  ~Array();
  // False with a Python exception. None leaves the array empty.
  bool open(PyObject *object, const char *name, bool written);
  bool expect(const char *name, int64_t wanted) const;
  bool overlaps(const Array &other) const;

  void *data = nullptr;
  int type = NONE;
  int64_t count = 0;
  bool row_major = true, channels_last = false;  // channels_last: axis 1 innermost, the others row-major; false where that is the same
  bool as_bits = false;  // bfloat16 that came as integers
  int ndim = 0;
  const int64_t *shape = nullptr;  // as long as the object lives, and this

  int64_t bytes() const { return count * size_of(type); }

 private:
  bool open_dlpack(PyObject *object, const char *name, const void *api);
  bool open_tensor(const dlpack::Tensor &tensor, const char *name);
  bool open_buffer(PyObject *object, const char *name, bool written);
  bool hold_open_ = false;
  Py_buffer hold_;
};

// A DLPack capsule of uninitialized memory in row-major order; null with a Python exception. In memory.cpp.
PyObject *fresh_capsule(int type, int ndim, const int64_t *shape);

}  // namespace normkit
