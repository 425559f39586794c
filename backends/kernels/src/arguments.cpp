// See arguments.h.
#include "arguments.h"

#include <cstring>
#include <memory>
#include <new>
#include <utility>

#include "threads.h"

namespace normkit {
namespace {

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

template <class Bits> bool any_negative(const void *data, int64_t count) {
  constexpr Bits sign = Bits(Bits(1) << (8 * sizeof(Bits) - 1));
  for (int64_t i = 0; i < count; ++i) {
    Bits bits;
    memcpy(&bits, static_cast<const char *>(data) + i * sizeof bits, sizeof bits);
    if (bits > sign) return true;
  }
  return false;
}

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

}  // namespace

bool integers(PyObject *const *values, Py_ssize_t count, int64_t *out) {
  for (Py_ssize_t i = 0; i < count; ++i)
    if ((out[i] = PyLong_AsLongLong(values[i])) == -1 && PyErr_Occurred()) return false;
  return true;
}

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

bool any_negative(const Array &a) {
  const int64_t size = size_of(a.type);
  return size == 8   ? any_negative<uint64_t>(a.data, a.count)
         : size == 4 ? any_negative<uint32_t>(a.data, a.count)
                     : any_negative<uint16_t>(a.data, a.count);
}

bool Batch::open(PyObject *of_mean, PyObject *of_var) {
  return mean.open(of_mean, "batch_mean", true) && var.open(of_var, "batch_var", true);
}

bool Batch::check(int type, int64_t count) const {
  if (mean.data && var.data && mean.type == type && var.type == type && mean.count == count && var.count == count && !mean.overlaps(var)) return true;
  return PyErr_SetString(PyExc_ValueError, "batch_mean and batch_var must be apart and have the statistics' dtype, a value per channel."), false;
}

void Batch::take_out_of(const void *stats) const {
  if (mean.type == F64) take_out<double>(stats, mean, var);
  else take_out<float>(stats, mean, var);
}

bool is_written(int argument, bool backward) { return argument == Y || argument >= DWEIGHT || (argument == STATS && !backward); }

bool open(Array (&arrays)[ARGUMENTS], PyObject *const *values, bool backward, bool written) {
  for (int i = 0; i < ARGUMENTS; ++i)
    if (is_written(i, backward) == written && !arrays[i].open(values[i], kNames[i], written)) return false;
  return true;
}

bool run(Array (&arrays)[ARGUMENTS], const Sized &sized, bool backward, const Batch *batch) {
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

}  // namespace normkit
