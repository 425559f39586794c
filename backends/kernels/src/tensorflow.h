// The kernels in what XLA compiles for TensorFlow, which has a registry of functions that its programs may call.
#pragma once

namespace normkit {

// Enters the kernels as "normkit" in the registry of the libtensorflow_cc that was loaded from there; false where it has none.
bool register_custom_call(const char *library);

}  // namespace normkit
