// What the calls of kernels inside XLA programs have in common, whoever wrote the program.
#pragma once
#include <cstdint>
#include <initializer_list>

#include "kernels.h"

namespace normkit::xla {

// The arrays of a call, in the order in which those that are there are passed; the same as SLOTS in backends/kernels/programs.py.
enum Slot { X, DY, WEIGHT, BIAS, GIVEN_MEAN, GIVEN_VAR, Y, MEAN, RESIDUE, VAR, RSTD, DWEIGHT, DBIAS, DMEAN, DVAR, SLOTS };
inline constexpr const char *kNames[SLOTS] = {"x",       "dy",  "weight", "bias",    "given_mean", "given_var", "y",   "mean",
                                              "residue", "var", "rstd",   "dweight", "dbias",      "dmean",     "dvar"};

// The arguments of a kernel: where each slot's array is, null where there is none; and of what dtypes they are.
template <class At> void place(Args &a, At at) {
  a.x = at(X), a.dy = at(DY), a.weight = at(WEIGHT), a.bias = at(BIAS), a.given_mean = at(GIVEN_MEAN), a.given_var = at(GIVEN_VAR);
  a.y = at(Y), a.mean = at(MEAN), a.residue = at(RESIDUE), a.var = at(VAR), a.rstd = at(RSTD);
  a.dweight = at(DWEIGHT), a.dbias = at(DBIAS), a.dmean = at(DMEAN), a.dvar = at(DVAR);
}
template <class TypeOf> void set_types(Args &a, TypeOf type) {
  const auto either = [&](Slot gradient, Slot of) { return type(of) == NONE ? type(gradient) : type(of); };
  a.xtype = type(X), a.wtype = either(DWEIGHT, WEIGHT), a.btype = either(DBIAS, BIAS);
  a.mtype = type(GIVEN_MEAN), a.vtype = type(GIVEN_VAR);
}

// Whether there is a kernel for sizes like these.
inline bool sane(int64_t kind, const Args &a, int64_t instances = 1) {
  int64_t size = 1;
  bool whole = kind >= ROWS && kind <= COLUMNS && instances >= 0 && (kind != CHANNELS || a.groups == 1);
  for (int64_t n : {a.outer, a.groups, a.channels, a.inner}) whole = whole && n > 0 && !__builtin_mul_overflow(size, n, &size);
  return whole && !__builtin_mul_overflow(size, instances ? instances : 1, &size);
}

// Whether an array of this type can be slot s of a call on an x of that type.
inline bool fits(int s, int type, int x) {
  if (s >= MEAN && s <= RSTD) return type == (x == F64 ? F64 : F32);
  return type != NONE && (type == x || (s != X && s != DY && s != Y));
}

// Whether gradients have the types of what they are the gradients of.
template <class TypeOf> bool alike(TypeOf type) {
  const auto like = [&](Slot gradient, Slot of) { return type(gradient) == NONE || type(of) == NONE || type(gradient) == type(of); };
  return like(DWEIGHT, WEIGHT) && like(DBIAS, BIAS) && like(DMEAN, GIVEN_MEAN) && like(DVAR, GIVEN_VAR);
}

// Whether arrays of these types make up a call, all that is to be written is, and all that is to be read is there.
template <class TypeOf> bool complete(int64_t kind, bool center, TypeOf type) {
  const auto is = [&](Slot s) { return type(s) != NONE; };
  const bool given = is(GIVEN_MEAN), stats = is(MEAN) || is(RESIDUE) || is(VAR) || is(RSTD), moved = is(DMEAN) || is(DVAR);
  if (!is(X) || given != is(GIVEN_VAR) || (given && kind == ROWS) || (moved && !given)) return false;
  if (!is(DY)) return is(Y) && !(given && stats) && !is(DWEIGHT) && !is(DBIAS) && !moved;
  return given || (is(RSTD) && (!center || (is(MEAN) && is(RESIDUE))));
}

// XLA's threads take subnormal numbers for zero, and half precision has many of them: here they count, as everywhere else.
class Subnormals {
 public:
  Subnormals() : before_(get()) { set(before_ & ~kFlush); }
  ~Subnormals() { set(before_); }

 private:
#if defined(__x86_64__)
  using Word = unsigned;
  static constexpr Word kFlush = 0x8040;
  static Word get() { return __builtin_ia32_stmxcsr(); }
  static void set(Word word) { __builtin_ia32_ldmxcsr(word); }
#elif defined(__aarch64__)
  using Word = uint64_t;
  static constexpr Word kFlush = (1 << 24) | (1 << 19);
  static Word get() {
    Word word;
    asm volatile("mrs %0, fpcr" : "=r"(word));
    return word;
  }
  static void set(Word word) { asm volatile("msr fpcr, %0" ::"r"(word)); }
#else
  using Word = int;
  static constexpr Word kFlush = 0;
  static Word get() { return 0; }
  static void set(Word) {}
#endif
  const Word before_;
};

}  // namespace normkit::xla
