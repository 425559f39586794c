// Gradients of rows.h: each row's projections, then dx and the column sums of dy and dy·x̂.
#pragma once
#include "rows.h"

namespace normkit {
namespace {

// Adds the sums of u and u·v over a run to the lanes of s and q: u = dy (times weight), v the standardized x. `ahead` as in
// add_run.
template <class T, bool center, bool weighted>
inline void project(const T *x, const T *dy, Along<Acc<T>> w, i64 n, const Moments<Acc<T>> &m, Long<Acc<T>> &s, Long<Acc<T>> &q,
                    i64 ahead = 0) {
  using A = Acc<T>;
  using V = Vec<A>;
  constexpr int W = kLanes<A>;
  const auto both = [&](auto tag, i64 i, auto &u, auto &v) {
    if constexpr (center) v = m(tag.at(x + i));
    else v = tag.at(x + i) * m.rstd;
    u = tag.at(dy + i);
    if constexpr (weighted) u = u * tag.at(w + i);
  };
  V u{}, v{};
  i64 i = 0;
  do {
    const i64 end = least(n, i + 32 * W);
    V s0{}, s1{}, q0{}, q1{};
    for (; i + 2 * W <= end; i += 2 * W) {
      if (ahead) fetch<2 * W>(x + ahead + i), fetch<2 * W>(dy + ahead + i);
      Pair<A> us, vs;
      both(Two<T>{}, i, us, vs);
      s0 += us.a, q0 += us.a * vs.a;
      s1 += us.b, q1 += us.b * vs.b;
    }
    for (; i + W <= end; i += W) {
      both(Many{}, i, u, v);
      s0 += u, q0 += u * v;
    }
    s0 += s1, q0 += q1;
    if (i < n && n - i < W) {
      if (n >= W) {
        both(Many{}, n - W, u, v);
        u = last_lanes<A>(u, n - i), v = last_lanes<A>(v, n - i);
      } else {
        for (int k = 0; k < n; ++k) {
          A one, other;
          both(One{}, k, one, other);
          u[k] = one, v[k] = other;
        }
      }
      s0 += u, q0 += u * v, i = n;
    }
    s += s0, q += q0;
  } while (i < n);
}

// The same over a run of any length, in double.
template <class T, bool center, bool weighted>
inline void project(const T *x, const T *dy, Along<Acc<T>> w, i64 n, const Moments<Acc<T>> &m, double &s, double &q, i64 ahead = 0) {
  Long<Acc<T>> vs, vq;
  project<T, center, weighted>(x, dy, w, n, m, vs, vq, ahead);
  s += sum(vs), q += sum(vq);
}

// dx and the column sums of four rows at a time, weights along the row.
template <class T, bool center, int rows>
inline void backward_rows(const Args &a, Along<Acc<T>> w, i64 row, i64 n, Acc<T> *dw, Acc<T> *db) {
  using A = Acc<T>;
  constexpr int W = kLanes<A>;
  const T *x[rows], *dy[rows];
  T *dx[rows];
  Moments<A> m[rows];
  A c1[rows] = {}, c2[rows] = {};
  const i64 ahead = a.stream || n >= 256 ? rows * row_ahead<T>(a, n) : 0, later = n >= 256 ? ahead : 0;
  for (int r = 0; r < rows; ++r) {
    x[r] = (const T *)a.x + (row + r) * n, dy[r] = (const T *)a.dy + (row + r) * n;
    dx[r] = a.y ? (T *)a.y + (row + r) * n : nullptr;
    m[r] = saved<A>(a, row + r);
    if (!a.y) continue;
    double s = 0, q = 0;
    project<T, center, true>(x[r], dy[r], w, n, m[r], s, q, later);
    c1[r] = center ? A(s / double(n)) : 0, c2[r] = A(q / double(n));
  }
  // The sums are kept in the order of pairs.
  const auto step = [&](auto tag, i64 i, auto emit, auto keep) {
    for (int r = 0; ahead && r < rows; ++r) tag.fetch(x[r] + ahead + later + i), tag.fetch(dy[r] + ahead + later + i);
    const auto weight = tag.at(w + i);
    std::decay_t<decltype(weight)> sb{}, sw{};
    for (int r = 0; r < rows; ++r) {
      auto v = tag.at(x[r] + i);
      if constexpr (center) v = m[r](v);
      else v = v * m[r].rstd;
      const auto g = tag.at(dy[r] + i);
      sb = sb + g, sw = sw + g * v;
      if (!a.y) continue;
      // Of a difference of two products, one would be rounded, and it is the compiler's choice which.
      emit(dx[r] + i, (g * weight - (v * c2[r] + c1[r])) * m[r].rstd);
    }
    const Along<A> dbs{db + i, db + i}, dws{dw + i, dw + i};
    keep(db + i, tag.at(dbs) + sb), keep(dw + i, tag.at(dws) + sw);
  };
  const auto one = [](auto *p, auto v) { put(p, v); };
  const auto many = [](auto *p, auto v) { store(p, v); };
  const auto two = [](auto *p, auto v) { store_pair(p, v); };
  const auto past = [](auto *p, auto v) { store_pair<true>(p, v); };
  i64 i = 0;
  if (a.stream && a.y && n % (kBytes / i64(sizeof(T))) == 0) {
    for (; uintptr_t(dx[0] + i) % kBytes; ++i) step(One{}, i, one, one);
    for (; i + 2 * W <= n; i += 2 * W) step(Two<T>{}, i, past, two);
  }
  for (; i + 2 * W <= n; i += 2 * W) step(Two<T>{}, i, two, two);
  for (; i + W <= n; i += W) step(Many{}, i, many, many);
  for (; i < n; ++i) step(One{}, i, one, one);
}

// The parameters' gradients from their partial sums, in order: dweight[i] = sum over t < count of dw[t * stride + i], for i < n.
template <class X> inline void reduce(const Args &a, const X *dw, const X *db, i64 count, i64 n, i64 stride) {
  constexpr i64 kBlock = 512, kAlone = 1 << 14;  // of fewer sums, threads would take longer to begin
  const i64 blocks = ceil_div(n, kBlock);
  const auto add = [&](i64 task) {
    const bool weight = task < blocks;
    void *const out = weight ? a.dweight : a.dbias;
    if (!out) return;
    const X *sums = weight ? dw : db;
    double total[kBlock] = {};
    const i64 first = task % blocks * kBlock, size = least(kBlock, n - first);
    for (i64 t = 0; t < count; ++t)
      for (i64 i = 0; i < size; ++i) total[i] += sums[t * stride + first + i];
    put_all(out, weight ? a.wtype : a.btype, first, total, size);
  };
  if (2 * count * n >= kAlone) return parallel(a, 2 * blocks, add);
  for (i64 task = 0; task < 2 * blocks; ++task) add(task);
}

template <class T, bool center> bool rows_backward_flat(const Args &a) {
  using A = Acc<T>;
  Scratch memory;
  const i64 n = a.channels, params = a.groups * n;
  // The split is by shape alone, so that sums do not depend on the number of threads; few rows are work for four.
  const i64 blocks = most(ceil_div(a.outer, 32), least(4, a.outer / 8)), limit = most(1, (i64(1) << 20) / params);
  const i64 tasks = least(least(blocks, 32), limit), per = ceil_div(a.outer, tasks);
  // Long rows go one by one, and so do those of which four would meet at the same places of a page, in the first-level
  // cache and where loads wait for stores to what looks like the same address.
  const bool by_four = a.groups == 1 && n <= 1024 && n * i64(sizeof(T)) % 2048 != 0;
  const i64 height = by_four ? 128 : 64;  // rows summed in A
  const Along<A> w = along<T>(memory, a, param<A>(memory, a.weight, a.wtype, params, 1, a.offset, std::is_same_v<T, bfloat>));
  const bool joined = per > height;  // else a task's sums are those in A
  double *parts = memory.take<double>(joined ? tasks * 2 * params : 0);
  A *sums = memory.take<A>(tasks * 2 * params);
  if (memory.failed) return false;
  parallel(a, tasks, [&](i64 task) {
    double *part = parts + (joined ? task * 2 * params : 0);
    A *dw = sums + task * 2 * params, *db = dw + params;
    memset(dw, 0, sizeof(A) * size_t(2 * params));
    if (joined) memset(part, 0, sizeof(double) * size_t(2 * params));
    const i64 end = least(a.outer, (task + 1) * per);
    for (i64 first = task * per; first < end; first += height) {
      const i64 last = least(end, first + height);
      if (a.groups == 1) {
        i64 row = first;
        if (by_four)
          for (; row + 4 <= last; row += 4) backward_rows<T, center, 4>(a, w, row, n, dw, db);
        for (; row < last; ++row) backward_rows<T, center, 1>(a, w, row, n, dw, db);
      } else {
        for (i64 o = first; o < last; ++o)
          for (i64 g = 0; g < a.groups; ++g)
            backward_rows<T, center, 1>(a, w + g * n, o * a.groups + g, n, dw + g * n, db + g * n);
      }
      if (!joined) continue;
      for (i64 i = 0; i < 2 * params; ++i) part[i] += dw[i], dw[i] = 0;
    }
    for (i64 g = 0; g < 2 * a.groups; ++g) joined ? reorder<T>(part + g * n, n, false) : reorder<T>(dw + g * n, n, false);
    if (a.stream) fence();
  });
  const auto finish = [&](const auto *sums) {
    reduce(a, sums, sums + params, tasks, params, 2 * params);
  };
  joined ? finish(parts) : finish(sums);
  return true;
}

// Weights constant along runs: the sums of each run give the row's sums and the parameters' gradients.
template <class T, bool center> bool rows_backward_runs(const Args &a) {
  using A = Acc<T>;
  Scratch memory;
  const i64 rows = a.outer * a.groups, n = a.channels * a.inner, params = a.groups * a.channels;
  const A *weight = param<A>(memory, a.weight, a.wtype, params, 1, a.offset, std::is_same_v<T, bfloat>);
  double *sums = memory.take<double>(2 * a.outer * params);
  if (memory.failed) return false;
  double *dws = sums, *dbs = sums + a.outer * params;
  const i64 block = most(1, 4 * kChunk / n);
  parallel(a, ceil_div(rows, block), [&](i64 task) {
    for (i64 row = task * block; row < least(rows, (task + 1) * block); ++row) {
      const T *x = (const T *)a.x + row * n, *dy = (const T *)a.dy + row * n;
      const A *w = weight + row % a.groups * a.channels;
      const Moments<A> m = saved<A>(a, row);
      double c1 = 0, c2 = 0;
      for (i64 k = 0; k < a.channels; ++k) {
        double s = 0, q = 0;
        project<T, center, false>(x + k * a.inner, dy + k * a.inner, {}, a.inner, m, s, q);
        dbs[row * a.channels + k] = s, dws[row * a.channels + k] = q;
        c1 += s * double(get(w + k)), c2 += q * double(get(w + k));
      }
      if (!a.y) continue;
      const A mean_g = center ? A(c1 / double(n)) : 0, mean_gx = A(c2 / double(n));
      for (i64 k = 0; k < a.channels; ++k) {
        const T *xk = x + k * a.inner, *dyk = dy + k * a.inner;
        const A wk = get(w + k);
        map((T *)a.y + row * n + k * a.inner, a.inner, a.stream, [=](auto tag, i64 i) {
          auto v = tag.at(xk + i);
          if constexpr (center) v = m(v);
          else v = v * m.rstd;
          return (tag.at(dyk + i) * wk - (v * mean_gx + mean_g)) * m.rstd;
        });
      }
    }
    if (a.stream) fence();
  });
  reduce(a, dws, dbs, a.outer, params, params);
  return true;
}

template <class T> bool rows_backward(Args a) {
  join_bare(a);
  if (a.inner == 1) return a.center ? rows_backward_flat<T, true>(a) : rows_backward_flat<T, false>(a);
  return a.center ? rows_backward_runs<T, true>(a) : rows_backward_runs<T, false>(a);
}

}  // namespace
}  // namespace normkit
