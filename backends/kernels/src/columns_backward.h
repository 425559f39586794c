// Gradients of columns.h: column sums of dy and dy·x̂, then dx, both over blocks of rows; with given statistics in one pass.
#pragma once
#include "columns.h"
#include "rows_backward.h"

namespace normkit {
namespace {

// dx = (dy·scale − shift) − x̂·slope, with scale = rstd·w, shift = rstd·mean(g), slope = rstd·mean(g·x̂).
template <class A> struct Slopes {
  A *scale, *shift, *slope;
};

// Sums of dy and dy·x̂ of rows [r, end), all slots; `write`: and dx = dy·scale, where no sum is part of it.
template <class T, bool write, bool streamed>
inline void column_projections(const Columns<T> &job, i64 o, i64 r, i64 end, const AffineTable<Acc<T>> &slot, const Acc<T> *scales,
                               const ColumnSums &sums) {
  using A = Acc<T>;
  using V = Vec<A>;
  constexpr int W = kLanes<A>;
  const auto add = [&](auto count, auto fetched) {
    constexpr int n = decltype(count)::value;
    const T *x = job.x(o, r), *dy = job.dy(o, r);
    T *dx = job.y(o, r);
    const i64 next = job.ahead(n);
    for (i64 v = job.from; v < job.to; ++v) {
      const i64 c = job.at(v);
      const V mean = load(slot.mean + v * W), rstd = load(slot.scale + v * W), drift = load(slot.shift + v * W);
      V vs{}, vq{};
      const V scale = write ? load(scales + v * W) : V{};
      for (int k = 0; k < n; ++k) {
        const i64 i = k * job.width + c, in_order = next + (v * n + k) * W;
        if constexpr (decltype(fetched)::value) fetch<W>(x + in_order), fetch<W>(dy + in_order);
        const V g = load(dy + i);
        vs += g, vq += g * ((load(x + i) - mean) * rstd + drift);
        if constexpr (write) store<streamed && n == 8>(dx + i, g * scale);
      }
      add_to<A>(sums.s + v * W, vs), add_to<A>(sums.q + v * W, vq);
    }
  };
  add_rows(job, r, end, sums, add);
  if (streamed) fence();
}

template <class T>
inline void column_gradients(const Columns<T> &job, i64 o, i64 r, i64 end, bool with_rest, const AffineTable<Acc<T>> &slot,
                             const AffineTable<Acc<T>> &channel, const Slopes<Acc<T>> &f, const Slopes<Acc<T>> &fc) {
  using A = Acc<T>;
  constexpr int W = kLanes<A>;
  const auto rows = [&](auto count, auto streamed) {
    constexpr int n = decltype(count)::value;
    const T *x = job.x(o, r), *dy = job.dy(o, r);
    T *dx = job.y(o, r);
    for (i64 v = job.from; v < job.to; ++v) {
      const i64 c = job.at(v);
      const auto mean = load(slot.mean + v * W), rstd = load(slot.scale + v * W), drift = load(slot.shift + v * W);
      const auto scale = load(f.scale + v * W), shift = load(f.shift + v * W), slope = load(f.slope + v * W);
      for (int k = 0; k < n; ++k) {
        const i64 i = k * job.width + c;
        store<decltype(streamed)::value>(dx + i, (load(dy + i) * scale - shift) - ((load(x + i) - mean) * rstd + drift) * slope);
      }
    }
  };
  job.in_fours(r, end, rows);
  if (with_rest) {
    const T *x = job.x(o, job.rows), *dy = job.dy(o, job.rows);
    T *dx = job.y(o, job.rows);
    for (i64 i = 0; i < job.rest * job.channels; ++i) {
      const i64 c = i % job.channels;
      const A v = (get(x + i) - channel.mean[c]) * channel.scale[c] + channel.shift[c];
      put(dx + i, A((get(dy + i) * fc.scale[c] - fc.shift[c]) - v * fc.slope[c]));
    }
  }
  if (job.a.stream) fence();
}

template <class T> bool columns_backward(const Args &a) {
  using A = Acc<T>;
  const Columns<T> job(a);
  const i64 C = job.channels, S = job.slots, samples = a.outer, tasks = samples * job.blocks;
  Scratch memory;
  const A *w = param<A>(memory, a.weight, a.wtype, C, 1, a.offset, std::is_same_v<T, bfloat>);
  A *of_channel = memory.take<A>(samples * 6 * C), *of_slot = memory.take<A>(samples * 6 * S);
  double *parts = memory.take<double>(tasks * 2 * S), *totals = memory.take<double>(samples * 2 * S);
  double *sums = memory.take<double>(samples * 2 * C);
  if (memory.failed) return false;
  const auto table = [](A *p, i64 o, i64 n) {
    p += o * 6 * n;
    return AffineTable<A>{p, p + n, p + 2 * n};  // of x̂ itself: scale is rstd, shift the drift
  };
  const auto slopes = [](A *p, i64 o, i64 n) {
    p += o * 6 * n;
    return Slopes<A>{p + 3 * n, p + 4 * n, p + 5 * n};
  };
  for (i64 o = 0; o < samples; ++o) {
    const AffineTable<A> f = table(of_channel, o, C), g = table(of_slot, o, S);
    const Slopes<A> fs = slopes(of_channel, o, C), gs = slopes(of_slot, o, S);
    for (i64 c = 0; c < C; ++c) {
      const Moments<A> m = a.given() ? given_moments<A>(a, c) : saved<A>(a, o * a.groups + c / a.channels);
      f.mean[c] = m.mean, f.scale[c] = m.rstd, f.shift[c] = m.drift;
      fs.scale[c] = m.scale(get(w + c)), fs.shift[c] = 0;
    }
    job.spread_out(f.mean, g.mean), job.spread_out(f.scale, g.scale), job.spread_out(f.shift, g.shift);
    job.spread_out(fs.scale, gs.scale), job.spread_out(fs.shift, gs.shift);
  }
  if (a.given() && !a.parameters()) {
    if (!a.y) return true;
    // An affine map of dy: that of x with a mean and a shift of zero.
    Args of_dy = a;
    of_dy.x = a.dy;
    const Columns<T> map(of_dy);
    const auto affine = [&](const Slopes<A> &f) { return AffineTable<A>{f.shift, f.scale, f.shift}; };
    map.share(false, [&](i64 o, i64 k, i64 r, i64 end) {
      column_apply(map, o, r, end, k + 1 == job.blocks, affine(slopes(of_slot, o, S)), affine(slopes(of_channel, o, C)));
    });
    return true;
  }
  const auto gather = [&](auto write, auto streamed) {
    return [&](const Columns<T> &part, i64 o, i64 k, i64 r, i64 end) {
      const i64 t = o * job.blocks + k;
      column_projections<T, decltype(write)::value, decltype(streamed)::value>(
          part, o, r, end, table(of_slot, o, S), slopes(of_slot, o, S).scale, ColumnSums(parts + t * 2 * S, S));
    };
  };
  const std::false_type no;
  const std::true_type yes;
  const auto settle = [&](const Columns<T> &part, i64 o) {
    double *total = totals + o * 2 * S, *dys = sums + o * 2 * C, *dyxs = dys + C;
    part.add_blocks(parts + o * job.blocks * 2 * S, total);
    for (i64 c = part.first(); c < part.last(); ++c) dys[c] = dyxs[c] = 0;
    for (i64 k = part.from * kLanes<A>; k < part.to * kLanes<A>; ++k)
      if (job.fresh(k)) dys[job.channel(k)] += total[k], dyxs[job.channel(k)] += total[S + k];
    const AffineTable<A> f = table(of_channel, o, C);
    const Slopes<A> fs = slopes(of_channel, o, C), gs = slopes(of_slot, o, S);
    const T *x = job.x(o, job.rows), *dy = job.dy(o, job.rows);
    for (i64 i = 0; i < job.rest * C; ++i) {
      const i64 c = i % C;
      const A g = get(dy + i);
      dys[c] += g, dyxs[c] += g * ((get(x + i) - f.mean[c]) * f.scale[c] + f.shift[c]);
      if (a.given() && a.y) put(job.y(o, job.rows) + i, A(g * fs.scale[c]));
    }
    if (a.given()) return;
    const double n = double(a.channels) * double(a.inner);
    for (i64 g = part.first() / a.channels; g < part.last() / a.channels; ++g) {
      double c1 = 0, c2 = 0;
      const i64 first = g * a.channels;
      for (i64 c = first; c < first + a.channels; ++c) c1 += dys[c] * get(w + c), c2 += dyxs[c] * get(w + c);
      for (i64 c = first; c < first + a.channels; ++c) fs.shift[c] = f.scale[c] * A(c1 / n), fs.slope[c] = f.scale[c] * A(c2 / n);
    }
    part.spread_out(fs.shift, gs.shift), part.spread_out(fs.slope, gs.slope);
  };
  const auto apply = [&](const Columns<T> &part, i64 o, i64 k, i64 r, i64 end) {
    if (a.given() || !a.y) return;
    column_gradients(part, o, r, end, k + 1 == job.blocks, table(of_slot, o, S), table(of_channel, o, C),
                     slopes(of_slot, o, S), slopes(of_channel, o, C));
  };
  const auto run = [&](const auto &gather) {
    const auto at_once = [&](const Columns<T> &part, i64 o, i64 r, i64 end) {
      gather(part, o, 0, r, end);
      settle(part, o);
      apply(part, o, 0, r, end);
    };
    if (job.few()) return job.share_columns([&](const Columns<T> &part) { at_once(part, 0, 0, job.rows); });
    if (job.blocks == 1) return job.share(false, [&](i64 o, i64, i64 r, i64 end) { at_once(job, o, r, end); });
    job.share(false, [&](i64 o, i64 k, i64 r, i64 end) { gather(job, o, k, r, end); });
    for (i64 o = 0; o < samples; ++o) settle(job, o);
    if (!a.given()) job.share(true, [&](i64 o, i64 k, i64 r, i64 end) { apply(job, o, k, r, end); });
  };
  if (!a.given() || !a.y) run(gather(no, no));
  else if (a.stream) run(gather(yes, yes));
  else run(gather(yes, no));
  reduce(a, sums + C, sums, samples, C, 2 * C);
  if (a.given() && (a.dmean || a.dvar))
    for (i64 c = 0; c < C; ++c) {
      double dy = 0, dyx = 0;
      for (i64 o = 0; o < samples; ++o) dy += sums[o * 2 * C + c], dyx += sums[o * 2 * C + C + c];
      const double rstd = given_moments<A>(a, c).rstd, weight = get(w + c);
      if (a.dmean) put_any(a.dmean, a.mtype, c, -weight * rstd * dy);
      if (a.dvar) put_any(a.dvar, a.vtype, c, -0.5 * weight * rstd * rstd * dyx);
    }
  return true;
}

}  // namespace
}  // namespace normkit
