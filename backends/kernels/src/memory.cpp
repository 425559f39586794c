// Fresh memory as a DLPack capsule, for libraries that take their arrays that way. It is freed with the library's array.
#include <cstdlib>

#include "arrays.h"

namespace normkit {
namespace {

constexpr int64_t kAlignment = 64;          // what TensorFlow asks for; it copies what is less

struct Fresh {
  dlpack::Managed managed;
  void *data;
  int64_t shape[1];  // as many as there are axes
};

void free_fresh(dlpack::Managed *managed) {
  Fresh *fresh = static_cast<Fresh *>(managed->context);
  free(fresh->data);
  free(fresh);
}

// The capsule's own end: who takes the memory renames the capsule.
void free_unused(PyObject *capsule) {
  if (!PyCapsule_IsValid(capsule, dlpack::kName)) return;
  auto *managed = static_cast<dlpack::Managed *>(PyCapsule_GetPointer(capsule, dlpack::kName));
  managed->deleter(managed);
}

}  // namespace

PyObject *fresh_capsule(int type, int ndim, const int64_t *shape) {
  int64_t bytes = size_of(type);
  for (int d = 0; d < ndim; ++d)
    if (shape[d] < 0 || __builtin_mul_overflow(bytes, shape[d], &bytes))
      return PyErr_SetString(PyExc_ValueError, "The shape is negative or overflows."), nullptr;
  Fresh *fresh = static_cast<Fresh *>(malloc(sizeof(Fresh) + sizeof(int64_t) * ndim));
  void *data = nullptr;
  if (!fresh || posix_memalign(&data, kAlignment, bytes ? bytes : kAlignment) != 0) {
    free(fresh);
    return PyErr_NoMemory();
  }
  fresh->data = data;
  for (int d = 0; d < ndim; ++d) fresh->shape[d] = shape[d];
  const uint8_t code = type == BF16 ? dlpack::kBfloat : dlpack::kFloat;
  fresh->managed = {{data, {dlpack::kCpu, 0}, ndim, {code, uint8_t(8 * size_of(type)), 1}, fresh->shape, nullptr, 0}, fresh, free_fresh};
  PyObject *capsule = PyCapsule_New(&fresh->managed, dlpack::kName, free_unused);
  if (!capsule) free_fresh(&fresh->managed);
  return capsule;
}

}  // namespace normkit
