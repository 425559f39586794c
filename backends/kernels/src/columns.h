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
  static constexpr i64 kRows = 256;  // of a block at least

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
  i64 channel(i64 slot) const { return fold == 1 ? column(slot) : column(slot) % channels; }
  // Whether each channel is a single column, and all rows are whole; then where it is.
  bool even() const { return fold == 1 && rest == 0 && rows; }
  i64 slot(i64 channel) const { return channel < (vectors - 1) * W ? channel : channel + slots - width; }
  // Whether each set is a single column.
  bool alone() const { return a.channels == 1 && fold == 1 && rows; }
  // Whether loads from several rows in turn hide from the processor what comes next in memory: where x may be out of the core's
  // own caches, and rows are shorter than a page.
  bool hidden() const { return a.size() * i64(sizeof(T)) >= (1 << 20) && width * i64(sizeof(T)) < 4096; }
  // Then what is behind n rows is fetched in the order of memory while they are read: how far behind the first it is.
  i64 ahead(i64 n) const { return n * width * i64(sizeof(T)) < 4096 ? 2 * n * width : n * width; }
  template <class X> X *row(X *base, i64 o, i64 r) const { return base + (o * a.inner) * channels + r * width; }
  const T *x(i64 o, i64 r) const { return row((const T *)a.x, o, r); }
  const T *dy(i64 o, i64 r) const { return row((const T *)a.dy, o, r); }
  T *y(i64 o, i64 r) const { return row((T *)a.y, o, r); }

  // write(count, streamed) with rows [r, end): four at a time, so that tables are loaded less often, or one by one.
  template <class F> void in_fours(i64 &r, i64 end, const F &write) const {
    const auto all = [&](auto streamed) {
      if (!hidden() || width * i64(sizeof(T)) < 512)
        for (; r + 4 <= end; r += 4) write(std::integral_constant<int, 4>{}, streamed);
      else
        for (; r < end; ++r) write(std::integral_constant<int, 1>{}, streamed);
    };
    if (a.stream) all(std::true_type{});
    else all(std::false_type{});
    for (; r < end; ++r) write(std::integral_constant<int, 1>{}, std::false_type{});
  }
  // f(sample, block, first row, end); the last block of a sample is the one that has the rest.
  template <class F> void share(bool backwards, const F &f) const {
    const i64 tasks = a.outer * blocks;
    parallel(a, tasks, [&](i64 task) {
      const i64 t = backwards ? tasks - 1 - task : task;
      f(t / blocks, t % blocks, t % blocks * block, least(rows, (t % blocks + 1) * block));
    });
  }

  // f(block, first row, end) for one sample.
  template <class F> void share_sample(const F &f) const {
    parallel(a, blocks, [&](i64 k) { f(k, k * block, least(rows, (k + 1) * block)); });
  }
  // Batch norm of few rows: threads share out the channels, and each stays with its own until they are written.
  bool few() const { return a.outer == 1 && alone() && rows <= kRows; }
  // f(part of the columns): whole pairs of vectors, for streaming; the last has what is left over, for the last vector overlaps
  // the one before.
  template <class F> void share_columns(const F &f) const {
    const i64 per = most(16, ceil_div(vectors, 16) * 2), tasks = most(1, vectors / per);
    parallel(a, tasks, [&](i64 task) {
      Columns part(*this);
      part.from = task * per, part.to = task + 1 == tasks ? vectors : part.from + per;
      f(part);
    });
  }
  // The channels of the vectors taken.
  i64 first() const { return from * W; }
  i64 last() const { return to == vectors ? channels : to * W; }

  // For each channel its slots in a table over `slots`, or the same value for all rows of a wide row.
  void spread_out(const A *of_channel, A *table) const {
    if (fold == 1)
      for (i64 v = from; v < to; ++v) store(table + v * W, load(of_channel + at(v)));
    else
      for (i64 s = 0; s < slots; ++s) table[s] = of_channel[channel(s)];
  }
  // The sums of a sample's blocks, of two numbers for each slot that the vectors taken have.
  void add_blocks(const double *parts, double *total) const {
    for (i64 half = 0; half < 2; ++half) {
      const i64 first = half * slots + from * W, n = (to - from) * W;
      memcpy(total + first, parts + first, sizeof(double) * size_t(n));
      for (i64 k = 1; k < blocks; ++k)
        for (i64 i = first; i < first + n; ++i) total[i] += parts[k * 2 * slots + i];
    }
  }
};

// The sums of two numbers over a block of rows, for each slot.
struct ColumnSums {
  double *s, *q;
  ColumnSums(double *sums, i64 slots) : s(sums), q(sums + slots) {}
};

// The sums of rows [r, end): add(count, fetched) adds eight at a time to them.
template <class T, class F> inline void add_rows(const Columns<T> &job, i64 &r, i64 end, const ColumnSums &sums, const F &add) {
  const i64 first = job.from * kLanes<Acc<T>>, n = (job.to - job.from) * kLanes<Acc<T>>;
  memset(sums.s + first, 0, sizeof(double) * size_t(n)), memset(sums.q + first, 0, sizeof(double) * size_t(n));
  const auto all = [&](auto fetched) {
    for (; r + 8 <= end; r += 8) add(std::integral_constant<int, 8>{}, fetched);
    for (; r < end; ++r) add(std::integral_constant<int, 1>{}, fetched);
  };
  if (job.hidden() && job.to - job.from == job.vectors) all(std::true_type{});
  else all(std::false_type{});
}

// Sums about the pivots of d and d² for rows [r, end), all slots.
template <class T>
inline void column_sums(const Columns<T> &job, i64 o, i64 r, i64 end, const Acc<T> *pivot, const ColumnSums &sums) {
  using A = Acc<T>;
  using V = Vec<A>;
  constexpr int W = kLanes<A>;
  const auto add = [&](auto count, auto fetched) {
    constexpr int n = decltype(count)::value;
    const T *x = job.x(o, r), *next = x + job.ahead(n);
    for (i64 v = job.from; v < job.to; ++v) {
      const i64 column = job.at(v);
      const V p = load(pivot + v * W), one = ones<A>();
      V vs[2] = {}, vq[2] = {};
      for (int k = 0; k < n; ++k) {
        if constexpr (decltype(fetched)::value) fetch<W>(next + (v * n + k) * W);
        const V d = load(x + k * job.width + column) - p;
        vs[k % 2] += d * one, vq[k % 2] += d * d;
      }
      add_to<A>(sums.s + v * W, vs[0] + vs[1]), add_to<A>(sums.q + v * W, vq[0] + vq[1]);
    }
  };
  add_rows(job, r, end, sums, add);
}

// Pivots for the columns: means, about the first row, over rows from all parts of the sample.
template <class T> inline void column_pivots(const Columns<T> &job, i64 o, Acc<T> *pivot) {
  using A = Acc<T>;
  constexpr int W = kLanes<A>;
  const i64 n = least(job.rows, 32), step = n ? job.rows / n : 0;
  for (i64 v = job.from; v < job.to; ++v) {
    const T *x = job.x(o, 0) + job.at(v);
    const Vec<A> first = load(x);
    Vec<A> sum{};
    for (i64 r = 1; r < n; ++r) sum += load(x + r * step * job.width) - first;
    store(pivot + v * W, first + sum / A(n));
  }
}

// Moves pivots that are not near the means of all rows there, and leaves in the job the vectors that have such; whether any has.
// Half the mean square costs one bit of the variance, and a pivot over 32 random rows is farther off once in 10⁷ times.
template <class T> inline bool move_pivots(Columns<T> &job, const double *ds, const double *dq, Acc<T> *pivot) {
  constexpr int W = kLanes<Acc<T>>;
  const double n = double(job.rows);
  i64 from = job.to, to = job.from;
  for (i64 v = job.from; v < job.to; ++v)
    for (i64 k = v * W; k < (v + 1) * W; ++k)
      if (!near(n, ds[k], dq[k], 0.5)) pivot[k] = Acc<T>(double(pivot[k]) + ds[k] / n), from = least(from, v), to = v + 1;
  job.from = from, job.to = most(from, to);
  return from < to;
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
  job.in_fours(r, end, rows);
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

template <class T> bool columns_forward(const Args &a) {
  using A = Acc<T>;
  const Columns<T> job(a);
  const i64 C = job.channels, S = job.slots, samples = a.outer;
  const i64 tables = a.given() ? 1 : samples;  // given statistics are the same for every sample
  Scratch memory;
  const A *w = param<A>(memory, a.weight, a.wtype, C, 1, a.offset, std::is_same_v<T, bfloat>);
  const A *b = param<A>(memory, a.bias, a.btype, C, 0, 0, std::is_same_v<T, bfloat>);
  A *of_channel = memory.take<A>(tables * 3 * C), *of_slot = memory.take<A>(tables * 3 * S);
  const i64 sets = a.given() ? 0 : samples, tasks = sets * job.blocks;
  A *pivots = memory.take<A>(sets * S);
  double *parts = memory.take<double>(tasks * 2 * S), *sums = memory.take<double>(sets * 2 * S);
  Spread *spreads = memory.take<Spread>(sets * C);
  bool *extreme = memory.take<bool>(samples * a.groups);
  if (memory.failed) return false;
  const auto table = [](A *p, i64 i, i64 n) { return AffineTable<A>{p + i * 3 * n, p + (i * 3 + 1) * n, p + (i * 3 + 2) * n}; };

  const auto set = [&](i64 o, i64 c, const Moments<A> &m) {
    const AffineTable<A> f = table(of_channel, o, C);
    f.mean[c] = m.mean, f.scale[c] = m.scale(get(w + c)), f.shift[c] = m.shift(get(w + c), get(b + c));
  };
  const auto finish_table = [&](const Columns<T> &part, i64 o) {
    const AffineTable<A> f = table(of_channel, o, C), g = table(of_slot, o, S);
    part.spread_out(f.mean, g.mean), part.spread_out(f.scale, g.scale), part.spread_out(f.shift, g.shift);
  };
  const auto apply = [&](const Columns<T> &part, i64 o, i64 k, i64 r, i64 end) {
    const i64 t = a.given() ? 0 : o;
    column_apply(part, o, r, end, k + 1 == job.blocks, table(of_slot, t, S), table(of_channel, t, C));
  };
  const auto apply_all = [&](i64 o, i64 k, i64 r, i64 end) { apply(job, o, k, r, end); };
  if (a.given()) {
    for (i64 c = 0; c < C; ++c) set(0, c, given_moments<A>(a, c));
    finish_table(job, 0);
    job.share(false, apply_all);
    return true;
  }

  const auto gather = [&](const Columns<T> &part, i64 o, i64 k, i64 r, i64 end) {
    const i64 t = o * job.blocks + k;
    column_sums(part, o, r, end, pivots + o * S, ColumnSums(parts + t * 2 * S, S));
  };
  const auto add_blocks = [&](const Columns<T> &part, i64 o) {
    part.add_blocks(parts + o * job.blocks * 2 * S, sums + o * 2 * S);
  };
  const auto moved = [&](Columns<T> &part, i64 o) {
    return move_pivots(part, sums + o * 2 * S, sums + o * 2 * S + S, pivots + o * S);
  };
  const auto settle_set = [&](i64 o, i64 g, const Spread &spread, A pivot) {
    const Moments<A> m = finish<A>(spread, pivot, a.eps);
    for (i64 c = g * a.channels; c < (g + 1) * a.channels; ++c) set(o, c, m);
    extreme[o * a.groups + g] = m.exact;
    save(a, o * a.groups + g, m);
  };
  // What the blocks, and the rows left over, have of each channel, about the first element of its group.
  const auto settle = [&](const Columns<T> &part, i64 o) {
    const A *pivot = pivots + o * S;
    const double *ds = sums + o * 2 * S, *dq = ds + S, n = double(job.rows);
    const T *x = job.x(o, 0), *rest = job.x(o, job.rows);
    Spread *spread = spreads + o * C;
    const auto base = [&](i64 c) { return get(x + c / a.channels * a.channels); };
    if (job.alone()) {
      const AffineTable<A> f = table(of_slot, o, S);
      for (i64 k = part.from * kLanes<A>; k < part.to * kLanes<A>; ++k) {
        const i64 c = job.column(k);
        const Moments<A> m = finish<A>(Spread{n, ds[k] / n, centred(n, ds[k], dq[k])}, pivot[k], a.eps);
        f.mean[k] = m.mean, f.scale[k] = m.scale(get(w + c)), f.shift[k] = m.shift(get(w + c), get(b + c));
        if (job.fresh(k)) extreme[o * C + c] = m.exact, save(a, o * C + c, m);
      }
      return;
    }
    if (job.even()) {  // channels have equally many values: divisions, a merge's, are of groups alone
      const double share = 1 / n, of_group = 1 / double(a.channels);
      for (i64 g = 0; g < a.groups; ++g) {
        const i64 first = g * a.channels, end = first + a.channels;
        const double origin = double(get(x + first));
        double mean = 0, m2 = 0;
        for (i64 c = first; c < end; ++c) {
          const i64 k = job.slot(c);
          spread[c].mean = (double(pivot[k]) - origin) + ds[k] * share;
          mean += spread[c].mean, m2 += dq[k] - ds[k] * ds[k] * share;
        }
        mean *= of_group;
        double between = 0;
        for (i64 c = first; c < end; ++c) between += (spread[c].mean - mean) * (spread[c].mean - mean);
        settle_set(o, g, Spread{n * double(a.channels), mean, (m2 < 0 ? 0 : m2) + between * n}, get(x + first));
      }
      finish_table(part, o);
      return;
    }
    for (i64 c = 0; c < C; ++c) spread[c] = Spread{};
    for (i64 k = 0; k < S; ++k) {
      if (!job.fresh(k)) continue;
      const i64 c = job.channel(k);
      spread[c].merge(n, double(pivot[k]) - double(base(c)) + ds[k] / n, centred(n, ds[k], dq[k]));
    }
    for (i64 i = 0; i < job.rest * C; ++i) spread[i % C].merge(1, double(get(rest + i)) - double(base(i % C)), 0);
    for (i64 g = 0; g < a.groups; ++g) {
      const i64 first = g * a.channels;
      for (i64 c = first + 1; c < first + a.channels; ++c) spread[first].merge(spread[c]);
      settle_set(o, g, spread[first], base(first));
    }
    finish_table(part, o);
  };
  // All of one block: sums, taken again where a pivot was far off, and what becomes of x.
  const auto at_once = [&](const Columns<T> &part, i64 o, i64 r, i64 end) {
    Columns<T> again(part);
    column_pivots(part, o, pivots + o * S);
    gather(part, o, 0, r, end), add_blocks(part, o);
    if (moved(again, o)) gather(again, o, 0, r, end), add_blocks(again, o);
    settle(part, o);
    apply(part, o, 0, r, end);
  };

  if (job.few()) {
    job.share_columns([&](const Columns<T> &part) { at_once(part, 0, 0, job.rows); });
  } else if (job.blocks == 1) {
    job.share(false, [&](i64 o, i64, i64 r, i64 end) { at_once(job, o, r, end); });
  } else {
    for (i64 o = 0; o < samples; ++o) column_pivots(job, o, pivots + o * S);
    job.share(false, [&](i64 o, i64 k, i64 r, i64 end) { gather(job, o, k, r, end); });
    for (i64 o = 0; o < samples; ++o) {
      Columns<T> again(job);
      add_blocks(job, o);
      if (moved(again, o)) {
        job.share_sample([&](i64 k, i64 r, i64 end) { gather(again, o, k, r, end); });
        add_blocks(again, o);
      }
      settle(job, o);
    }
    job.share(true, apply_all);
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
