// A call of a kernel as backends/kernels/programs.py describes it, for programs that TensorFlow runs.
#pragma once
#include <cstddef>

#include "call.h"
#include "programs.h"

namespace normkit {

// The size that is times the product of lengths that the program did not know, if there are any; whether backward, a route, eps and
// offset, whether centred, and the dtype of each slot, as in Type. The statistics are one array, in the place of the last of them.
struct Description {
  Args args{};
  bool backward = false;
  int kind = 0, types[xla::SLOTS];
  int64_t Args::*times = nullptr;

  // False for a text that makes no sense.
  bool read(const char *text, size_t size);

  bool there(int slot) const { return types[slot] != NONE; }
  bool is_result(int slot) const { return slot >= xla::DWEIGHT || slot == xla::Y || (slot == xla::RSTD && !backward); }
  // How many elements the slot's array has, where that product is length.
  int64_t count(int slot, int64_t length) const;

  // What is wrong, or null. Each slot's array is in its place, null where there is none; length is that product.
  const char *run(int64_t length, void *const (&arrays)[xla::SLOTS]) const;

 private:
  int type(xla::Slot slot) const;
  int64_t sets(const Args &a) const { return kind == CHANNELS ? a.channels : a.outer * a.groups; }
};

}  // namespace normkit
