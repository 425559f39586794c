// Every statistic over one contiguous row: layer and RMS norm, group and instance norm channels first.
#pragma once
#include "moments.h"

namespace normkit {
namespace {

template <class T, bool center> inline Moments<Acc<T>> row_moments(const T *x, i64 n, double eps, i64 ahead) {
  using A = Acc<T>;
  const A pivot = center ? pivot_of(x, n) : A(0);
  Spread spread;
  for (i64 i = 0; i < n; i += kChunk) {
    const i64 k = least(kChunk, n - i);
    Long<A> vs, vq;
    add_run<T, center>(x + i, k, pivot, vs, vq, ahead);
    double s = sum(vs), q = sum(vq);
    if (!center) {
      spread.n += double(k), spread.m2 += q;
    } else if (near(double(k), s, q)) {
      spread.merge(double(k), s / double(k), centred(double(k), s, q));
    } else {
      const A again = A(double(pivot) + s / double(k));
      vs = vq = {};
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

}  // namespace
}  // namespace normkit
