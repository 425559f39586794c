// See arrays.h.
#include "arrays.h"

#include <cstring>

#include "dlpack.h"
#include "order.h"

namespace normkit {
namespace {

// Whether the elements fill one block of memory, in whatever order of axes.
template <class N> bool dense(int ndim, const N *shape, const N *strides, int64_t unit) {
  if (!strides) return true;
  int64_t expected = unit;
  uint64_t used = 0;
  if (ndim > 64) return false;
  for (int left = 0; left < ndim; ++left) {
    int next = -1;
    for (int d = 0; d < ndim; ++d) {
      if (used >> d & 1) continue;
      if (shape[d] == 1 || strides[d] == expected) {
        next = d;
        if (shape[d] == 1) break;
      }
    }
    if (next < 0) return false;
    used |= uint64_t(1) << next;
    if (shape[next] != 1) expected *= shape[next];
  }
  return true;
}

struct Known {
  PyObject *type = nullptr;
  const dlpack::Exchange *api = nullptr;
};

// The exchange API of a type, looked up once for each of the few types that there are. Guarded by the GIL.
const dlpack::Exchange *exchange_of(PyObject *object) {
  static Known known[8];
  static int count = 0;
  PyObject *type = reinterpret_cast<PyObject *>(Py_TYPE(object));
  for (int i = 0; i < count; ++i)
    if (known[i].type == type) return known[i].api;
  const dlpack::Exchange *api = nullptr;
  if (PyObject *capsule = PyObject_GetAttrString(type, "__dlpack_c_exchange_api__")) {
    api = static_cast<const dlpack::Exchange *>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
    Py_DECREF(capsule);
    while (api && api->version.major > 1) api = api->previous;
  }
  PyErr_Clear();
  if (count < 8) {
    Py_INCREF(type);
    known[count++] = {type, api};
  }
  return api;
}

int type_of_format(const char *format) {
  if (!format) return NONE;
  if (*format == '@' || *format == '=' || *format == '<') ++format;  // every target is little-endian
  if (*format == '^') ++format;
  if (!*format || format[1]) return NONE;
  switch (*format) {
    case 'f': return F32;
    case 'd': return F64;
    case 'e': return F16;
    case 'H': return BF16;  // NumPy has no bfloat16 in the buffer protocol: it comes as its bits
    default: return NONE;
  }
}

}  // namespace

Array::~Array() {
  if (hold_open_) PyBuffer_Release(&hold_);
}

bool Array::open(PyObject *object, const char *name, bool written) {
  if (object == Py_None) return true;
  if (const dlpack::Exchange *api = exchange_of(object)) return open_dlpack(object, name, api);
  if (PyObject_CheckBuffer(object)) return open_buffer(object, name, written);
  if (PyCapsule_IsValid(object, dlpack::kName))
    return open_tensor(*static_cast<dlpack::Tensor *>(PyCapsule_GetPointer(object, dlpack::kName)), name);
  PyErr_Format(PyExc_TypeError, "%s must have the buffer protocol or DLPack's C exchange API, or be a DLPack capsule; received %R.",
               name, Py_TYPE(object));
  return false;
}

bool Array::open_dlpack(PyObject *object, const char *name, const void *api) {
  dlpack::Tensor tensor;
  return static_cast<const dlpack::Exchange *>(api)->tensor_from_object(object, &tensor) == 0 && open_tensor(tensor, name);
}

bool Array::open_tensor(const dlpack::Tensor &tensor, const char *name) {
  if (tensor.device.type != dlpack::kCpu) {
    PyErr_Format(PyExc_ValueError, "%s must be in host memory; received DLPack device type %d.", name, int(tensor.device.type));
    return false;
  }
  const auto [code, bits, lanes] = tensor.dtype;
  if (lanes == 1 && code == dlpack::kFloat) type = bits == 32 ? F32 : bits == 64 ? F64 : bits == 16 ? F16 : NONE;
  if (lanes == 1 && code == dlpack::kBfloat && bits == 16) type = BF16;
  if (type == NONE) {
    PyErr_Format(PyExc_TypeError, "%s must be float16, bfloat16, float32 or float64; received DLPack code %d with %d bits.", name,
                 int(code), int(bits));
    return false;
  }
  if (!dense(tensor.ndim, tensor.shape, tensor.strides, 1)) {
    PyErr_Format(PyExc_ValueError, "%s must fill one block of memory; received a tensor with gaps or repeats.", name);
    return false;
  }
  ndim = tensor.ndim, shape = tensor.shape;
  row_major = in_order(tensor.ndim, tensor.shape, tensor.strides, 1, false);
  channels_last = !row_major && in_order(tensor.ndim, tensor.shape, tensor.strides, 1, true);
  count = 1;
  for (int d = 0; d < tensor.ndim; ++d) count *= tensor.shape[d];
  if (!tensor.data && count) return PyErr_Format(PyExc_ValueError, "%s has no memory.", name), false;
  data = static_cast<char *>(tensor.data) + tensor.byte_offset;
  return true;
}

bool Array::open_buffer(PyObject *object, const char *name, bool written) {
  if (PyObject_GetBuffer(object, &hold_, PyBUF_STRIDES | PyBUF_FORMAT | (written ? PyBUF_WRITABLE : 0)) != 0) return false;
  hold_open_ = true;
  type = type_of_format(hold_.format);
  if (type == NONE) {
    PyErr_Format(PyExc_TypeError, "%s must be float16, float32 or float64 (or bfloat16 as uint16); received format '%s'.", name,
                 hold_.format ? hold_.format : "B");
    return false;
  }
  if (!dense(hold_.ndim, hold_.shape, hold_.strides, hold_.itemsize)) {
    PyErr_Format(PyExc_ValueError, "%s must fill one block of memory; received an array with gaps or repeats.", name);
    return false;
  }
  static_assert(sizeof(Py_ssize_t) == sizeof(int64_t));
  ndim = hold_.ndim, shape = reinterpret_cast<const int64_t *>(hold_.shape), as_bits = type == BF16;
  row_major = in_order(hold_.ndim, hold_.shape, hold_.strides, hold_.itemsize, false);
  channels_last = !row_major && in_order(hold_.ndim, hold_.shape, hold_.strides, hold_.itemsize, true);
  count = hold_.len / hold_.itemsize;
  data = hold_.buf;
  return true;
}

bool Array::expect(const char *name, int64_t wanted) const {
  if (!data || count == wanted) return true;
  PyErr_Format(PyExc_ValueError, "%s must have %lld elements; received %lld.", name, (long long)wanted, (long long)count);
  return false;
}

bool Array::overlaps(const Array &other) const {
  if (!data || !other.data) return false;
  const char *a = static_cast<const char *>(data), *b = static_cast<const char *>(other.data);
  return a < b + other.bytes() && b < a + bytes();
}

}  // namespace normkit
