// The Python module: what it is asked for directly, and the table of its functions.
#include <cstdlib>
#include <cstring>

#include "arguments.h"
#include "bound.h"
#include "ffi.h"
#include "operators.h"
#include "select.h"
#include "tensorflow.h"
#include "threads.h"

namespace normkit {
namespace {

// empty(type, *shape): the type is 0 float32, 1 float64, 2 float16, 3 bfloat16.
PyObject *empty(PyObject *, PyObject *const *values, Py_ssize_t count) {
  int64_t numbers[1 + 64];
  if (count < 1 || count > 65) return PyErr_SetString(PyExc_TypeError, "empty takes a type and up to 64 lengths."), nullptr;
  if (!integers(values, count, numbers)) return nullptr;
  if (numbers[0] < F32 || numbers[0] > BF16) return PyErr_Format(PyExc_ValueError, "There is no type %lld.", (long long)numbers[0]);
  return fresh_capsule(int(numbers[0]), int(count - 1), numbers + 1);
}

// batch_stats(stats, mean, var): mean and variance, out of the packed statistics of a centred layer.
PyObject *batch_stats(PyObject *, PyObject *const *values, Py_ssize_t count) {
  Array stats;
  Batch batch;
  if (count != 3) return PyErr_SetString(PyExc_TypeError, "batch_stats takes stats, mean and var."), nullptr;
  const char *names[] = {"stats", "mean", "var"};
  Array *const arrays[] = {&stats, &batch.mean, &batch.var};
  for (int i = 0; i < 3; ++i) {
    const Array &array = *arrays[i];
    if (!arrays[i]->open(values[i], names[i], i > 0)) return nullptr;
    if (!array.data || array.type != stats.type || array.count != (i ? stats.count / 4 : stats.count / 4 * 4))
      return PyErr_Format(PyExc_ValueError, "%s must have the dtype of stats and a fourth of its elements.", names[i]);
  }
  if (stats.type != F32 && stats.type != F64) return PyErr_SetString(PyExc_TypeError, "stats must be float32 or float64."), nullptr;
  batch.take_out_of(stats.data);
  Py_RETURN_NONE;
}

// call(backward, *sizes, *arrays)
PyObject *call(PyObject *, PyObject *const *values, Py_ssize_t count) {
  constexpr Py_ssize_t kScalars = 1 + kSizes;
  if (count != kScalars + ARGUMENTS) return PyErr_Format(PyExc_TypeError, "call takes %zd arguments; received %zd.", kScalars + ARGUMENTS, count);
  Sized sized;
  const int backward = PyObject_IsTrue(values[0]);
  if (backward < 0 || !sizes(values + 1, sized.kind, sized.args)) return nullptr;
  Array arrays[ARGUMENTS];
  values += kScalars;
  if (!open(arrays, values, backward, false) || !open(arrays, values, backward, true) || !run(arrays, sized, backward)) return nullptr;
  Py_RETURN_NONE;
}

PyObject *negative(PyObject *, PyObject *object) {
  Array a;
  if (!a.open(object, "x", false)) {
    PyErr_Clear();
    Py_RETURN_NONE;
  }
  return PyBool_FromLong(any_negative(a));
}

PyObject *info(PyObject *, PyObject *) {
  PyObject *sets = PyList_New(0);
  for (const Isa *i = instruction_sets(); sets && i->name; ++i) {
    PyObject *name = i->table ? PyUnicode_FromString(i->name) : nullptr;
    if (name) PyList_Append(sets, name);
    Py_XDECREF(name);
  }
  return Py_BuildValue("{s:s,s:N,s:s,s:i,s:O}", "instruction_set", chosen.isa->name, "instruction_sets", sets, "threads_of", pool_name(),
                       "threads", thread_count(), "hugepages", chosen.hugepages ? Py_True : Py_False);
}

PyObject *counts(PyObject *, PyObject *) { return Py_BuildValue("LL", (long long)served(false), (long long)served(true)); }

PyObject *limit(PyObject *, PyObject *count) {
  const long n = PyLong_AsLong(count);
  if (n == -1 && PyErr_Occurred()) return nullptr;
  if (n < 0 || n > 4096) return PyErr_Format(PyExc_ValueError, "The number of threads must be 0 (no limit) to 4096; received %ld.", n);
  limit_threads(int(n));
  Py_RETURN_NONE;
}

template <auto function> PyObject *capsule(PyObject *, PyObject *) {
  return PyCapsule_New(reinterpret_cast<void *>(function), nullptr, nullptr);
}

template <bool (*function)(const char *)> PyObject *for_library(PyObject *, PyObject *path) {
  PyObject *bytes = PyUnicode_EncodeFSDefault(path);
  if (!bytes) return nullptr;
  const bool done = function(PyBytes_AsString(bytes));
  Py_DECREF(bytes);
  return PyBool_FromLong(done);
}

PyMethodDef methods[] = {
    {"call", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call)), METH_FASTCALL,
     "call(backward, kind, outer, groups, channels, inner, eps, offset, center, x, dy, weight, bias, mean, var, out, stats, "
     "dweight, dbias, dmean, dvar): run one kernel; stats hold mean, residue, var, rstd, or var, rstd where not centred."},
    {"batch_stats", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(batch_stats)), METH_FASTCALL,
     "batch_stats(stats, mean, var): take mean (with its residue) and variance out of packed statistics."},
    {"empty", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(empty)), METH_FASTCALL,
     "empty(type, *shape): a DLPack capsule of uninitialized memory; 0 float32, 1 float64, 2 float16, 3 bfloat16."},
    {"bind", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(bind)), METH_FASTCALL,
     "bind(types, negated, like, packed, channel, shape, kind, outer, groups, channels, inner, eps, offset, center): calls whose "
     "arrays are to come; from kind on once more for x with axis 1 last in memory."},
    {"apply", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(apply)), METH_FASTCALL,
     "apply(bound, x, weight, bias, mean, var, save): y, stats, batch_mean, batch_var; None where an array is of another type, shape "
     "or layout."},
    {"pull_back", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(pull_back)), METH_FASTCALL,
     "pull_back(bound, x, dy, weight, bias, mean, var, stats, needs): dx, dweight, dbias, dmean, dvar; None as in apply."},
    {"negative", negative, METH_O, "Whether a value is negative; None where x is not a dense float array in host memory."},
    {"info", info, METH_NOARGS, "The instruction set and the threads in use."},
    {"served", counts, METH_NOARGS, "How many forward and backward calls kernels have served in this process."},
    {"limit_threads", limit, METH_O, "limit_threads(n): use at most n threads; 0 lifts the limit."},
    {"xla_handler", capsule<xla::handle>, METH_NOARGS, "The kernels as a handler of XLA's foreign function interface, in a capsule."},
    {"custom_call", capsule<custom_call>, METH_NOARGS, "The kernels as a custom call of TensorFlow's XLA, in a capsule."},
    {"tensorflow_calls", for_library<register_custom_call>, METH_O,
     "tensorflow_calls(path): let the XLA of the libtensorflow_cc that was loaded from there call the kernels; False where it cannot."},
    {"tensorflow_operation", for_library<register_operation>, METH_O,
     "tensorflow_operation(path): define the kernels' operation in the libtensorflow_framework that was loaded from there; False where "
     "it cannot be."},
    {"torch_operators", for_library<implement_operators>, METH_O,
     "torch_operators(path): implement normkit's operators for the libtorch that was loaded from there; False where it cannot be."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_kernels", "Fused normalization kernels for the CPU.", -1, methods,
                      nullptr, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace normkit

PyMODINIT_FUNC PyInit__kernels() {
  using namespace normkit;
  const char *name = getenv("NORMKIT_ISA"), *pages = getenv("NORMKIT_HUGEPAGES");
  chosen.isa = select_isa(name);
  if (!chosen.isa) return PyErr_Format(PyExc_ImportError, "This processor cannot run the kernels for NORMKIT_ISA=%s.", name ? name : "");
  chosen.hugepages = !pages || strcmp(pages, "0");
  return PyModule_Create(&module);
}
