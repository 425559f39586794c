// Gradients of sets so wide that a difference from their mean may leave the accumulation type.
#pragma once
#include "moments.h"

namespace normkit {
namespace {

// Whether there is such a set: its spread is at least what such a difference would be, over the root of how many it has.
template <class A> inline bool too_wide(const Args &a, Kind kind) {
  if (!a.center || a.given()) return false;
  const i64 sets = sets_of(kind, a);
  if (!sets) return false;
  const A limit = A(sqrt(double(a.size()) / double(sets)) * (sizeof(A) == 8 ? 0x1p-1022 : 0x1p-126));
  bool any = false;
  for (i64 i = 0; i < sets; ++i) any |= get((const A *)a.rstd + i) < limit;
  return any;
}

// The gradients one element after the other, in double and of a quarter of each difference: seldom wanted, and slow.
template <class T> bool backward_of_wide(const Args &a, Kind kind) {
  using A = Acc<T>;
  Scratch memory;
  const i64 size = a.size(), sets = sets_of(kind, a), params = a.groups * a.channels;
  const A *weight = param<A>(memory, a.weight, a.wtype, params, 1, a.offset, std::is_same_v<T, bfloat>);
  double *of_sets = memory.take<double>(2 * sets), *of_params = memory.take<double>(2 * params);
  if (memory.failed) return false;
  double *means = of_sets, *slopes = of_sets + sets, *db = of_params, *dw = of_params + params;
  memset(of_sets, 0, sizeof(double) * size_t(2 * sets)), memset(of_params, 0, sizeof(double) * size_t(2 * params));
  const double n = double(size) / double(sets);
  const auto each = [&](auto f) {
    for (i64 i = 0; i < size; ++i) {
      i64 set, param;
      place(kind, a, i, set, param);
      const Moments<A> m = saved<A>(a, set);
      const double quarter = (get((const T *)a.x + i) * 0.25 - m.mean * 0.25) - m.residue * 0.25;
      f(i, set, param, double(get((const T *)a.dy + i)), quarter * (4 * m.root), m.root);
    }
  };
  each([&](i64, i64 set, i64 param, double g, double v, double) {
    const double weighted = g * double(get(weight + param)) / n;
    means[set] += weighted, slopes[set] += weighted * v;
    db[param] += g, dw[param] += g * v;
  });
  if (a.y)
    each([&](i64 i, i64 set, i64 param, double g, double v, double rstd) {
      put((T *)a.y + i, A(((g * double(get(weight + param)) - means[set]) - v * slopes[set]) * rstd));
    });
  if (a.dweight) put_all(a.dweight, a.wtype, 0, dw, params);
  if (a.dbias) put_all(a.dbias, a.btype, 0, db, params);
  return true;
}

}  // namespace
}  // namespace normkit
