// The part of DLPack that is used here: capsules of tensors, and of the C exchange API (major version 1) a borrowed view of
// a tensor that Python holds.
#pragma once
#include <cstdint>

namespace normkit::dlpack {

struct Tensor {
  void *data;
  struct {
    int32_t type, id;
  } device;
  int32_t ndim;
  struct {
    uint8_t code, bits;
    uint16_t lanes;
  } dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct Managed {
  Tensor tensor;
  void *context;
  void (*deleter)(Managed *);
};
constexpr const char *kName = "dltensor";  // of a capsule that nobody has taken yet
constexpr int32_t kCpu = 1;
constexpr uint8_t kFloat = 2, kBfloat = 4;

struct Exchange {
  struct {
    uint32_t major, minor;
  } version;
  Exchange *previous;
  void *allocate, *managed_from_object, *object_from_managed;
  int (*tensor_from_object)(void *object, Tensor *out);
  void *current_stream;
};

}  // namespace normkit::dlpack
