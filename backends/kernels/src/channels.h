// One statistic per channel of x[outer][channels][inner]: batch norm channels first, with its own or given statistics.
#pragma once
#include "rows.h"

namespace normkit {
namespace {

// Each channel is cut into the same chunks whatever the threads do: `runs` whole runs of `inner`, or a piece of one run.
struct Chunks {
  i64 outer, inner, runs, pieces, count;

  Chunks(i64 outer, i64 inner) : outer(outer), inner(inner) {
    runs = inner >= kChunk ? 1 : least(outer, kChunk / inner);
    pieces = ceil_div(inner, kChunk);
    count = inner >= kChunk ? outer * pieces : ceil_div(outer, runs);
  }
  i64 first(i64 chunk) const { return runs > 1 || pieces == 1 ? chunk * runs : chunk / pieces; }
  i64 last(i64 chunk) const { return runs > 1 || pieces == 1 ? least(outer, (chunk + 1) * runs) : chunk / pieces + 1; }
  i64 start(i64 chunk) const { return pieces == 1 ? 0 : chunk % pieces * kChunk; }
  i64 length(i64 chunk) const { return pieces == 1 ? inner : least(kChunk, inner - start(chunk)); }
};

// How channels and chunks are shared out: blocks of neighbouring channels so that runs are long enough to fetch, and, where
// a block outgrows the caches or the blocks are few, ranges of chunks.
struct Shares {
  static constexpr i64 kBlock = 16, kWidth = 2048, kShort = 128;
  i64 block, blocks, range, ranges;
  bool joined;  // runs so short that a block's are taken for one: see Places

  Shares(const Args &a, const Chunks &chunks, bool forward) {
    const i64 item = size_of(a.xtype), run = a.inner * item, bytes = a.outer * run;
    const i64 row = a.channels * a.inner;
    // Of few samples, it costs more to lay out each place's numbers than short runs do.
    const bool many = a.outer * (forward ? 7 : 10) >= a.inner;
    joined = many && a.inner < kShort && row >= kNarrow && (forward || !a.given());
    if (joined) {
      block = ceil_div(a.channels, ceil_div(row, least(kWidth, most(kWidth / 8, ceil_div(row, 4)))));
      if (block > 16) block = block / 16 * 16;  // so that blocks begin where vectors do
      while (((a.channels - 1) % block + 1) * a.inner < kNarrow) ++block;  // the last one is a vector at least
      divide(a, chunks, ceil_div(a.channels, block) < 4 && a.channels * bytes > (i64(1) << 20));
      return;
    }
    block = least(least(kBlock, ceil_div(8192, run)), most(1, a.channels / 8));
    while (block > 1 && block * bytes > (i64(1) << 20) && block * run > 2048) block = ceil_div(block, 2);
    divide(a, chunks, block * bytes > (i64(3) << 20) || (ceil_div(a.channels, block) < 16 && bytes > (i64(1) << 16)));
  }

 private:
  void divide(const Args &a, const Chunks &chunks, bool split) {
    blocks = ceil_div(a.channels, block);
    const i64 bytes = block * a.outer * a.inner * size_of(a.xtype);
    ranges = split ? least(chunks.count, most(1, ceil_div(bytes, i64(1) << 18))) : 1;
    range = ceil_div(chunks.count, ranges);
    ranges = ceil_div(chunks.count, range);
  }
};

// What one channel's elements become: (x - mean) * scale + shift.
template <class A> struct Affine {
  A mean, scale, shift;
};

template <class T> struct Channels {
  using A = Acc<T>;
  using V = Vec<A>;
  const Args &a;
  Chunks chunks;
  Shares shares;

  explicit Channels(const Args &a, bool forward) : a(a), chunks(a.outer, a.inner), shares(a, chunks, forward) {}

  const T *x(i64 n, i64 c) const { return (const T *)a.x + (n * a.channels + c) * a.inner; }
  const T *dy(i64 n, i64 c) const { return (const T *)a.dy + (n * a.channels + c) * a.inner; }
  T *y(i64 n, i64 c) const { return (T *)a.y + (n * a.channels + c) * a.inner; }
  // As pivot_of(), of several samples where runs are shorter than vectors.
  A pivot(i64 c) const {
    constexpr i64 W = kLanes<A>;
    if (a.inner >= W) return pivot_of(x(0, c), a.inner);
    const i64 samples = least(a.outer, ceil_div(2 * W, a.inner));
    const A first = get(x(0, c));
    A s = 0;
    for (i64 o = 0; o < samples; ++o)
      for (i64 i = 0; i < a.inner; ++i) s += get(x(o, c) + i) - first;
    return first + s / A(samples * a.inner);
  }
  Set<const T> channel(i64 c) const { return {x(0, c), a.outer, a.channels * a.inner, a.inner}; }

  // f(task, first channel, end, first chunk, end) for every share.
  template <class F> void share(bool backwards, const F &f) const {
    const i64 tasks = shares.blocks * shares.ranges;
    parallel(a, tasks, [&](i64 task) {
      const i64 t = backwards ? tasks - 1 - task : task, c = t / shares.ranges * shares.block, k = t % shares.ranges * shares.range;
      f(c, least(a.channels, c + shares.block), k, least(chunks.count, k + shares.range));
      if (a.stream) fence();
    });
  }

  // sums(first channel, end, first chunk, end, ahead) for all, settle(channel) where its sums are known, and then, if `writes`,
  // apply(as sums) for all. Where a block fits the caches, it is written in turns with the sums of the next, so that there is
  // always something to load and something to store: whoever takes a block goes on until none are left. `ahead` is how far it
  // is to what is read next, and fetched meanwhile.
  template <class Sums, class Settle, class Apply>
  void in_turns(bool writes, const Sums &sums, const Settle &settle, const Apply &apply) const {
    const i64 run = chunks.pieces == 1 ? a.channels * a.inner : kChunk, count = chunks.count;
    if (shares.ranges > 1) {
      share(false, [&](i64 c, i64 end, i64 k, i64 kend) { sums(c, end, k, kend, run); });
      for (i64 c = 0; c < a.channels; ++c) settle(c);
      if (writes) share(true, [&](i64 c, i64 end, i64 k, i64 kend) { apply(c, end, k, kend, 0); });
      return;
    }
    i64 taken = 0;
    const auto take = [&] {
      const i64 i = __atomic_fetch_add(&taken, 1, __ATOMIC_RELAXED);
      return i < shares.blocks ? apart(i, shares.blocks) * shares.block : a.channels;
    };
    const auto until = [&](i64 c) { return least(a.channels, c + shares.block); };
    parallel(a, shares.blocks, [&](i64) {
      i64 c = take();
      if (c < a.channels) sums(c, until(c), 0, count, run);
      while (c < a.channels) {
        for (i64 i = c; i < until(c); ++i) settle(i);
        const i64 next = take();
        const bool last = next >= a.channels;
        for (i64 k = 0; k < count; ++k) {
          if (writes) apply(c, until(c), k, k + 1, last ? 0 : (next - c) * a.inner);
          if (!last) sums(next, until(next), k, k + 1, 2 * run);
        }
        c = next;
      }
      if (a.stream) fence();
    });
  }

  // The same where runs are joined: what make(first channel, end, first chunk, end) gives can sum() and apply() them.
  template <class Make, class Settle> void joined(bool writes, const Make &make, const Settle &settle) const {
    if (shares.ranges > 1) {
      share(false, [&](i64 c, i64 end, i64 k, i64 kend) { make(c, end, k, kend).sum(); });
      for (i64 c = 0; c < a.channels; ++c) settle(c);
      if (writes) share(true, [&](i64 c, i64 end, i64 k, i64 kend) { make(c, end, k, kend).apply(); });
      return;
    }
    share(false, [&](i64 c, i64 end, i64 k, i64 kend) {
      auto places = make(c, end, k, kend);
      places.sum();
      for (i64 i = c; i < end; ++i) settle(i);
      if (writes) places.apply();
    });
  }

  // The spread of each chunk of channels [c, end), about that channel's pivot, to spreads[channel][chunk].
  void spreads(i64 c, i64 end, i64 k, i64 kend, Spread *out, i64 ahead = 0) const {
    A pivots[Shares::kBlock];
    for (i64 i = c; i < end; ++i) pivots[i - c] = pivot(i);
    for (; k < kend; ++k) {
      const i64 first = chunks.first(k), last = chunks.last(k), start = chunks.start(k), length = chunks.length(k);
      const double n = double((last - first) * length);
      Long<A> s[Shares::kBlock], q[Shares::kBlock];
      for (i64 o = first; o < last; ++o)
        for (i64 i = c; i < end; ++i) add_run<T, true>(x(o, i) + start, length, pivots[i - c], s[i - c], q[i - c], ahead);
      for (i64 i = c; i < end; ++i) {
        Spread &spread = out[i * chunks.count + k];
        double ds = sum(s[i - c]), dq = sum(q[i - c]), shift = 0;
        if (!near(n, ds, dq)) {
          const A again = A(double(pivots[i - c]) + ds / n);
          shift = double(again) - double(pivots[i - c]);
          Long<A> s2, q2;
          for (i64 o = first; o < last; ++o) add_run<T, true>(x(o, i) + start, length, again, s2, q2);
          ds = sum(s2), dq = sum(q2);
        }
        spread = Spread{n, shift + ds / n, centred(n, ds, dq)};
      }
    }
  }

  Moments<A> moments(i64 c, const Spread *spreads) const {
    Spread all;
    for (i64 k = 0; k < chunks.count; ++k) all.merge(spreads[c * chunks.count + k]);
    return finish<A>(all, pivot(c), a.eps);
  }

  void apply(i64 c, i64 end, i64 k, i64 kend, const Affine<A> *affine, i64 ahead) const {
    for (; k < kend; ++k) {
      const i64 start = chunks.start(k), length = chunks.length(k);
      for (i64 o = chunks.first(k); o < chunks.last(k); ++o)
        for (i64 i = c; i < end; ++i) {
          const T *p = x(o, i) + start;
          const Affine<A> f = affine[i];
          map(y(o, i) + start, length, a.stream, [=](auto tag, i64 j) {
            if (ahead) tag.fetch(p + ahead + j);
            return (tag.at(p + j) - f.mean) * f.scale + f.shift;
          });
        }
    }
  }

  // A channel whose squares left the range: as a whole, in double.
  void apply_exact(i64 c, const Exact &exact, double weight, double bias) const {
    for (i64 o = 0; o < a.outer; ++o)
      for (i64 i = 0; i < a.inner; ++i) put(y(o, c) + i, A(exact(x(o, c) + i) * weight + bias));
  }
};

// Short runs of neighbouring channels, which lie side by side in each sample, as one row: each place in it has numbers of its own
// over the samples of chunks [k, kend), in whole vectors but for the last, which is moved back to end with the row.
template <class T> struct Places {
  using A = Acc<T>;
  using V = Vec<A>;
  static constexpr int W = kLanes<A>;
  static constexpr i64 kMost = Shares::kWidth + 2 * Shares::kShort;
  using Table = A[kMost];

  const Channels<T> &job;
  i64 first, end, k, kend, inner, width, stride, sample, last;

  Places(const Channels<T> &job, i64 first, i64 end, i64 k, i64 kend)
      : job(job), first(first), end(end), k(k), kend(kend), inner(job.a.inner), width((end - first) * inner),
        stride(job.a.channels * inner), sample(job.chunks.first(k)), last(job.chunks.last(kend - 1)) {}

  template <class F> void fill(A *table, const F &of_channel) const {
    for (i64 c = first; c < end; ++c) {
      const A value = of_channel(c);
      for (i64 i = 0; i < inner; ++i) table[(c - first) * inner + i] = value;
    }
  }
  // f(place) for each vector, and f(place, repeated) where the last one repeats so many places.
  template <class F> void each(const F &f) const {
    i64 i = 0;
    for (; i + W <= width; i += W) f(i, 0);
    if (i < width) f(width - W, i - (width - W));
  }
  // f(number of samples, the first of them) for all, `most` at a time.
  template <int most, class F> static void samples(i64 o, i64 last, const F &f) {
    for (; o + most <= last; o += most) f(std::integral_constant<int, most>{}, o);
    for (; o < last; ++o) f(std::integral_constant<int, 1>{}, o);
  }
  // take(channel, sum of s, sum of q) for all that of(number of samples, the first, place) gives as s and q; those of `most`
  // samples are summed in A.
  template <i64 most, class Of, class Take> void sums(A *s, A *q, const Of &of, const Take &take) const {
    for (i64 o = sample; o < last; o += most) {
      memset(s, 0, sizeof(A) * size_t(width)), memset(q, 0, sizeof(A) * size_t(width));
      samples<8>(o, least(last, o + most), [&](auto many, i64 sample) {
        each([&](i64 i, i64 repeated) {
          auto [vs, vq] = of(many, sample, i);
          if (repeated) vs = last_lanes<A>(vs, W - repeated), vq = last_lanes<A>(vq, W - repeated);
          store(s + i, load(s + i) + vs), store(q + i, load(q + i) + vq);
        });
      });
      for (i64 c = first; c < end; ++c) take(c, sum_of(s + (c - first) * inner, inner), sum_of(q + (c - first) * inner, inner));
    }
  }
};

template <class T> struct Joined : Places<T> {
  using P = Places<T>;
  using typename P::A, typename P::V;
  using P::end, P::first, P::job, P::k, P::kend, P::stride;
  Spread *spreads;
  const Affine<A> *affine;
  typename P::Table pivot, scale, shift;  // sums at first, and the pivots means

  Joined(const P &places, Spread *spreads, const Affine<A> *affine) : P(places), spreads(spreads), affine(affine) {}

  // The spread of each channel, about its pivot, as its first chunk's.
  void sum() {
    const i64 count = job.chunks.count;
    const double n = double(P::last - P::sample) * double(P::inner);
    P::fill(pivot, [&](i64 c) { return job.pivot(c); });
    for (i64 c = first; c < end; ++c)
      for (i64 i = k; i < kend; ++i) spreads[c * count + i] = Spread{};
    P::template sums<64>(
        scale, shift,
        [&](auto many, i64 o, i64 i) {
          const T *x = job.x(o, first) + i;
          const V p = load(pivot + i);
          V s{}, q{};
          for (int j = 0; j < decltype(many)::value; ++j) {
            const V d = load(x + j * stride) - p;
            s += d, q += d * d;
          }
          return Pair<A>{s, q};
        },
        [&](i64 c, double s, double q) { spreads[c * count + k].mean += s, spreads[c * count + k].m2 += q; });
    for (i64 c = first; c < end; ++c) {
      Spread &sums = spreads[c * count + k];
      if (near(n, sums.mean, sums.m2)) sums = Spread{n, sums.mean / n, centred(n, sums.mean, sums.m2)};
      else job.spreads(c, c + 1, k, kend, spreads);
    }
  }

  void apply() {
    P::fill(pivot, [&](i64 c) { return affine[c].mean; });
    P::fill(scale, [&](i64 c) { return affine[c].scale; }), P::fill(shift, [&](i64 c) { return affine[c].shift; });
    P::template samples<4>(P::sample, P::last, [&](auto many, i64 o) {
      const T *x = job.x(o, first);
      T *y = job.y(o, first);
      P::each([&](i64 i, i64) {
        const V mean = load(pivot + i), factor = load(scale + i), offset = load(shift + i);
        for (int j = 0; j < decltype(many)::value; ++j) store(y + j * stride + i, (load(x + j * stride + i) - mean) * factor + offset);
      });
    });
  }
};

// (x - mean) * scale + shift where nothing of x need be known before: in the order of memory.
template <class T> inline void apply_given(const Channels<T> &job, const Affine<Acc<T>> *affine) {
  const Args &a = job.a;
  if (job.shares.joined)
    return job.share(false, [&](i64 c, i64 end, i64 k, i64 kend) { Joined<T>({job, c, end, k, kend}, nullptr, affine).apply(); });
  const i64 pieces = job.chunks.pieces, all = a.outer * a.channels * pieces;
  const i64 some = most(1, (i64(1) << 16) * pieces / a.inner);
  parallel(a, ceil_div(all, some), [&](i64 task) {
    for (i64 i = task * some; i < least(all, (task + 1) * some); ++i) {
      const i64 run = i / pieces, start = i % pieces * kChunk;
      const T *p = job.x(0, run) + start;
      const Affine<Acc<T>> f = affine[run % a.channels];
      map(job.y(0, run) + start, least(kChunk, a.inner - start), a.stream,
          [=](auto tag, i64 j) { return (tag.at(p + j) - f.mean) * f.scale + f.shift; });
    }
    if (a.stream) fence();
  });
}

template <class A> inline Moments<A> given_moments(const Args &a, i64 c) {
  Moments<A> m{};
  const A var = A(get_any(a.given_var, a.vtype, c));
  const double spread = double(var) + a.eps;
  m.mean = A(get_any(a.given_mean, a.mtype, c));
  if (m.mean != m.mean) m.mean = A(__builtin_nan(""));
  m.var = var;
  m.root = 1 / sqrt(a.eps == 0 && !(spread > 0) ? 1 : spread);
  m.rstd = A(m.root);
  if (m.rstd != m.rstd) m.rstd = A(m.root = __builtin_nan(""));
  return m;
}

template <class T> bool channels_forward(const Args &a) {
  using A = Acc<T>;
  const Channels<T> job(a, true);
  Scratch memory;
  const A *w = param<A>(memory, a.weight, a.wtype, a.channels, 1, a.offset, std::is_same_v<T, bfloat>);
  const A *b = param<A>(memory, a.bias, a.btype, a.channels, 0, 0, std::is_same_v<T, bfloat>);
  Affine<A> *affine = memory.take<Affine<A>>(a.channels);
  Spread *spreads = a.given() ? nullptr : memory.take<Spread>(a.channels * job.chunks.count);
  bool *extreme = memory.take<bool>(a.channels);
  if (memory.failed) return false;

  const auto settle = [&](i64 c) {
    const Moments<A> m = a.given() ? given_moments<A>(a, c) : job.moments(c, spreads);
    extreme[c] = m.exact;
    affine[c] = {m.mean, m.scale(get(w + c)), m.shift(get(w + c), get(b + c))};
    save(a, c, m);
  };
  const auto rewrite = [&](i64 c) {
    Moments<A> m{};
    const Exact exact(job.channel(c), a.eps, true, m);
    job.apply_exact(c, exact, get(w + c), get(b + c));
    save(a, c, m);
  };
  bool any = false;
  if (a.given()) {
    for (i64 c = 0; c < a.channels; ++c) settle(c);
    apply_given(job, affine);
    return true;
  }
  if (job.shares.joined)
    job.joined(
        true, [&](i64 c, i64 end, i64 k, i64 kend) { return Joined<T>({job, c, end, k, kend}, spreads, affine); }, settle);
  else
    job.in_turns(
        true, [&](i64 c, i64 end, i64 k, i64 kend, i64 ahead) { job.spreads(c, end, k, kend, spreads, ahead); }, settle,
        [&](i64 c, i64 end, i64 k, i64 kend, i64 ahead) { job.apply(c, end, k, kend, affine, ahead); });
  for (i64 c = 0; c < a.channels; ++c) any = any || extreme[c];
  if (any)
    parallel(a, a.channels, [&](i64 c) {
      if (extreme[c]) rewrite(c);
    });
  return true;
}

}  // namespace
}  // namespace normkit
