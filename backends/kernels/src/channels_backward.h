// Gradients of channels.h: sums of dy and dy·x̂ for each channel, then dx; with given statistics in one pass.
#pragma once
#include "channels.h"
#include "rows_backward.h"

namespace normkit {
namespace {

struct Sums {
  double dy, dyx;
};

// Short runs as one row, as in channels.h.
template <class T> struct JoinedGradients : Places<T> {
  using P = Places<T>;
  using typename P::A, typename P::V;
  using P::end, P::first, P::job, P::k, P::kend, P::stride;
  const Moments<A> *moments;
  const A *weight;
  Sums *parts;
  const Sums *means;
  typename P::Table mean, rstd, dy, slope, scale;  // sums at first, dy and slope

  JoinedGradients(const P &places, const Moments<A> *moments, const A *weight, Sums *parts, const Sums *means)
      : P(places), moments(moments), weight(weight), parts(parts), means(means) {
    P::fill(mean, [&](i64 c) { return moments[c].mean; }), P::fill(rstd, [&](i64 c) { return moments[c].rstd; });
  }

  // The sums of each channel, as those of its first chunk.
  void sum() {
    const i64 count = job.chunks.count;
    for (i64 c = first; c < end; ++c)
      for (i64 i = k; i < kend; ++i) parts[c * count + i] = Sums{};
    P::template sums<256>(
        dy, slope,
        [&](auto many, i64 o, i64 i) {
          const T *x = job.x(o, first) + i, *g = job.dy(o, first) + i;
          const V m = load(mean + i), r = load(rstd + i);
          V s{}, q{};
          for (int j = 0; j < decltype(many)::value; ++j) {
            const V u = load(g + j * stride);
            s += u, q += u * ((load(x + j * stride) - m) * r);
          }
          return Pair<A>{s, q};
        },
        [&](i64 c, double s, double q) {
          parts[c * count + k].dy += s, parts[c * count + k].dyx += q + s * double(moments[c].drift);
        });
  }

  void apply() {
    P::fill(dy, [&](i64 c) { return A(means[c].dy + double(moments[c].drift) * means[c].dyx); });
    P::fill(slope, [&](i64 c) { return A(means[c].dyx); });
    P::fill(scale, [&](i64 c) { return moments[c].scale(get(weight + c)); });
    P::template samples<4>(P::sample, P::last, [&](auto many, i64 o) {
      const T *x = job.x(o, first), *g = job.dy(o, first);
      T *dx = job.y(o, first);
      P::each([&](i64 i, i64) {
        const V m = load(mean + i), r = load(rstd + i), d = load(dy + i), s = load(slope + i), f = load(scale + i);
        for (int j = 0; j < decltype(many)::value; ++j)
          store(dx + j * stride + i, ((load(g + j * stride + i) - d) - (load(x + j * stride + i) - m) * r * s) * f);
      });
    });
  }
};

template <class T> bool channels_backward(const Args &a) {
  using A = Acc<T>;
  const Channels<T> job(a, false);
  const Chunks &chunks = job.chunks;
  Scratch memory;
  const double n = double(a.outer) * double(a.inner);
  const A *w = param<A>(memory, a.weight, a.wtype, a.channels, 1, a.offset, std::is_same_v<T, bfloat>);
  Sums *parts = memory.take<Sums>(a.channels * chunks.count);
  Moments<A> *moments = memory.take<Moments<A>>(a.channels);
  Sums *means = memory.take<Sums>(a.channels);
  if (memory.failed) return false;
  for (i64 c = 0; c < a.channels; ++c) moments[c] = a.given() ? given_moments<A>(a, c) : saved<A>(a, c);

  if (a.given() && !a.parameters()) {
    if (!a.y) return true;
    Affine<A> *affine = memory.take<Affine<A>>(a.channels);
    if (memory.failed) return false;
    for (i64 c = 0; c < a.channels; ++c) affine[c] = {0, moments[c].scale(get(w + c)), 0};
    Args of_dy = a;
    of_dy.x = a.dy;
    apply_given(Channels<T>(of_dy, true), affine);
    return true;
  }
  // With given statistics no sum is part of dx, which is written while dy is at hand.
  const auto gather = [&](i64 c, i64 end, i64 k, i64 kend, i64 ahead) {
    for (; k < kend; ++k) {
      const i64 start = chunks.start(k), length = chunks.length(k);
      Long<A> s[Shares::kBlock], q[Shares::kBlock];
      for (i64 o = chunks.first(k); o < chunks.last(k); ++o)
        for (i64 i = c; i < end; ++i) {
          const T *dy = job.dy(o, i) + start;
          project<T, true, false>(job.x(o, i) + start, dy, {}, length, moments[i], s[i - c], q[i - c], ahead);
          if (!a.given() || !a.y) continue;
          const A scale = moments[i].scale(get(w + i));
          map(job.y(o, i) + start, length, a.stream, [=](auto tag, i64 j) { return tag.at(dy + j) * scale; });
        }
      for (i64 i = c; i < end; ++i) parts[i * chunks.count + k] = {sum(s[i - c]), sum(q[i - c])};
    }
  };
  const auto settle = [&](i64 c) {
    Sums all{};
    for (i64 k = 0; k < chunks.count; ++k) {
      all.dy += parts[c * chunks.count + k].dy, all.dyx += parts[c * chunks.count + k].dyx;
    }
    const double rstd = moments[c].rstd, weight = get(w + c);
    if (a.dweight) put_any(a.dweight, a.wtype, c, all.dyx);
    if (a.dbias) put_any(a.dbias, a.btype, c, all.dy);
    if (a.dmean) put_any(a.dmean, a.mtype, c, -weight * rstd * all.dy);
    if (a.dvar) put_any(a.dvar, a.vtype, c, -0.5 * weight * rstd * rstd * all.dyx);
    means[c] = {all.dy / n, all.dyx / n};
  };
  const auto apply = [&](i64 c, i64 end, i64 k, i64 kend, i64 ahead) {
    for (; k < kend; ++k) {
      const i64 start = chunks.start(k), length = chunks.length(k);
      for (i64 o = chunks.first(k); o < chunks.last(k); ++o)
        for (i64 i = c; i < end; ++i) {
          const T *x = job.x(o, i) + start, *dy = job.dy(o, i) + start;
          const Moments<A> m = moments[i];
          const A scale = m.scale(get(w + i)), mean = A(means[i].dy), slope = A(means[i].dyx);
          map(job.y(o, i) + start, length, a.stream, [=](auto tag, i64 j) {
            if (ahead) tag.fetch(x + ahead + j), tag.fetch(dy + ahead + j);
            return ((tag.at(dy + j) - mean) - m(tag.at(x + j)) * slope) * scale;
          });
        }
    }
  };
  if (job.shares.joined)
    job.joined(
        a.y, [&](i64 c, i64 end, i64 k, i64 kend) { return JoinedGradients<T>({job, c, end, k, kend}, moments, w, parts, means); },
        settle);
  else
    job.in_turns(a.y && !a.given(), gather, settle, apply);
  return true;
}

}  // namespace
}  // namespace normkit
