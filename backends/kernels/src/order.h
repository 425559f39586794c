// The two orders of axes that kernels take arrays in as they are.
#pragma once
#include <cstdint>

namespace normkit {

// Whether elements follow each other in row-major order, or, `last`, with axis 1 innermost. Strides count an element as `unit`;
// axes of length 1 may have any.
template <class N> bool in_order(int64_t ndim, const N *shape, const N *strides, int64_t unit, bool last) {
  if (last && ndim < 3) return false;
  if (!strides) return !last;
  for (int64_t k = 0; k < ndim; ++k) {
    const int64_t d = !last ? ndim - 1 - k : k == 0 ? 1 : k == ndim - 1 ? 0 : ndim - k;
    if (shape[d] != 1 && strides[d] != unit) return false;
    unit *= shape[d];
  }
  return true;
}

}  // namespace normkit
