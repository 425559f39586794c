// The table of kernels for the instruction set that this file is compiled for; it is compiled once for each.
#include "channels_backward.h"
#include "columns_backward.h"
#include "extremes.h"

#ifndef NORMKIT_TABLE
#define NORMKIT_TABLE table_base
#endif

namespace normkit {
namespace {

// Past the caches only where whole vectors are written: a partly written line costs several times its share.
template <class T> bool may_stream(const Args &a, Kind kind) {
  constexpr int W = kBytes / sizeof(T);
  if (!a.stream || !a.y || uintptr_t(a.y) % sizeof(T)) return false;
  const bool aligned = uintptr_t(a.y) % kBytes == 0;
  if (kind == COLUMNS) return aligned && Columns<T>(a).width % W == 0 && (a.outer == 1 || a.size() / a.outer % W == 0);
  const bool along = kind == ROWS && a.inner == 1;
  const i64 run = along ? a.channels : a.inner;
  // Pairs of parameters start where the row does.
  return (run >= 1024 && !(along && kOddAndEven<T>)) || (kind == ROWS && aligned && run % W == 0);
}

template <Kind kind, bool backward, template <class> class Call> bool typed(const Args &a) {
  const auto call = [&](auto t) {
    using T = decltype(t);
    Args args = a;
    args.stream = may_stream<T>(args, kind);
    if constexpr (backward)
      if (too_wide<Acc<T>>(args, kind)) return backward_of_wide<T>(args, kind);
    return Call<T>::call(args);
  };
#if defined(__AVX512BF16__)
  // What these instructions are of no use for, others have compiled.
  return a.xtype == BF16 ? call(bfloat{}) : (backward ? table_v4().backward : table_v4().forward)[kind](a);
#else
  return with_type(a.xtype, call);
#endif
}

#define NORMKIT_KERNEL(name) \
  template <class T> struct Call_##name { \
    static bool call(const Args &a) { return name<T>(a); } \
  };
NORMKIT_KERNEL(rows_forward)
NORMKIT_KERNEL(rows_backward)
NORMKIT_KERNEL(channels_forward)
NORMKIT_KERNEL(channels_backward)
NORMKIT_KERNEL(columns_forward)
NORMKIT_KERNEL(columns_backward)
#undef NORMKIT_KERNEL

}  // namespace

const Table &NORMKIT_TABLE() {
  static const Table table = {
      {typed<ROWS, false, Call_rows_forward>, typed<CHANNELS, false, Call_channels_forward>,
       typed<COLUMNS, false, Call_columns_forward>},
      {typed<ROWS, true, Call_rows_backward>, typed<CHANNELS, true, Call_channels_backward>,
       typed<COLUMNS, true, Call_columns_backward>},
  };
  return table;
}

}  // namespace normkit
