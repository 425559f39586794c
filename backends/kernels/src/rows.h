// Every statistic over one contiguous row: layer and RMS norm, group and instance norm channels first.
#pragma once
#include "moments.h"

namespace normkit {
namespace {

template <class T, bool center> inline Moments<Acc<T>> row_moments(const T *x, i64 n, double eps, i64 ahead) {
  using A = Acc<T>;
  using V = Vec<A>;
  const A pivot = center ? pivot_of(x, n) : A(0);
  Spread spread;
  for (i64 i = 0; i < n; i += kChunk) {
    const i64 k = least(kChunk, n - i);
    V vs{}, vq{};
    add_run<T, center>(x + i, k, pivot, vs, vq, ahead);
    double s = sum(vs), q = sum(vq);
    if (!center) {
      spread.n += double(k), spread.m2 += q;
    } else if (near(double(k), s, q)) {
      spread.merge(double(k), s / double(k), centred(double(k), s, q));
    } else {
      const A again = A(double(pivot) + s / double(k));
      vs = vq = V{};
      add_run<T, center>(x + i, k, again, vs, vq);
      s = sum(vs), q = sum(vq);
      spread.merge(double(k), (double(again) - double(pivot)) + s / double(k), centred(double(k), s, q));
    }
  }
  return finish<A>(spread, pivot, eps);
}

// Parameters that lie along the rows, or as they are where each is for a run of them.
template <class T> inline Along<Acc<T>> along(Scratch &memory, const Args &a, const Acc<T> *plain) {
  if (!kOddAndEven<T> || a.inner > 1 || !plain) return {plain, plain};
  auto *paired = memory.take<Acc<T>>(a.groups * a.channels);
  if (!paired) return {plain, plain};
  memcpy(paired, plain, sizeof(Acc<T>) * size_t(a.groups * a.channels));
  for (i64 g = 0; g < a.groups; ++g) reorder<T>(paired + g * a.channels, a.channels, true);
  return {plain, paired};
}

// How far it is to the next row, which is fetched while this one is summed, and the one after it while this one is written: not
// if they are too long for the caches, and not if all rows are short enough for them.
template <class T> inline i64 row_ahead(const Args &a, i64 n) {
  return n * i64(sizeof(T)) <= 65536 && a.size() * i64(sizeof(T)) > 1 << 20 ? n : 0;
}

template <class T, bool center>
inline void forward_row(const Args &a, Along<Acc<T>> weight, Along<Acc<T>> bias, i64 row) {
  using A = Acc<T>;
  const i64 n = a.channels * a.inner, first = row % a.groups * a.channels, ahead = row_ahead<T>(a, n);
  const T *x = (const T *)a.x + row * n;
  T *y = (T *)a.y + row * n;
  const Along<A> w = weight + first, b = bias + first;
  Moments<A> m = row_moments<T, center>(x, n, a.eps, a.inner == 1 ? ahead : 0);
  if (m.exact) {
    const Exact exact(Set<const T>{x, 1, 0, n}, a.eps, center, m);
    for (i64 i = 0; i < n; ++i) put(y + i, A(exact(x + i) * get(w.plain + i / a.inner) + get(b.plain + i / a.inner)));
  } else if (a.inner == 1) {
    map(y, n, a.stream, [=](auto tag, i64 i) {
      if (ahead) tag.fetch(x + 2 * ahead + i);
      if constexpr (center) return m(tag.at(x + i)) * tag.at(w + i) + tag.at(b + i);
      else return tag.at(x + i) * m.rstd * tag.at(w + i) + tag.at(b + i);
    });
  } else {
    for (i64 k = 0; k < a.channels; ++k) {
      const A scale = m.scale(get(w.plain + k)), shift = m.shift(get(w.plain + k), get(b.plain + k));
      const T *xk = x + k * a.inner;
      map(y + k * a.inner, a.inner, a.stream, [=](auto tag, i64 i) {
        if constexpr (center) return (tag.at(xk + i) - m.mean) * scale + shift;
        else return tag.at(xk + i) * scale + shift;
      });
    }
  }
  save(a, row, m);
}

// R short rows at once, weights along the row: what waits for a sum, a root or a quotient waits for those of all rows together,
// and weights are loaded once for four rows. N is their length where it is known by now: loops of a few steps then are none.
template <class T, bool center, int R, int N = 0>
inline void forward_block(const Args &a, Along<Acc<T>> w, Along<Acc<T>> b, i64 row) {
  using A = Acc<T>;
  using V = Vec<A>;
  constexpr int W = kLanes<A>;
  const i64 n = N ? N : a.channels, ahead = R * row_ahead<T>(a, n);
  const double count = double(n), share = 1 / count;
  const T *x = (const T *)a.x + row * n;
  T *y = (T *)a.y + row * n;
  A pivot[R] = {};
  double s[R], q[R];
  V vs[4], vq[4];
  for (int first = 0; center && first < R; first += 4) {
    const i64 k = n / W < 4 ? 1 : 4;
    for (int r = 0; r < 4; ++r) {
      const T *p = x + (first + r) * n;
      const A start = get(p);
      V v = load(p) - start;
      if (k == 4) v += (load(p + W) - start) + ((load(p + 2 * W) - start) + (load(p + 3 * W) - start));
      vs[r] = v;
    }
    sums(vs, s + first);
    for (int r = first; r < first + 4; ++r) pivot[r] = get(x + r * n) + A(s[r]) * (1 / A(k * W));
  }
  for (int first = 0; first < R; first += 4) {
    for (int r = 0; r < 4; ++r) {
      V sum{}, squares{};
      add_run<T, center>(x + (first + r) * n, n, pivot[first + r], sum, squares, ahead);
      vs[r] = sum, vq[r] = squares;
    }
    sums(vs, s + first), sums(vq, q + first);
  }
  const auto range = Range<A>::bounds(a.eps);
  A mean[R], residue[R], var[R], rstd[R], drift[R];
  bool plain[R], all = true;
  for (int r = 0; r < R; r += 4) {
    const Four<double> sum = load_four(s + r), squares = load_four(q + r), from = four<double>(load_four(pivot + r));
    const Four<double> none{}, m = center ? sum * share : none, v = (center ? squares - sum * m : squares) * share;
    const Four<double> variance = v < 0 ? none : v, root = 1 / root_of(variance + a.eps);
    const Four<A> rounded = four<A>(from + m), rest = four<A>((from - four<double>(rounded)) + m);
    store_four(mean + r, rounded), store_four(residue + r, rest), store_four(var + r, four<A>(variance));
    store_four(rstd + r, four<A>(root)), store_four(drift + r, four<A>(-four<double>(rest) * root));
    const auto good = (variance >= range.smallest) & (variance < range.large) & (center ? near(count, sum, squares) : variance == variance);
    for (int k = 0; k < 4; ++k) all &= plain[r + k] = good[k];
  }
  const auto keep = [&](void *out, const A *values) {
    if (out) memcpy((A *)out + row, values, sizeof(A) * R);
  };
  keep(a.mean, mean), keep(a.residue, residue), keep(a.var, var), keep(a.rstd, rstd);
  const auto at = [&](int r, V v, V wi, V bi) {
    if constexpr (center) return ((v - mean[r]) * rstd[r] + drift[r]) * wi + bi;
    else return v * rstd[r] * wi + bi;
  };
  const auto rows = [&](i64 i, int first, int end, auto past) {
    const auto [w1, w2] = Two<T>::at(w + i);
    const auto [b1, b2] = Two<T>::at(b + i);
    for (int r = first; r < end; ++r) {
      const auto [x1, x2] = load_pair(x + r * n + i);
      store_pair<decltype(past)::value>(y + r * n + i, {at(r, x1, w1, b1), at(r, x2, w2, b2)});
    }
  };
  const i64 pairs = n / (2 * W) * (2 * W);
  const auto by_row = [&](auto past) {
    for (int r = 0; r < R; ++r)
      for (i64 i = 0; i < pairs; i += 2 * W) {
        fetch<2 * W>(x + 2 * ahead + r * n + i);
        rows(i, r, r + 1, past);
      }
  };
  // What waits for memory goes row by row: lines that are a page apart, by turns, take twice as long to write past the caches.
  // What waits for the processor shares weights among four rows.
  const bool streamed = a.stream && n % (kBytes / i64(sizeof(T))) == 0 && uintptr_t(y) % kBytes == 0;
  if (ahead) streamed ? by_row(std::true_type{}) : by_row(std::false_type{});
  for (int first = 0; first < R; first += 4) {
    i64 i = ahead ? pairs : 0;
    for (; i < pairs; i += 2 * W) rows(i, first, first + 4, std::false_type{});
    for (; i < n; i += W) {
      const i64 k = least(i, n - W);
      for (int r = first; r < first + 4; ++r)
        store(y + r * n + k, at(r, load(x + r * n + k), load(w.plain + k), load(b.plain + k)));
    }
  }
  if (all) return;
  // Rows far from their pivot, or out of range, once more by themselves: what the others get does not depend on them.
  if (a.stream) fence();
  for (int r = 0; r < R; ++r)
    if (!plain[r]) forward_row<T, center>(a, w, b, row + r);
}

template <class T, bool center>
inline void forward_rows(const Args &a, Along<Acc<T>> w, Along<Acc<T>> b, i64 row, i64 end) {
  const i64 n = a.channels;
  if (a.inner == 1 && a.groups == 1 && n >= kLanes<Acc<T>> && n <= 1024) {
    // As many rows as the first-level cache has room for.
    for (; n == 64 && row + 16 <= end; row += 16) forward_block<T, center, 16, 64>(a, w, b, row);
    for (; n == 128 && row + 16 <= end; row += 16) forward_block<T, center, 16, 128>(a, w, b, row);
    for (; n <= 256 && row + 16 <= end; row += 16) forward_block<T, center, 16>(a, w, b, row);
    for (; row + 4 <= end; row += 4) forward_block<T, center, 4>(a, w, b, row);
  }
  for (; row < end; ++row) forward_row<T, center>(a, w, b, row);
}

// Very long rows without parameters are runs of one channel, so that no memory is taken for as many ones and zeros.
inline void join_bare(Args &a) {
  if (a.weight || a.bias || a.dweight || a.dbias || a.channels * a.inner < i64(1) << 20) return;
  a.outer *= a.groups, a.inner *= a.channels, a.groups = a.channels = 1;
}

template <class T> bool rows_forward(Args a) {
  using A = Acc<T>;
  join_bare(a);
  Scratch memory;
  const i64 rows = a.outer * a.groups, n = a.channels * a.inner, params = a.groups * a.channels;
  const Along<A> w = along<T>(memory, a, param<A>(memory, a.weight, a.wtype, params, 1, a.offset, std::is_same_v<T, bfloat>));
  const Along<A> b = along<T>(memory, a, param<A>(memory, a.bias, a.btype, params, 0, 0, std::is_same_v<T, bfloat>));
  if (memory.failed) return false;
  const i64 block = (ceil_div(4 * kChunk, n) + 3) & ~i64(3);
  parallel(a, ceil_div(rows, block), [&](i64 task) {
    const i64 row = task * block, end = least(rows, row + block);
    a.center ? forward_rows<T, true>(a, w, b, row, end) : forward_rows<T, false>(a, w, b, row, end);
    if (a.stream) fence();
  });
  return true;
}

// Adds the sums of u and u·v over a run to the lanes of s and q: u = dy (times weight), v the standardized x. `ahead` as in
// add_run.
template <class T, bool center, bool weighted>
inline void project(const T *x, const T *dy, Along<Acc<T>> w, i64 n, const Moments<Acc<T>> &m, Vec<Acc<T>> &s, Vec<Acc<T>> &q,
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
  while (i + W <= n) {
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
    s += s0 + s1, q += q0 + q1;
  }
  if (i == n) return;
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
  s += u, q += u * v;
}

// The same over a run of any length, in double.
template <class T, bool center, bool weighted>
inline void project(const T *x, const T *dy, Along<Acc<T>> w, i64 n, const Moments<Acc<T>> &m, double &s, double &q, i64 ahead = 0) {
  using V = Vec<Acc<T>>;
  for (i64 i = 0; i < n; i += kChunk) {
    V vs{}, vq{};
    project<T, center, weighted>(x + i, dy + i, weighted ? w + i : w, least(kChunk, n - i), m, vs, vq, ahead);
    s += sum(vs), q += sum(vq);
  }
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

// The sum over partial sums, in their order: out[i] = sum over t of parts[t][i].
template <class X> inline void reduce(const Args &a, void *out, int type, const X *parts, i64 count, i64 n, i64 stride) {
  if (!out) return;
  constexpr i64 kBlock = 512;
  parallel(a, ceil_div(n, kBlock), [&](i64 task) {
    double total[kBlock] = {};
    const i64 first = task * kBlock, size = least(kBlock, n - first);
    for (i64 t = 0; t < count; ++t)
      for (i64 i = 0; i < size; ++i) total[i] += parts[t * stride + first + i];
    put_all(out, type, first, total, size);
  });
}

template <class T, bool center> bool rows_backward_flat(const Args &a) {
  using A = Acc<T>;
  Scratch memory;
  const i64 n = a.channels, params = a.groups * n;
  // The split is by shape alone, so that sums do not depend on the number of threads.
  const i64 blocks = ceil_div(a.outer, 32), limit = most(1, (i64(1) << 20) / params);
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
    reduce(a, a.dweight, a.wtype, sums, tasks, params, 2 * params);
    reduce(a, a.dbias, a.btype, sums + params, tasks, params, 2 * params);
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
  reduce(a, a.dweight, a.wtype, dws, a.outer, params, params);
  reduce(a, a.dbias, a.btype, dbs, a.outer, params, params);
  return true;
}

template <class T> bool rows_backward(Args a) {
  join_bare(a);
  if (a.inner == 1) return a.center ? rows_backward_flat<T, true>(a) : rows_backward_flat<T, false>(a);
  return a.center ? rows_backward_runs<T, true>(a) : rows_backward_runs<T, false>(a);
}

}  // namespace
}  // namespace normkit
