// See bound.h.
#include "bound.h"

#include <algorithm>

#include "arguments.h"

namespace normkit {
namespace {

// The shape of the parameters.
struct Shape {
  int ndim = 0;
  int64_t lengths[64];

  bool operator==(const Array &a) const { return a.ndim == ndim && std::equal(lengths, lengths + ndim, a.shape); }
};

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

// None where no exception was raised.
PyObject *none_or_error() {
  if (PyErr_Occurred()) return nullptr;
  Py_RETURN_NONE;
}

}  // namespace

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

}  // namespace normkit
