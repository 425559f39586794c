// The plain C interface between the binding and the kernels: one argument block, one table of functions per instruction set.
#pragma once
#include <cstdint>

namespace normkit {

enum Type : int { F32 = 0, F64 = 1, F16 = 2, BF16 = 3, NONE = -1 };

constexpr int64_t kHugePage = 2 << 20, kHugeBytes = 4 << 20;  // fresh memory is asked to be in such pages from so many bytes on

inline int64_t size_of(int type) { return type == F64 ? 8 : type == F32 ? 4 : 2; }

// How x is laid out, and which elements make up one statistic. Everything is dense.
//   rows      x[outer][groups][channels][inner]   one statistic per (outer, group), weight[groups][channels]
//   channels  x[outer][channels][inner]           one statistic per channel (groups = 1)
//   columns   x[outer][inner][groups][channels]   one statistic per (outer, group), weight[groups][channels]
// Layer norm is rows with groups = inner = 1; batch norm is channels, or columns with outer = channels = 1.
// The statistics have the accumulation type: double for double, float for everything narrower.
struct Args {
  const void *x, *dy;
  const void *weight, *bias;            // null: one, zero
  const void *given_mean, *given_var;   // statistics brought along (channels and columns), one per weight
  void *y;                              // y in a forward, dx in a backward call (null: not wanted)
  void *mean, *residue, *var, *rstd;    // written by a forward call (null: not wanted), read by a backward call
  void *dweight, *dbias, *dmean, *dvar; // in the types of what they are gradients of (null: not wanted)
  int64_t outer, groups, channels, inner;
  double eps, offset;                   // offset is added to the weight
  int xtype, wtype, btype, mtype, vtype;
  bool center;
  bool stream;                          // write y past the caches
  // Calls task(context, i) for each i < tasks, in any order and on any thread, and returns when all have.
  void (*parallel)(int64_t tasks, void (*task)(void *context, int64_t i), void *context);

  bool given() const { return given_mean != nullptr; }
  bool parameters() const { return dweight || dbias || dmean || dvar; }  // whether a gradient other than dx is wanted
  int64_t size() const { return outer * groups * channels * inner; }
};

enum Kind : int { ROWS = 0, CHANNELS = 1, COLUMNS = 2 };

inline int64_t sets_of(Kind kind, const Args &a) { return kind == CHANNELS ? a.channels : a.outer * a.groups; }

// The set and the parameter of element i.
inline void place(Kind kind, const Args &a, int64_t i, int64_t &set, int64_t &param) {
  if (kind == CHANNELS) {
    set = param = i / a.inner % a.channels;
  } else if (kind == ROWS) {
    param = i / a.inner % (a.groups * a.channels);
    set = i / (a.inner * a.channels);
  } else {
    param = i % (a.groups * a.channels);
    set = i / (a.groups * a.channels * a.inner) * a.groups + param / a.channels;
  }
}

// Return false where memory ran out.
struct Table {
  bool (*forward[3])(const Args &);
  bool (*backward[3])(const Args &);
};

const Table &table_v2();
const Table &table_v3();
const Table &table_v4();
const Table &table_v4_bf16();
const Table &table_base();

}  // namespace normkit
