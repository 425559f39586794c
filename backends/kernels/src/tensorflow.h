// The kernels in TensorFlow's programs: in what XLA compiles, which has a registry of functions that it may call, and as an
// operation of other graphs.
#pragma once
#include <cstddef>

namespace normkit {

// What XLA calls: out is the memory of the result, and where there are several a list of theirs. All are in row-major order, and
// text says which kernel, on what. How large they are nobody says.
void custom_call(void *out, void *const *operands, const char *text, size_t size, void *status);

// Enters it as "normkit" in the registry of the libtensorflow_cc that was loaded from there; false where it has none.
bool register_custom_call(const char *library);

// Defines the operation "NormkitCall", for processors, in the libtensorflow_framework that was loaded from there; false where that has
// not all that it takes.
bool register_operation(const char *library);

}  // namespace normkit
