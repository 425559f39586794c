// Gradients of columns.h: column sums of dy and dy·x̂, then dx, both over blocks of rows.
#pragma once
#include "columns.h"

namespace normkit {
namespace {

// Adds dy and dy·x̂ of rows [r, end) to each channel's sums.
template <class T>
inline void column_projections(const Columns<T> &job, i64 o, i64 r, i64 end, bool with_rest, const AffineTable<Acc<T>> &slot,
                               const AffineTable<Acc<T>> &channel, const ColumnWork<Acc<T>> &work, double *dys, double *dyxs) {
  using A = Acc<T>;
  const auto [pivot, s, q, ds, dq] = work;
  (void)pivot;
  using V = Vec<A>;
  constexpr int W = kLanes<A>;
  const auto add = [&](auto count) {
    constexpr int n = decltype(count)::value;
    const T *x = job.x(o, r), *dy = job.dy(o, r);
    for (i64 v = 0; v < job.vectors; ++v) {
      const i64 c = job.at(v);
      const V mean = load(slot.mean + v * W), rstd = load(slot.scale + v * W), drift = load(slot.shift + v * W);
      V vs{}, vq{};  // by themselves at first: an eighth of the roundings is at the height of the long sum
      for (int k = 0; k < n; ++k) {
        const V g = load(dy + k * job.width + c);
        vs += g, vq += g * ((load(x + k * job.width + c) - mean) * rstd + drift);
      }
      store(s + v * W, load(s + v * W) + vs), store(q + v * W, load(q + v * W) + vq);
    }
  };
  for (i64 c = 0; c < job.channels; ++c) dys[c] = dyxs[c] = 0;
  memset(ds, 0, sizeof(double) * size_t(job.slots));
  memset(dq, 0, sizeof(double) * size_t(job.slots));
  while (r < end) {
    const i64 last = least(end, r + Columns<T>::kRows);
    memset(s, 0, sizeof(A) * size_t(job.slots));
    memset(q, 0, sizeof(A) * size_t(job.slots));
    for (; r + 8 <= last; r += 8) add(std::integral_constant<int, 8>{});
    for (; r < last; ++r) add(std::integral_constant<int, 1>{});
    for (i64 k = 0; k < job.slots; ++k) ds[k] += s[k], dq[k] += q[k];
  }
  job.collect(ds, dys), job.collect(dq, dyxs);
  if (!with_rest) return;
  const T *x = job.x(o, job.rows), *dy = job.dy(o, job.rows);
  for (i64 i = 0; i < job.rest * job.channels; ++i) {
    const i64 c = i % job.channels;
    const A g = get(dy + i);
    dys[c] += g, dyxs[c] += g * ((get(x + i) - channel.mean[c]) * channel.scale[c] + channel.shift[c]);
  }
}

// dx = (dy·scale − shift) − x̂·slope, with scale = rstd·w, shift = rstd·mean(g), slope = rstd·mean(g·x̂).
template <class A> struct Slopes {
  A *scale, *shift, *slope;
};

template <class T>
inline void column_gradients(const Columns<T> &job, i64 o, i64 r, i64 end, bool with_rest, const AffineTable<Acc<T>> &slot,
                             const AffineTable<Acc<T>> &channel, const Slopes<Acc<T>> &f, const Slopes<Acc<T>> &fc) {
  using A = Acc<T>;
  constexpr int W = kLanes<A>;
  const auto rows = [&](auto count, auto streamed) {
    constexpr int n = decltype(count)::value;
    const T *x = job.x(o, r), *dy = job.dy(o, r);
    T *dx = job.y(o, r);
    for (i64 v = 0; v < job.vectors; ++v) {
      const i64 c = job.at(v);
      const auto mean = load(slot.mean + v * W), rstd = load(slot.scale + v * W), drift = load(slot.shift + v * W);
      const auto scale = load(f.scale + v * W), shift = load(f.shift + v * W), slope = load(f.slope + v * W);
      for (int k = 0; k < n; ++k) {
        const i64 i = k * job.width + c;
        store<decltype(streamed)::value>(dx + i, (load(dy + i) * scale - shift) - ((load(x + i) - mean) * rstd + drift) * slope);
      }
    }
  };
  if (job.a.stream) {
    for (; r + 4 <= end; r += 4) rows(std::integral_constant<int, 4>{}, std::true_type{});
  }
  for (; r + 4 <= end; r += 4) rows(std::integral_constant<int, 4>{}, std::false_type{});
  for (; r < end; ++r) rows(std::integral_constant<int, 1>{}, std::false_type{});
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
  const i64 work_size = ColumnWork<A>::size(S);
  char *work = memory.take<char>(tasks * work_size);
  double *parts = memory.take<double>(tasks * 2 * C), *sums = memory.take<double>(samples * 2 * C);
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
    for (i64 c = 0; c < C; ++c) {
      const Moments<A> m = a.given() ? given_moments<A>(a, c) : saved<A>(a, o * a.groups + c / a.channels);
      f.mean[c] = m.mean, f.scale[c] = m.rstd, f.shift[c] = m.drift;
    }
    job.spread_out(f.mean, g.mean), job.spread_out(f.scale, g.scale), job.spread_out(f.shift, g.shift);
  }
  const auto gather = [&](i64 o, i64 k, i64 r, i64 end) {
    const i64 t = o * job.blocks + k;
    column_projections(job, o, r, end, k + 1 == job.blocks, table(of_slot, o, S), table(of_channel, o, C),
                       ColumnWork<A>(work + t * work_size, S), parts + t * 2 * C, parts + t * 2 * C + C);
  };
  const auto settle = [&](i64 o) {
    double *dys = sums + o * 2 * C, *dyxs = dys + C;
    for (i64 c = 0; c < C; ++c) {
      dys[c] = dyxs[c] = 0;
      for (i64 k = 0; k < job.blocks; ++k) {
        dys[c] += parts[(o * job.blocks + k) * 2 * C + c], dyxs[c] += parts[(o * job.blocks + k) * 2 * C + C + c];
      }
    }
    const AffineTable<A> f = table(of_channel, o, C);
    const Slopes<A> fs = slopes(of_channel, o, C), gs = slopes(of_slot, o, S);
    const double n = double(a.channels) * double(a.inner);
    for (i64 g = 0; g < a.groups; ++g) {
      double c1 = 0, c2 = 0;
      const i64 first = g * a.channels;
      for (i64 c = first; !a.given() && c < first + a.channels; ++c) c1 += dys[c] * get(w + c), c2 += dyxs[c] * get(w + c);
      for (i64 c = first; c < first + a.channels; ++c) {
        const A rstd = f.scale[c];
        fs.scale[c] = rstd * get(w + c), fs.shift[c] = rstd * A(c1 / n), fs.slope[c] = rstd * A(c2 / n);
      }
    }
    job.spread_out(fs.scale, gs.scale), job.spread_out(fs.shift, gs.shift), job.spread_out(fs.slope, gs.slope);
  };
  const auto apply = [&](i64 o, i64 k, i64 r, i64 end) {
    if (!a.y) return;
    column_gradients(job, o, r, end, k + 1 == job.blocks, table(of_slot, o, S), table(of_channel, o, C),
                     slopes(of_slot, o, S), slopes(of_channel, o, C));
  };
  if (job.blocks == 1) {
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
  reduce(a, a.dbias, a.btype, sums, samples, C, 2 * C);
  reduce(a, a.dweight, a.wtype, sums + C, samples, C, 2 * C);
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
