// The kernels as operators of PyTorch, called without Python.
#pragma once

namespace normkit {

// Implements normkit::forward and normkit::backward, which backends/torch/ops.py has defined, by PyTorch's stable ABI; false
// where the library at `path` is not loaded or has no such ABI (PyTorch before 2.13).
bool implement_operators(const char *path);

}  // namespace normkit
