// Mean and spread of a set, accumulated in vectors of the accumulation type and merged in double; the exact path for extremes.
#pragma once
#include <cmath>
#include <cstdlib>
#include <type_traits>

#include "kernels.h"
#include "vec.h"

namespace normkit {
namespace {

constexpr i64 kChunk = kBytes < 32 ? 2048 : 4096;  // elements summed in vectors before they are merged in double

inline i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }
inline i64 least(i64 a, i64 b) { return a < b ? a : b; }
inline i64 most(i64 a, i64 b) { return a > b ? a : b; }

// The task that is begun as the i-th of n: not next to the one before it, where another thread is at work. Threads that write, and
// fetch ahead of themselves, side by side in memory take lines from each other.
inline i64 apart(i64 i, i64 n) {
  const i64 parts = most(1, least(8, n / 2)), part = i % parts;
  return part * (n / parts) + least(part, n % parts) + i / parts;
}

template <class F> inline void parallel(const Args &a, i64 tasks, const F &task) {
  if (tasks <= 0) return;
  const auto all = [&](i64 i) { task(apart(i, tasks)); };
  using All = decltype(all);
  a.parallel(tasks, [](void *f, int64_t i) { (*static_cast<const All *>(f))(i); }, const_cast<void *>(static_cast<const void *>(&all)));
}

// Memory for one call.
class Scratch {
 public:
  ~Scratch() {
    for (int k = 0; k < count_; ++k) free(blocks_[k]);
  }
  template <class X> X *take(i64 n) {
    void *p = count_ < 24 ? aligned_alloc(64, size_t(ceil_div(n * i64(sizeof(X)) + 1, 64) * 64)) : nullptr;
    if (p) blocks_[count_++] = p;
    else failed = true;
    return static_cast<X *>(p);
  }
  bool failed = false;

 private:
  void *blocks_[24];
  int count_ = 0;
};

// f(a value of that type): what is done for many elements asks once.
template <class F> inline auto with_type(int type, const F &f) {
  switch (type) {
    case F32: return f(float{});
    case F64: return f(double{});
    case F16: return f(half{});
    default: return f(bfloat{});
  }
}
inline double get_any(const void *p, int type, i64 i) {
  return with_type(type, [=](auto t) { return double(get((const decltype(t) *)p + i)); });
}
// Writes n numbers to p[first] and what follows.
inline void put_all(void *p, int type, i64 first, const double *values, i64 n) {
  with_type(type, [=](auto t) {
    using T = decltype(t);
    for (i64 i = 0; i < n; ++i) put((T *)p + first + i, Acc<T>(values[i]));
  });
}
inline void put_any(void *p, int type, i64 i, double value) { put_all(p, type, i, &value, 1); }

// A parameter in the accumulation type: where it stands if it has that type already, else converted into scratch memory.
// `clean` replaces NaNs, whose bits may be anything, by the standard one.
template <class A>
const A *param(Scratch &memory, const void *p, int type, i64 n, double otherwise, double offset, bool clean) {
  if (p && offset == 0 && type == (sizeof(A) == 8 ? F64 : F32) && !clean) return static_cast<const A *>(p);
  A *copy = memory.take<A>(n);
  if (!copy) return nullptr;
  if (!p) {
    for (i64 i = 0; i < n; ++i) copy[i] = A(otherwise);
    return copy;
  }
  with_type(type, [=](auto t) {
    for (i64 i = 0; i < n; ++i) {
      const A value = A(get((const decltype(t) *)p + i)) + A(offset);
      copy[i] = value == value ? value : A(__builtin_nan(""));
    }
  });
  return copy;
}

// n values with this mean (relative to a pivot that the user of the struct knows) and sum of squares about it.
struct Spread {
  double n = 0, mean = 0, m2 = 0;
  void merge(double count, double other_mean, double other_m2) {
    if (n == 0) {
      n = count, mean = other_mean, m2 = other_m2;
      return;
    }
    const double total = n + count, delta = other_mean - mean;
    m2 += other_m2 + delta * delta * (n * count / total);
    mean += delta * (count / total);
    n = total;
  }
  void merge(const Spread &other) {
    if (other.n) merge(other.n, other.mean, other.m2);
  }
};

// Whether sums of d and d² about a pivot give the spread without cancellation; if not, they are taken again about the mean.
// `share` is the part of the mean square about the pivot that may be the pivot's distance from the mean.
template <class D> inline auto near(double n, D s, D q, double share = 0.25) {
  const D most = share * n * q;
  return (s * s <= most) & (most < D{} + __builtin_inf());
}
inline double centred(double n, double s, double q) {
  const double m2 = q - s * s / n;
  return m2 < 0 ? 0 : m2;
}

// A value near the mean of a run, and exactly its value where the run is constant.
template <class T> inline Acc<T> pivot_of(const T *x, i64 n) {
  using A = Acc<T>;
  constexpr int W = kLanes<A>;
  const A first = get(x);
  if (n < W) return first;
  const i64 k = least(n / W, 4);
  Vec<A> s{};
  for (i64 i = 0; i < k; ++i) s += load(x + i * W) - first;
  return first + sum(s) / A(k * W);
}

// Adds the sums of d = x - pivot and d² over a run to the lanes of s and q. At most 4 squares are added to one another before
// they meet a larger sum: where d has few bits, those of d² are no coin toss (squares end in 0, 1 or 4 modulo 8), and their
// roundings against a sum of a hundred would all lean the same way; so would those against a square that is larger than all
// others together, and s and q are Long where more than two or three such sums meet. What is read next is so many elements
// `ahead`, if any.
template <class T, bool center, class S>
__attribute__((always_inline)) inline void add_run(const T *x, i64 n, Acc<T> pivot, S &s, S &q, i64 ahead = 0) {
  using A = Acc<T>;
  using V = Vec<A>;
  constexpr int W = kLanes<A>;
  const V p = splat(pivot), one = ones<A>();
  const auto at = [&](i64 i) { return center ? load(x + i) - p : load(x + i); };
  const auto pair_at = [&](i64 i) { return center ? load_pair(x + i) - pivot : load_pair(x + i); };
  i64 i = 0;
  do {
    const i64 end = least(n, i + 16 * W);
    V s0{}, s1{}, s2{}, s3{}, q0{}, q1{}, q2{}, q3{};
    for (; i + 4 * W <= end; i += 4 * W) {
      if (ahead) fetch<4 * W>(x + ahead + i);
      const auto [a, b] = pair_at(i);
      const auto [c, d] = pair_at(i + 2 * W);
      if (center) s0 += a * one, s1 += b * one, s2 += c * one, s3 += d * one;
      q0 += a * a, q1 += b * b, q2 += c * c, q3 += d * d;
    }
    for (; i + W <= end; i += W) {
      const V a = at(i);
      s0 += a, q0 += a * a;
    }
    s0 = (s0 + s1) + (s2 + s3), q0 = (q0 + q1) + (q2 + q3);
    if (i < n && n - i < W) {
      V a{};
      if (n >= W) {
        a = last_lanes<A>(at(n - W), n - i);
      } else {
        for (int k = 0; k < n; ++k) a[k] = get(x + k) - (center ? pivot : A(0));
      }
      s0 += a, q0 += a * a, i = n;
    }
    s += s0, q += q0;
  } while (i < n);
}

// What a set is normalized by: ((x - mean) - residue) * rstd. The mean is taken off first, which is exact where it matters;
// the residue, half a unit of the mean at most, may then go into the sum: (x - mean) * rstd + drift. The mean may not.
template <class A> struct Moments {
  A mean, residue, var, rstd, drift;
  double root;  // rstd before it was rounded
  bool exact;   // the squares left the range of A: see Exact

  A scale(double weight) const { return A(root * weight); }
  A shift(double weight, double bias) const { return A(bias - double(residue) * root * weight); }
  template <class V> auto operator()(V x) const { return (x - mean) * rstd + drift; }
};

// The variances for which sums of squares in A have neither overflowed nor lost what eps does not hide.
template <class A> struct Range {
  double smallest, large;  // from the first on, below the second
  static Range bounds(double eps) {
    constexpr bool wide = sizeof(A) == 8;
    constexpr double small = wide ? 0x1p-900 : 0x1p-80, bare = wide ? 0x1p-936 : 0x1p-76;
    return {eps < bare ? small : 0, wide ? 0x1p900 : 0x1p96};
  }
  bool holds(double var) const { return (var >= smallest) & (var < large); }
};

template <class A> inline Moments<A> finish(const Spread &spread, A pivot, double eps) {
  const double var = spread.m2 / spread.n, sum = var + eps;
  Moments<A> m;
  m.mean = A(pivot + spread.mean);
  m.residue = A((double(pivot) - double(m.mean)) + spread.mean);
  m.var = A(var);
  m.root = 1 / sqrt(eps == 0 && !(sum > 0) ? 1 : sum);
  m.rstd = A(m.root);
  m.drift = A(-double(m.residue) * m.root);
  m.exact = !Range<A>::bounds(eps).holds(var);
  return m;
}

// A set that is no single run: `runs` pieces of `length` elements, `stride` apart.
template <class T> struct Set {
  T *data;
  i64 runs, stride, length;
  template <class F> void each(const F &f) const {
    for (i64 r = 0; r < runs; ++r)
      for (i64 i = 0; i < length; ++i) f(data + r * stride + i, i);
  }
};

// A sum that keeps what its roundings took.
struct Compensated {
  double sum = 0, lost = 0;
  void add(double value) {
    const double whole = value - lost, next = sum + whole;
    lost = (next - sum) - whole;
    sum = next;
  }
};

// The moments where squares overflow or vanish: in double, and for double scaled by a power of two.
struct Exact {
  double scale = 1, mean = 0, residue = 0, rscale = 1;

  template <class T, class A> Exact(const Set<const T> &set, double eps, bool center, Moments<A> &m) {
    const double n = double(set.runs) * double(set.length);
    if (sizeof(A) == 8) {
      double peak = 0;
      set.each([&](const T *x, i64) {
        const double size = fabs(double(get(x)));
        if (size > peak) peak = size;
      });
      if (peak > 0x1p450) scale = 0x1p-600;
      else if (peak < 0x1p-400 && eps < 0x1p-936) scale = 0x1p500;
    }
    const auto average = [&](const auto &f) {
      Compensated all;
      set.each([&](const T *x, i64) { all.add(f(get(x) * scale)); });
      return all.sum / n;
    };
    if (center) {
      const double first = get(set.data) * scale;
      mean = first + average([=](double x) { return x - first; });
      residue = average([this](double x) { return x - mean; });
    }
    const double var = average([this](double x) {
      const double d = (x - mean) - residue;
      return d * d;
    });
    const double spread = var + eps * scale * scale;
    rscale = 1 / sqrt(eps == 0 && !(spread > 0) ? 1 : spread);
    m.mean = A(mean / scale);
    m.residue = A((mean / scale - double(m.mean)) + residue / scale);
    // As in the core: variance and reciprocal root are given as finite, n / (n - 1) times them too.
    const double most = sizeof(A) == 8 ? 0x1p1022 : 0x1p126, limit = most * scale * scale;
    m.var = A((var > limit ? limit : var) / scale / scale);
    m.rstd = A(spread == 0 ? 1 : rscale * scale > most ? most : rscale * scale);
  }
  template <class T> double operator()(const T *x) const { return ((get(x) * scale - mean) - residue) * rscale; }
};

template <class A> inline void save(const Args &a, i64 set, const Moments<A> &m) {
  if (a.mean) put((A *)a.mean + set, m.mean);
  if (a.residue) put((A *)a.residue + set, m.residue);
  if (a.var) put((A *)a.var + set, m.var);
  if (a.rstd) put((A *)a.rstd + set, m.rstd);
}
template <class A> inline Moments<A> saved(const Args &a, i64 set) {
  Moments<A> m{};
  if (a.mean) m.mean = get((const A *)a.mean + set);
  if (a.residue) m.residue = get((const A *)a.residue + set);
  m.rstd = get((const A *)a.rstd + set);
  m.root = double(m.rstd);
  m.drift = A(-double(m.residue) * m.root);
  return m;
}

}  // namespace
}  // namespace normkit
