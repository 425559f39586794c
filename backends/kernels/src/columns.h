// Statistics down the columns of x[outer][inner][groups][channels]: batch, group and instance norm channels last.
#pragma once
#include "channels.h"

namespace normkit {
namespace {

// Rows of few channels are joined into wide ones: `fold` rows of `channels` are one row of `width`, whose columns are merged at
// the end. `slots` is the width rounded up to whole vectors; the last vector is moved back to end with the row, so that
// its first lanes repeat columns of the one before (`column` tells which column a slot holds, `fresh` whether it is its first).
template <class T> struct Columns {
  using A = Acc<T>;
  using V = Vec<A>;
  static constexpr int W = kLanes<A>;
  static constexpr i64 kRows = 256;     // rows summed in A
  static constexpr i64 kMerged = 1024;  // rows summed in double about one pivot

  const Args &a;
  i64 channels, fold, width, vectors, slots, rows, block, blocks;
  i64 rest;          // rows that do not fill a wide row
  i64 from = 0, to;  // the vectors of a row that a task takes

  explicit Columns(const Args &a) : a(a), channels(a.groups * a.channels) {
    fold = channels >= 64 || a.inner < 2 ? 1 : most(1, least(64 / channels, a.inner));
    width = channels * fold;
    vectors = to = width < W ? 0 : ceil_div(width, W), slots = vectors * W;
    rows = width < W ? 0 : a.inner / fold;
    rest = width < W ? a.inner : a.inner % fold;
    // By shape alone, so that sums do not depend on the number of threads.
    const i64 most_blocks = a.outer >= 16 ? 1 : most(1, (i64(1) << 20) / (a.outer * most(1, slots)));
    block = most(kRows, ceil_div(rows, least(most_blocks, 64)));
    block = ceil_div(block, kRows) * kRows;
    blocks = most(1, ceil_div(rows, block));
  }

  i64 at(i64 vector) const { return vector + 1 < vectors ? vector * W : width - W; }
  i64 column(i64 slot) const { return at(slot / W) + slot % W; }
  bool fresh(i64 slot) const { return column(slot) == slot || column(slot) >= (vectors - 1) * W; }
  template <class X> X *row(X *base, i64 o, i64 r) const { return base + (o * a.inner) * channels + r * width; }
  const T *x(i64 o, i64 r) const { return row((const T *)a.x, o, r); }
  const T *dy(i64 o, i64 r) const { return row((const T *)a.dy, o, r); }
  T *y(i64 o, i64 r) const { return row((T *)a.y, o, r); }

  // f(sample, block, first row, end); the last block of a sample is the one that has the rest.
  template <class F> void share(bool backwards, const F &f) const {
    const i64 tasks = a.outer * blocks;
    parallel(a, tasks, [&](i64 task) {
      const i64 t = backwards ? tasks - 1 - task : task;
      f(t / blocks, t % blocks, t % blocks * block, least(rows, (t % blocks + 1) * block));
    });
  }

  // For each channel its slots in a table over `slots`, or the same value for all rows of a wide row.
  void spread_out(const A *of_channel, A *table) const {
    for (i64 s = 0; s < slots; ++s) table[s] = of_channel[column(s) % channels];
  }
  // Adds what each slot holds, in double, to its channel.
  void collect(const double *table, double *of_channel) const {
    for (i64 s = 0; s < slots; ++s)
      if (fresh(s)) of_channel[column(s) % channels] += table[s];
  }
};

// Memory for one block of rows.
template <class A> struct ColumnWork {
  A *pivot, *s, *q;
  double *ds, *dq;

  static i64 size(i64 slots) { return slots * i64(3 * sizeof(A) + 2 * sizeof(double)); }
  ColumnWork(char *p, i64 slots) {
    ds = reinterpret_cast<double *>(p), dq = ds + slots;
    pivot = reinterpret_cast<A *>(dq + slots), s = pivot + slots, q = s + slots;
  }
};

// Sums about the pivots of d and d² for rows [r, end), all slots: in A over kRows rows, those added up in double.
template <class T>
inline void column_sums(const Columns<T> &job, i64 o, i64 r, i64 end, const Acc<T> *pivot, Acc<T> *s, Acc<T> *q, double *ds,
                        double *dq) {
  using A = Acc<T>;
  using V = Vec<A>;
  constexpr int W = kLanes<A>;
  const auto add = [&](auto count) {
    constexpr int n = decltype(count)::value;
    const T *x = job.x(o, r);
    for (i64 v = job.from; v < job.to; ++v) {
      const i64 column = job.at(v);
      const V p = load(pivot + v * W);
      V vs{}, vq{};
      for (int k = 0; k < n; ++k) {
        const V d = load(x + k * job.width + column) - p;
        vs += d, vq += d * d;
      }
      store(s + v * W, load(s + v * W) + vs), store(q + v * W, load(q + v * W) + vq);
    }
  };
  const i64 first = job.from * W, slots = (job.to - job.from) * W;
  memset(ds + first, 0, sizeof(double) * size_t(slots));
  memset(dq + first, 0, sizeof(double) * size_t(slots));
  while (r < end) {
    const i64 last = least(end, r + Columns<T>::kRows);
    memset(s + first, 0, sizeof(A) * size_t(slots));
    memset(q + first, 0, sizeof(A) * size_t(slots));
    for (; r + 8 <= last; r += 8) add(std::integral_constant<int, 8>{});
    for (; r < last; ++r) add(std::integral_constant<int, 1>{});
    for (i64 k = first; k < first + slots; ++k) ds[k] += s[k], dq[k] += q[k];
  }
}

// The same for rows [r, end), kMerged at most, about pivots that are near the means: they are moved there if they are not.
template <class T>
inline void near_sums(const Columns<T> &job, i64 o, i64 r, i64 end, const ColumnWork<Acc<T>> &work) {
  using A = Acc<T>;
  const auto [pivot, s, q, ds, dq] = work;
  const i64 first = job.from * kLanes<A>, last = job.to * kLanes<A>;
  const double n = double(end - r);
  column_sums(job, o, r, end, pivot, s, q, ds, dq);
  bool good = true;
  for (i64 k = first; k < last; ++k) good &= near(n, ds[k], dq[k]);
  if (good) return;
  for (i64 k = first; k < last; ++k)
    if (!near(n, ds[k], dq[k])) pivot[k] = A(double(pivot[k]) + ds[k] / n);
  column_sums(job, o, r, end, pivot, s, q, ds, dq);
}

// Pivots for the columns: means over the first rows about the first.
template <class T> inline void column_pivots(const Columns<T> &job, i64 o, Acc<T> *pivot) {
  using A = Acc<T>;
  constexpr int W = kLanes<A>;
  const i64 n = least(job.rows, 32);
  for (i64 v = job.from; v < job.to; ++v) {
    const T *x = job.x(o, 0) + job.at(v);
    const Vec<A> first = load(x);
    Vec<A> sum{};
    for (i64 r = 1; r < n; ++r) sum += load(x + r * job.width) - first;
    store(pivot + v * W, first + sum / A(n));
  }
}

// The spread of each channel over rows [r, end) of a sample, about base[channel].
template <class T>
inline void column_spreads(const Columns<T> &job, i64 o, i64 r, i64 end, bool with_rest, const Acc<T> *base,
                           const ColumnWork<Acc<T>> &work, Spread *slot_spread, Spread *out) {
  using A = Acc<T>;
  const auto [pivot, s, q, ds, dq] = work;
  for (i64 c = 0; c < job.channels; ++c) out[c] = Spread{};
  if (job.rows) column_pivots(job, o, pivot);
  for (i64 k = 0; k < job.slots; ++k) slot_spread[k] = Spread{};
  for (; r < end; r += Columns<T>::kMerged) {
    const i64 last = least(end, r + Columns<T>::kMerged);
    const double n = double(last - r);
    near_sums(job, o, r, last, work);
    for (i64 k = 0; k < job.slots; ++k) {
      const double shift = double(pivot[k]) - double(base[job.column(k) % job.channels]);
      slot_spread[k].merge(n, shift + ds[k] / n, centred(n, ds[k], dq[k]));
    }
  }
  for (i64 k = 0; k < job.slots; ++k)
    if (job.fresh(k)) out[job.column(k) % job.channels].merge(slot_spread[k]);
  if (!with_rest) return;
  const T *x = job.x(o, job.rows);
  for (i64 i = 0; i < job.rest * job.channels; ++i) {
    const i64 c = i % job.channels;
    out[c].merge(1, double(get(x + i)) - double(base[c]), 0);
  }
}

// (x - mean) * scale + shift, for every slot or channel.
template <class A> struct AffineTable {
  A *mean, *scale, *shift;
};

template <class T>
inline void column_apply(const Columns<T> &job, i64 o, i64 r, i64 end, bool with_rest, const AffineTable<Acc<T>> &slot,
                         const AffineTable<Acc<T>> &channel) {
  using A = Acc<T>;
  constexpr int W = kLanes<A>;
  const auto rows = [&](auto count, auto streamed) {
    constexpr int n = decltype(count)::value;
    const T *x = job.x(o, r);
    T *y = job.y(o, r);
    i64 v = job.from;
    for (; v + 2 <= job.to && job.at(v + 1) == (v + 1) * W; v += 2) {
      const i64 c = v * W;
      const auto mean = load(slot.mean + c), scale = load(slot.scale + c), shift = load(slot.shift + c);
      const auto mean2 = load(slot.mean + c + W), scale2 = load(slot.scale + c + W), shift2 = load(slot.shift + c + W);
      for (int k = 0; k < n; ++k) {
        const T *p = x + k * job.width + c;
        store<decltype(streamed)::value>(y + k * job.width + c, (load(p) - mean) * scale + shift,
                                         (load(p + W) - mean2) * scale2 + shift2);
      }
    }
    for (; v < job.to; ++v) {
      const i64 c = job.at(v);
      const auto mean = load(slot.mean + v * W), scale = load(slot.scale + v * W), shift = load(slot.shift + v * W);
      for (int k = 0; k < n; ++k) store(y + k * job.width + c, (load(x + k * job.width + c) - mean) * scale + shift);
    }
  };
  if (job.a.stream) {
    for (; r + 4 <= end; r += 4) rows(std::integral_constant<int, 4>{}, std::true_type{});
  }
  for (; r + 4 <= end; r += 4) rows(std::integral_constant<int, 4>{}, std::false_type{});
  for (; r < end; ++r) rows(std::integral_constant<int, 1>{}, std::false_type{});
  if (with_rest) {
    const T *x = job.x(o, job.rows);
    T *y = job.y(o, job.rows);
    for (i64 i = 0; i < job.rest * job.channels; ++i) {
      const i64 c = i % job.channels;
      put(y + i, A((get(x + i) - channel.mean[c]) * channel.scale[c] + channel.shift[c]));
    }
  }
  if (job.a.stream) fence();
}

// Batch norm of few rows: threads share out the channels, and each stays with its own until they are written.
template <class T>
inline void few_rows(const Columns<T> &job, const Acc<T> *w, const Acc<T> *b, const ColumnWork<Acc<T>> &work,
                     const AffineTable<Acc<T>> &slot, bool *extreme) {
  using A = Acc<T>;
  constexpr int W = kLanes<A>;
  const Args &a = job.a;
  // Whole pairs of vectors, for streaming; the last task has what is left over, for the last vector overlaps the one before.
  const i64 per = most(16, ceil_div(job.vectors, 16) * 2), tasks = most(1, job.vectors / per);
  parallel(a, tasks, [&](i64 task) {
    Columns<T> part(job);
    part.from = task * per, part.to = task + 1 == tasks ? job.vectors : part.from + per;
    column_pivots(part, 0, work.pivot);
    near_sums(part, 0, 0, job.rows, work);
    const double n = double(job.rows);
    for (i64 k = part.from * W; k < part.to * W; ++k) {
      const Moments<A> m = finish<A>(Spread{n, work.ds[k] / n, centred(n, work.ds[k], work.dq[k])}, work.pivot[k], a.eps);
      const i64 c = job.column(k);
      slot.mean[k] = m.mean, slot.scale[k] = m.scale(get(w + c)), slot.shift[k] = m.shift(get(w + c), get(b + c));
      if (job.fresh(k)) extreme[c] = m.exact, save(a, c, m);
    }
    column_apply(part, 0, 0, job.rows, false, slot, slot);
  });
}

template <class T> bool columns_forward(const Args &a) {
  using A = Acc<T>;
  const Columns<T> job(a);
  const i64 C = job.channels, S = job.slots, samples = a.outer;
  const i64 tables = a.given() ? 1 : samples;  // given statistics are the same for every sample
  Scratch memory;
  const A *w = param<A>(memory, a.weight, a.wtype, C, 1, a.offset, std::is_same_v<T, bfloat>);
  const A *b = param<A>(memory, a.bias, a.btype, C, 0, 0, std::is_same_v<T, bfloat>);
  A *of_channel = memory.take<A>(tables * 3 * C), *of_slot = memory.take<A>(tables * 3 * S);
  A *base = memory.take<A>(samples * C);
  const i64 tasks = a.given() ? 0 : samples * job.blocks;
  const i64 work_size = ColumnWork<A>::size(S);
  char *work = memory.take<char>(tasks * work_size);
  Spread *spreads = memory.take<Spread>(tasks * C), *slot_spreads = memory.take<Spread>(tasks * S);
  bool *extreme = memory.take<bool>(samples * a.groups);
  if (memory.failed) return false;
  const auto table = [](A *p, i64 i, i64 n) { return AffineTable<A>{p + i * 3 * n, p + (i * 3 + 1) * n, p + (i * 3 + 2) * n}; };

  const auto set = [&](i64 o, i64 c, const Moments<A> &m) {
    const AffineTable<A> f = table(of_channel, o, C);
    f.mean[c] = m.mean, f.scale[c] = m.scale(get(w + c)), f.shift[c] = m.shift(get(w + c), get(b + c));
  };
  const auto finish_table = [&](i64 o) {
    const AffineTable<A> f = table(of_channel, o, C), g = table(of_slot, o, S);
    job.spread_out(f.mean, g.mean), job.spread_out(f.scale, g.scale), job.spread_out(f.shift, g.shift);
  };
  const auto settle = [&](i64 o) {
    for (i64 g = 0; g < a.groups; ++g) {
      Spread all;
      const A pivot = base[o * C + g * a.channels];
      for (i64 c = g * a.channels; c < (g + 1) * a.channels; ++c) {
        Spread channel;
        for (i64 k = 0; k < job.blocks; ++k) channel.merge(spreads[(o * job.blocks + k) * C + c]);
        channel.mean += double(base[o * C + c]) - double(pivot);
        all.merge(channel);
      }
      const Moments<A> m = finish<A>(all, pivot, a.eps);
      for (i64 c = g * a.channels; c < (g + 1) * a.channels; ++c) set(o, c, m);
      extreme[o * a.groups + g] = m.exact;
      save(a, o * a.groups + g, m);
    }
    finish_table(o);
  };
  const auto apply = [&](i64 o, i64 k, i64 r, i64 end) {
    const i64 t = a.given() ? 0 : o;
    column_apply(job, o, r, end, k + 1 == job.blocks, table(of_slot, t, S), table(of_channel, t, C));
  };

  if (a.given()) {
    for (i64 c = 0; c < C; ++c) set(0, c, given_moments<A>(a, c));
    finish_table(0);
    job.share(false, apply);
    return true;
  }
  const auto gather = [&](i64 o, i64 k, i64 r, i64 end) {
    const i64 t = o * job.blocks + k;
    column_spreads(job, o, r, end, k + 1 == job.blocks, base + o * C, ColumnWork<A>(work + t * work_size, S), slot_spreads + t * S, spreads + t * C);
  };
  const bool one_set_a_slot = samples == 1 && a.channels == 1 && job.fold == 1, few = job.rows && job.rows <= Columns<T>::kRows;
  if (!one_set_a_slot || !few)
    for (i64 o = 0; o < samples; ++o)
      for (i64 c = 0; c < C; ++c) base[o * C + c] = get((const T *)a.x + o * a.inner * C + c);
  if (one_set_a_slot && few) {
    few_rows(job, w, b, ColumnWork<A>(work, S), table(of_slot, 0, S), extreme);
  } else if (job.blocks == 1) {
    job.share(false, [&](i64 o, i64 k, i64 r, i64 end) {
      gather(o, k, r, end);
      settle(o);
      apply(o, k, r, end);
    });
  } else {
    job.share(false, gather);
    for (i64 o = 0; o < samples; ++o) settle(o);
    job.share(true, apply);
  }

  bool any = false;
  for (i64 i = 0; i < samples * a.groups; ++i) any = any || extreme[i];
  if (any)
    parallel(a, samples * a.groups, [&](i64 i) {
      if (!extreme[i]) return;
      const i64 first = i % a.groups * a.channels, start = i / a.groups * a.inner * C + first;
      Moments<A> m{};
      const Exact exact(Set<const T>{(const T *)a.x + start, a.inner, C, a.channels}, a.eps, true, m);
      for (i64 r = 0; r < a.inner; ++r)
        for (i64 k = 0; k < a.channels; ++k)
          put((T *)a.y + start + r * C + k,
              A(exact((const T *)a.x + start + r * C + k) * get(w + first + k) + get(b + first + k)));
      save(a, i, m);
    });
  return true;
}

}  // namespace
}  // namespace normkit
