// Gradients of channels.h: sums of dy and dy·x̂ for each channel, then dx; with given statistics in one pass.
#pragma once
#include "channels.h"
#include "rows_backward.h"

namespace normkit {
namespace {

template <class T> bool channels_backward(const Args &a) {
  using A = Acc<T>;
  using V = Vec<A>;
  const Channels<T> job(a, false);
  const Chunks &chunks = job.chunks;
  struct Sums {
    double dy, dyx;
  };
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
      V s[Shares::kBlock], q[Shares::kBlock];
      for (i64 i = c; i < end; ++i) s[i - c] = q[i - c] = V{};
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
  job.in_turns(a.y && !a.given(), gather, settle, apply);
  return true;
}

}  // namespace
}  // namespace normkit
