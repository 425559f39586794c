// What the calls of kernels inside XLA programs have in common, whoever wrote the program.
#pragma once
#include <cstdint>

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
