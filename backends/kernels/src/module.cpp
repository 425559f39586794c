// The Python module: checks the arrays of a call, releases the GIL, and hands their memory to the kernels.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <new>
#include <utility>

#include "arrays.h"
#include "call.h"
#include "ffi.h"
#include "operators.h"
#include "select.h"
#include "tensorflow.h"
#include "threads.h"

namespace normkit {
namespace {

enum Argument {
  X, DY, WEIGHT, BIAS, GIVEN_MEAN, GIVEN_VAR, Y, STATS, DWEIGHT, DBIAS, DMEAN, DVAR, ARGUMENTS
};
constexpr const char *kNames[ARGUMENTS] = {"x",   "dy",    "weight",  "bias",  "mean",  "var",
                                           "out", "stats", "dweight", "dbias", "dmean", "dvar"};

int64_t sets_of(const Args &a, int kind) { return kind == CHANNELS ? a.channels : a.outer * a.groups; }

bool check(const Args &a, Array (&arrays)[ARGUMENTS], bool backward, int kind, int64_t rows_of_stats) {
  const int64_t params = a.groups * a.channels, sets = sets_of(a, kind);
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

// False with an exception: nothing of Python's may be called while there is one.
bool integers(PyObject *const *values, Py_ssize_t count, int64_t *out) {
  for (Py_ssize_t i = 0; i < count; ++i)
    if ((out[i] = PyLong_AsLongLong(values[i])) == -1 && PyErr_Occurred()) return false;
  return true;
}

// kind, outer, groups, channels, inner, eps, offset, center
constexpr Py_ssize_t kSizes = 8;
bool sizes(PyObject *const *values, long &kind, Args &a) {
  int64_t numbers[5];
  if (!integers(values, 5, numbers)) return false;
  kind = long(numbers[0]), a.outer = numbers[1], a.groups = numbers[2], a.channels = numbers[3], a.inner = numbers[4];
  for (auto [number, value] : {std::pair{&a.eps, values[5]}, {&a.offset, values[6]}})
    if ((*number = PyFloat_AsDouble(value)) == -1 && PyErr_Occurred()) return false;
  const int center = PyObject_IsTrue(values[7]);
  if (center < 0) return false;
  a.center = center;
  if (kind < ROWS || kind > COLUMNS || a.outer < 1 || a.groups < 1 || a.channels < 1 || a.inner < 1 || (kind == CHANNELS && a.groups != 1))
    return PyErr_SetString(PyExc_ValueError, "A kernel needs a known kind and positive sizes."), false;
  int64_t size = 1;
  for (int64_t n : {a.outer, a.groups, a.channels, a.inner})
    if (__builtin_mul_overflow(size, n, &size)) return PyErr_SetString(PyExc_ValueError, "The sizes overflow."), false;
  return true;
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
bool any_negative(const Array &a) {
  const int64_t size = size_of(a.type);
  return size == 8   ? any_negative<uint64_t>(a.data, a.count)
         : size == 4 ? any_negative<uint32_t>(a.data, a.count)
                     : any_negative<uint16_t>(a.data, a.count);
}

// The shape of the parameters.
struct Shape {
  int ndim = 0;
  int64_t lengths[64];

  bool operator==(const Array &a) const { return a.ndim == ndim && std::equal(lengths, lengths + ndim, a.shape); }
};

// A kernel and what it is to be called with.
struct Sized {
  long kind = -1;
  Args args{};
};

// Calls whose sizes are known: what is left of them where x is small.
struct Bound {
  static constexpr const char *kName = "normkit.bound";
  PyObject *types;    // a tuple: what x and the parameters may be
  PyObject *negated;  // a function that says of them whether memory has the opposite sign; or None
  PyObject *like, *packed, *channel;  // make an array like another, and room for statistics; channel: None where none are returned
  Shape params;
  Sized first, last;  // for x in row-major order, and with axis 1 last in memory; the second may have no kind

  void hold() const {
    for (PyObject *object : {types, negated, like, packed, channel}) Py_INCREF(object);
  }
  void let_go() const {
    for (PyObject *object : {types, negated, like, packed, channel}) Py_DECREF(object);
  }
  // No, perhaps with a Python exception.
  bool takes(PyObject *object) const {
    if (object == Py_None) return true;
    for (Py_ssize_t i = 0; i < PyTuple_Size(types); ++i)
      if (reinterpret_cast<PyObject *>(Py_TYPE(object)) == PyTuple_GetItem(types, i)) return negated == Py_None || is_as_stored(object);
    return false;
  }
  bool takes(PyObject *const *objects, int count) const {
    for (int i = 0; i < count; ++i)
      if (!takes(objects[i])) return false;
    return true;
  }
  bool is_as_stored(PyObject *object) const {
    PyObject *answer = PyObject_CallFunctionObjArgs(negated, object, nullptr);
    Py_XDECREF(answer);
    return answer == Py_False;
  }
  // For x in its order; null where there is none.
  const Sized *sized(const Array &x) const { return x.row_major ? &first : x.channels_last && last.kind >= 0 ? &last : nullptr; }
  // Whether an argument is what such a call is for; whatever is not may still be served in another way.
  bool fits(const Array &a, int argument, const Array &x) const {
    if (a.as_bits) return false;
    if (argument == X || argument == DY) return !a.data || (a.type == x.type && (x.row_major ? a.row_major : a.channels_last));
    if (!a.row_major) return false;
    return argument > GIVEN_VAR || !a.data || (params == a && (argument != GIVEN_VAR || !any_negative(a)));
  }
};

// At any address.
template <class T> void take_out(const void *stats, const Array &mean, const Array &var) {
  const int64_t n = mean.count;
  const auto row = [&](int64_t k, int64_t i) {
    T value;
    memcpy(&value, static_cast<const char *>(stats) + (k * n + i) * int64_t(sizeof value), sizeof value);
    return value;
  };
  const auto put = [](const Array &out, int64_t i, T value) {
    memcpy(static_cast<char *>(out.data) + i * int64_t(sizeof value), &value, sizeof value);
  };
  for (int64_t i = 0; i < n; ++i) put(mean, i, row(0, i) + row(1, i)), put(var, i, row(2, i));
}

// Mean and variance of a batch, out of the packed statistics of its channels.
struct Batch {
  Array mean, var;

  bool open(PyObject *of_mean, PyObject *of_var) { return mean.open(of_mean, "batch_mean", true) && var.open(of_var, "batch_var", true); }
  bool check(int type, int64_t count) const {
    if (mean.data && var.data && mean.type == type && var.type == type && mean.count == count && var.count == count && !mean.overlaps(var)) return true;
    return PyErr_SetString(PyExc_ValueError, "batch_mean and batch_var must be apart and have the statistics' dtype, a value per channel."), false;
  }
  void take_out_of(const void *stats) const {
    if (mean.type == F64) take_out<double>(stats, mean, var);
    else take_out<float>(stats, mean, var);
  }
};

bool is_written(int argument, bool backward) { return argument == Y || argument >= DWEIGHT || (argument == STATS && !backward); }

// Opens what is read, or what is written; false with a Python exception.
bool open(Array (&arrays)[ARGUMENTS], PyObject *const *values, bool backward, bool written) {
  for (int i = 0; i < ARGUMENTS; ++i)
    if (is_written(i, backward) == written && !arrays[i].open(values[i], kNames[i], written)) return false;
  return true;
}

// Opens what a bound call reads; null, without an exception, where it does not fit.
const Sized *open_fitting(Array (&arrays)[ARGUMENTS], PyObject *const *values, bool backward, const Bound &bound) {
  const Sized *sized = nullptr;
  for (int i = 0; i < ARGUMENTS; ++i) {
    if (is_written(i, backward)) continue;
    const bool open = arrays[i].open(values[i], kNames[i], false);
    if (open && i == X) sized = bound.sized(arrays[X]);
    if (!open || !sized || !bound.fits(arrays[i], i, arrays[X])) return PyErr_Clear(), nullptr;
  }
  return sized;
}

// Objects that a call has made; null where making one raised.
struct Made {
  PyObject *objects[5] = {};
  int count = 0;

  ~Made() {
    for (int i = 0; i < count; ++i) Py_XDECREF(objects[i]);
  }
  // The result of maker(of) or maker(), or None.
  PyObject *add(PyObject *maker, PyObject *of, bool wanted) {
    if (!wanted) Py_INCREF(Py_None);
    return objects[count++] = !wanted ? Py_None : PyObject_CallFunctionObjArgs(maker, of, nullptr);
  }
  bool whole() const { return std::all_of(objects, objects + count, [](PyObject *object) { return object != nullptr; }); }
  PyObject *tuple() const {
    PyObject *found = PyTuple_New(count);
    for (int i = 0; found && i < count; ++i) Py_INCREF(objects[i]), PyTuple_SetItem(found, i, objects[i]);
    return found;
  }
};

// Runs a kernel; false with a Python exception. `batch`: null, or where a centred layer's mean and variance go.
bool run(Array (&arrays)[ARGUMENTS], const Sized &sized, bool backward, const Batch *batch = nullptr) {
  Args a = sized.args;
  const long kind = sized.kind;
  a.xtype = arrays[X].type, a.wtype = arrays[WEIGHT].type, a.btype = arrays[BIAS].type;
  a.mtype = arrays[GIVEN_MEAN].type, a.vtype = arrays[GIVEN_VAR].type;
  if (!check(a, arrays, backward, int(kind), a.center ? 4 : 2)) return false;
  if (arrays[DWEIGHT].data) a.wtype = a.wtype == NONE ? arrays[DWEIGHT].type : a.wtype;
  if (arrays[DBIAS].data) a.btype = arrays[DBIAS].type;
  for (auto [out, type] : {std::pair{DWEIGHT, a.wtype}, {DBIAS, a.btype}, {DMEAN, a.mtype}, {DVAR, a.vtype}})
    if (arrays[out].data && arrays[out].type != type)
      return PyErr_Format(PyExc_TypeError, "%s must have the dtype of what it is the gradient of.", kNames[out]), false;
  a.x = arrays[X].data, a.dy = arrays[DY].data, a.weight = arrays[WEIGHT].data, a.bias = arrays[BIAS].data;
  a.given_mean = arrays[GIVEN_MEAN].data, a.given_var = arrays[GIVEN_VAR].data, a.y = arrays[Y].data;
  a.dweight = arrays[DWEIGHT].data, a.dbias = arrays[DBIAS].data, a.dmean = arrays[DMEAN].data, a.dvar = arrays[DVAR].data;
  char *stats = static_cast<char *>(arrays[STATS].data);
  const int64_t sets = sets_of(a, int(kind)), row = sets * size_of(a.xtype == F64 ? F64 : F32);
  std::unique_ptr<char[]> room;
  if (batch) {
    if (kind == ROWS || !a.center) return PyErr_SetString(PyExc_ValueError, "Such a layer has no statistics of a batch."), false;
    if (!batch->check(a.xtype == F64 ? F64 : F32, sets)) return false;
    if (!stats) room.reset(new (std::nothrow) char[size_t(4 * row)]), stats = room.get();
    if (!stats) return PyErr_NoMemory(), false;
  }
  const char *packed = stats;
  if (stats) {
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
  if (!done) return PyErr_NoMemory(), false;
  if (batch) batch->take_out_of(packed);
  return true;
}

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
  Array arrays[3];
  if (count != 3) return PyErr_SetString(PyExc_TypeError, "batch_stats takes stats, mean and var."), nullptr;
  const char *names[] = {"stats", "mean", "var"};
  for (int i = 0; i < 3; ++i) {
    if (!arrays[i].open(values[i], names[i], i > 0)) return nullptr;
    if (!arrays[i].data || arrays[i].type != arrays[0].type || arrays[i].count != (i ? arrays[0].count / 4 : arrays[0].count / 4 * 4))
      return PyErr_Format(PyExc_ValueError, "%s must have the dtype of stats and a fourth of its elements.", names[i]);
  }
  if (arrays[0].type == F64) take_out<double>(arrays[0].data, arrays[1], arrays[2]);
  else if (arrays[0].type == F32) take_out<float>(arrays[0].data, arrays[1], arrays[2]);
  else return PyErr_SetString(PyExc_TypeError, "stats must be float32 or float64."), nullptr;
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

// bind(types, negated, like, packed, channel, shape, *sizes): sizes twice where there is a kernel for axis 1 last in memory too.
PyObject *bind(PyObject *, PyObject *const *values, Py_ssize_t count) {
  constexpr Py_ssize_t kFirst = 6;
  const bool both = count == kFirst + 2 * kSizes;
  if ((count != kFirst + kSizes && !both) || !PyTuple_Check(values[0]) || !PyTuple_Check(values[5]) || PyTuple_Size(values[5]) > 64)
    return PyErr_Format(PyExc_TypeError, "bind takes a tuple of types, four functions, a shape and once or twice %zd sizes.", kSizes);
  Bound bound{values[0], values[1], values[2], values[3], values[4], {}, {}, {}};
  bound.params.ndim = int(PyTuple_Size(values[5]));
  for (int i = 0; i < bound.params.ndim; ++i) {
    PyObject *const length = PyTuple_GetItem(values[5], i);
    if (!integers(&length, 1, bound.params.lengths + i)) return nullptr;
  }
  if (!sizes(values + kFirst, bound.first.kind, bound.first.args)) return nullptr;
  if (both && !sizes(values + kFirst + kSizes, bound.last.kind, bound.last.args)) return nullptr;
  bound.hold();
  return PyCapsule_New(new Bound(bound), Bound::kName, [](PyObject *capsule) {
    auto *held = static_cast<Bound *>(PyCapsule_GetPointer(capsule, Bound::kName));
    held->let_go();
    delete held;
  });
}

// None where no exception was raised.
PyObject *none_or_error() {
  if (PyErr_Occurred()) return nullptr;
  Py_RETURN_NONE;
}

// apply(bound, x, weight, bias, mean, var, save): y, the packed statistics or None, and mean and variance of a batch or None;
// made only where x and the rest are plain arrays of those types in a known order, parameters have that shape, and no variance
// is negative: else None.
PyObject *apply(PyObject *, PyObject *const *values, Py_ssize_t count) {
  if (count != 7) return PyErr_Format(PyExc_TypeError, "apply takes 7 arguments; received %zd.", count);
  const auto *bound = static_cast<Bound *>(PyCapsule_GetPointer(values[0], Bound::kName));
  const int save = bound ? PyObject_IsTrue(values[6]) : -1;
  if (save < 0) return nullptr;
  if (!bound->takes(values + 1, 5)) return none_or_error();
  PyObject *const none = Py_None;
  PyObject *all[ARGUMENTS] = {values[1], none, values[2], values[3], values[4], values[5], none, none, none, none, none, none};
  Array arrays[ARGUMENTS];
  const Sized *sized = open_fitting(arrays, all, false, *bound);
  if (!sized) return none_or_error();
  const bool own = values[4] == none, of_batch = own && bound->channel != none;
  Made made;
  all[Y] = made.add(bound->like, values[1], true), all[STATS] = made.add(bound->packed, nullptr, save && own);
  PyObject *const mean = made.add(bound->channel, nullptr, of_batch), *const var = made.add(bound->channel, nullptr, of_batch);
  Batch batch;
  if (!made.whole() || !open(arrays, all, false, true) || (of_batch && !batch.open(mean, var))) return nullptr;
  return run(arrays, *sized, false, of_batch ? &batch : nullptr) ? made.tuple() : nullptr;
}

// pull_back(bound, x, dy, weight, bias, mean, var, stats, needs): the gradients of x, weight, bias, mean and var, as apply; None
// for each that is not needed.
PyObject *pull_back(PyObject *, PyObject *const *values, Py_ssize_t count) {
  if (count != 9) return PyErr_Format(PyExc_TypeError, "pull_back takes 9 arguments; received %zd.", count);
  const auto *bound = static_cast<Bound *>(PyCapsule_GetPointer(values[0], Bound::kName));
  if (!bound) return nullptr;
  if (!bound->takes(values + 1, 6)) return none_or_error();
  PyObject *const none = Py_None;
  PyObject *all[ARGUMENTS] = {values[1], values[2], values[3], values[4], values[5], values[6], none, values[7], none, none, none, none};
  Array arrays[ARGUMENTS];
  const Py_ssize_t needs = PySequence_Size(values[8]);
  if (needs != 5) return needs < 0 ? nullptr : PyErr_Format(PyExc_TypeError, "needs must have 5 items; received %zd.", needs);
  const Sized *sized = open_fitting(arrays, all, true, *bound);
  if (!sized) return none_or_error();
  constexpr int of[] = {X, WEIGHT, BIAS, GIVEN_MEAN, GIVEN_VAR}, to[] = {Y, DWEIGHT, DBIAS, DMEAN, DVAR};
  Made made;
  for (int i = 0; i < 5; ++i) {
    PyObject *const need = PySequence_GetItem(values[8], i);
    const int needed = need ? PyObject_IsTrue(need) : -1;
    Py_XDECREF(need);
    if (needed < 0 || !(all[to[i]] = made.add(bound->like, all[of[i]], needed && all[of[i]] != none))) return nullptr;
  }
  return open(arrays, all, true, true) && run(arrays, *sized, true) ? made.tuple() : nullptr;
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
