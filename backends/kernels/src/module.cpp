// The Python module: checks the arrays of a call, releases the GIL, and hands their memory to the kernels.
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <utility>

#include "arrays.h"
#include "call.h"
#include "ffi.h"
#include "threads.h"

namespace normkit {
namespace {

enum Argument {
  X, DY, WEIGHT, BIAS, GIVEN_MEAN, GIVEN_VAR, Y, STATS, DWEIGHT, DBIAS, DMEAN, DVAR, ARGUMENTS
};
constexpr const char *kNames[ARGUMENTS] = {"x",   "dy",    "weight",  "bias",  "mean",  "var",
                                           "out", "stats", "dweight", "dbias", "dmean", "dvar"};

bool check(const Args &a, Array (&arrays)[ARGUMENTS], bool backward, int kind, int64_t rows_of_stats) {
  const int64_t params = a.groups * a.channels, sets = kind == CHANNELS ? a.channels : a.outer * a.groups;
  const int64_t wanted[ARGUMENTS] = {a.size(), a.size(), params, params, params, params, a.size(),
                                     rows_of_stats * sets, params, params, params, params};
  if (!arrays[X].data && a.size()) return PyErr_SetString(PyExc_TypeError, "x must be given."), false;
  for (int i = 0; i < ARGUMENTS; ++i)
    if (!arrays[i].expect(kNames[i], wanted[i])) return false;
  for (int i : {DY, Y})
    if (arrays[i].data && arrays[i].type != arrays[X].type)
      return PyErr_Format(PyExc_TypeError, "%s must have the dtype of x.", kNames[i]), false;
  if (arrays[STATS].data && arrays[STATS].type != (a.xtype == F64 ? F64 : F32))
    return PyErr_SetString(PyExc_TypeError, "stats must have the accumulation dtype."), false;
  const bool given = arrays[GIVEN_MEAN].data;
  if (given != bool(arrays[GIVEN_VAR].data) || (given && kind == ROWS))
    return PyErr_SetString(PyExc_ValueError, "mean and var must be given together, and not for rows."), false;
  if (backward ? !arrays[DY].data || (!given && !arrays[STATS].data) : !arrays[Y].data)
    return PyErr_SetString(PyExc_TypeError, backward ? "dy and stats must be given." : "out must be given."), false;
  const int outputs[] = {Y, DWEIGHT, DBIAS, DMEAN, DVAR, STATS};
  for (int out : outputs)
    for (int i = 0; i < ARGUMENTS; ++i)
      if (i != out && !(out == STATS && backward) && arrays[out].overlaps(arrays[i]))
        return PyErr_Format(PyExc_ValueError, "%s and %s must not share memory.", kNames[out], kNames[i]), false;
  return true;
}

// call(backward, kind, outer, groups, channels, inner, eps, offset, center, *arrays)
PyObject *call(PyObject *, PyObject *const *values, Py_ssize_t count) {
  constexpr Py_ssize_t kScalars = 9;
  if (count != kScalars + ARGUMENTS) return PyErr_Format(PyExc_TypeError, "call takes %zd arguments; received %zd.", kScalars + ARGUMENTS, count);
  const bool backward = PyObject_IsTrue(values[0]) == 1;
  const long kind = PyLong_AsLong(values[1]);
  Args a{};
  a.outer = PyLong_AsLongLong(values[2]), a.groups = PyLong_AsLongLong(values[3]);
  a.channels = PyLong_AsLongLong(values[4]), a.inner = PyLong_AsLongLong(values[5]);
  a.eps = PyFloat_AsDouble(values[6]), a.offset = PyFloat_AsDouble(values[7]);
  a.center = PyObject_IsTrue(values[8]) == 1;
  if (PyErr_Occurred()) return nullptr;
  if (kind < ROWS || kind > COLUMNS || a.outer < 1 || a.groups < 1 || a.channels < 1 || a.inner < 1 || (kind == CHANNELS && a.groups != 1))
    return PyErr_SetString(PyExc_ValueError, "call needs a known kind and positive sizes."), nullptr;
  int64_t size = 1;
  for (int64_t n : {a.outer, a.groups, a.channels, a.inner})
    if (__builtin_mul_overflow(size, n, &size)) return PyErr_SetString(PyExc_ValueError, "The sizes overflow."), nullptr;

  Array arrays[ARGUMENTS];
  for (int i = 0; i < ARGUMENTS; ++i) {
    const bool written = i == Y || i >= DWEIGHT || (i == STATS && !backward);
    if (!arrays[i].open(values[kScalars + i], kNames[i], written)) return nullptr;
  }
  a.xtype = arrays[X].type, a.wtype = arrays[WEIGHT].type, a.btype = arrays[BIAS].type;
  a.mtype = arrays[GIVEN_MEAN].type, a.vtype = arrays[GIVEN_VAR].type;
  if (!check(a, arrays, backward, int(kind), a.center ? 4 : 2)) return nullptr;
  if (arrays[DWEIGHT].data) a.wtype = a.wtype == NONE ? arrays[DWEIGHT].type : a.wtype;
  if (arrays[DBIAS].data) a.btype = arrays[DBIAS].type;
  for (auto [out, type] : {std::pair{DWEIGHT, a.wtype}, {DBIAS, a.btype}, {DMEAN, a.mtype}, {DVAR, a.vtype}})
    if (arrays[out].data && arrays[out].type != type)
      return PyErr_Format(PyExc_TypeError, "%s must have the dtype of what it is the gradient of.", kNames[out]), nullptr;
  a.x = arrays[X].data, a.dy = arrays[DY].data, a.weight = arrays[WEIGHT].data, a.bias = arrays[BIAS].data;
  a.given_mean = arrays[GIVEN_MEAN].data, a.given_var = arrays[GIVEN_VAR].data, a.y = arrays[Y].data;
  a.dweight = arrays[DWEIGHT].data, a.dbias = arrays[DBIAS].data, a.dmean = arrays[DMEAN].data, a.dvar = arrays[DVAR].data;
  if (char *stats = static_cast<char *>(arrays[STATS].data)) {
    const int64_t row = arrays[STATS].bytes() / (a.center ? 4 : 2);
    if (a.center) a.mean = stats, a.residue = stats + row, stats += 2 * row;
    a.var = stats, a.rstd = stats + row;
  }
  bool done;
  if (a.size() * size_of(a.xtype) < kParallelBytes) {
    done = launch(a, backward, int(kind), parallel);
  } else {
    PyThreadState *state = PyEval_SaveThread();
    done = launch(a, backward, int(kind), parallel);
    PyEval_RestoreThread(state);
  }
  if (!done) return PyErr_NoMemory();
  Py_RETURN_NONE;
}

// empty(type, *shape): the type is 0 float32, 1 float64, 2 float16, 3 bfloat16.
PyObject *empty(PyObject *, PyObject *const *values, Py_ssize_t count) {
  int64_t numbers[1 + 64];
  if (count < 1 || count > 65) return PyErr_SetString(PyExc_TypeError, "empty takes a type and up to 64 lengths."), nullptr;
  for (Py_ssize_t i = 0; i < count; ++i) numbers[i] = PyLong_AsLongLong(values[i]);
  if (PyErr_Occurred()) return nullptr;
  if (numbers[0] < F32 || numbers[0] > BF16) return PyErr_Format(PyExc_ValueError, "There is no type %lld.", (long long)numbers[0]);
  return fresh_capsule(int(numbers[0]), int(count - 1), numbers + 1);
}

template <class T> void take_out(const Array &stats, const Array &mean, const Array &var) {
  const T *from = static_cast<const T *>(stats.data);
  for (int64_t i = 0, n = mean.count; i < n; ++i) {
    static_cast<T *>(mean.data)[i] = from[i] + from[n + i];
    static_cast<T *>(var.data)[i] = from[2 * n + i];
  }
}

// batch_stats(stats, mean, var): mean and variance, out of the packed statistics of a centred layer.
PyObject *batch_stats(PyObject *, PyObject *const *values, Py_ssize_t count) {
  Array arrays[3];
  if (count != 3) return PyErr_SetString(PyExc_TypeError, "batch_stats takes stats, mean and var."), nullptr;
  const char *names[] = {"stats", "mean", "var"};
  for (int i = 0; i < 3; ++i) {
    if (!arrays[i].open(values[i], names[i], i > 0)) return nullptr;
    if (!arrays[i].data || arrays[i].type != arrays[0].type || arrays[i].count != (i ? arrays[0].count / 4 : arrays[0].count / 4 * 4))
      return PyErr_Format(PyExc_ValueError, "%s must have the dtype of stats and a fourth of its elements.", names[i]);
  }
  if (arrays[0].type == F64) take_out<double>(arrays[0], arrays[1], arrays[2]);
  else if (arrays[0].type == F32) take_out<float>(arrays[0], arrays[1], arrays[2]);
  else return PyErr_SetString(PyExc_TypeError, "stats must be float32 or float64."), nullptr;
  Py_RETURN_NONE;
}

template <class Bits> bool any_negative(const void *data, int64_t count) {
  constexpr Bits sign = Bits(Bits(1) << (8 * sizeof(Bits) - 1));
  for (int64_t i = 0; i < count; ++i) {
    Bits bits;
    memcpy(&bits, static_cast<const char *>(data) + i * sizeof bits, sizeof bits);
    if (bits > sign) return true;
  }
  return false;
}

// Looks at the sign bits: a NaN with a sign counts as negative, and -0 does not.
PyObject *negative(PyObject *, PyObject *object) {
  Array a;
  if (!a.open(object, "x", false)) {
    PyErr_Clear();
    Py_RETURN_NONE;
  }
  const int64_t size = size_of(a.type);
  const bool found = size == 8   ? any_negative<uint64_t>(a.data, a.count)
                     : size == 4 ? any_negative<uint32_t>(a.data, a.count)
                                 : any_negative<uint16_t>(a.data, a.count);
  return PyBool_FromLong(found);
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

PyObject *xla_handler(PyObject *, PyObject *) { return PyCapsule_New(reinterpret_cast<void *>(xla::handle), nullptr, nullptr); }

PyMethodDef methods[] = {
    {"call", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call)), METH_FASTCALL,
     "call(backward, kind, outer, groups, channels, inner, eps, offset, center, x, dy, weight, bias, mean, var, out, stats, "
     "dweight, dbias, dmean, dvar): run one kernel; stats hold mean, residue, var, rstd, or var, rstd where not centred."},
    {"batch_stats", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(batch_stats)), METH_FASTCALL,
     "batch_stats(stats, mean, var): take mean (with its residue) and variance out of packed statistics."},
    {"empty", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(empty)), METH_FASTCALL,
     "empty(type, *shape): a DLPack capsule of uninitialized memory; 0 float32, 1 float64, 2 float16, 3 bfloat16."},
    {"negative", negative, METH_O, "Whether a value is negative; None where x is not a dense float array in host memory."},
    {"info", info, METH_NOARGS, "The instruction set and the threads in use."},
    {"served", counts, METH_NOARGS, "How many forward and backward calls kernels have served in this process."},
    {"limit_threads", limit, METH_O, "limit_threads(n): use at most n threads; 0 lifts the limit."},
    {"xla_handler", xla_handler, METH_NOARGS, "The kernels as a handler of XLA's foreign function interface, in a capsule."},
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
