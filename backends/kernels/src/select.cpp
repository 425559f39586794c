// See select.h.
#include "select.h"

#include <atomic>
#include <cstring>

namespace normkit {
namespace {

#if defined(__x86_64__) && defined(NORMKIT_X86_64)
#if defined(__clang__)
#define NORMKIT_V2 __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("popcnt")
#define NORMKIT_V3 \
  __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2")
#define NORMKIT_V4 \
  NORMKIT_V3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") && \
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")
#else
#define NORMKIT_V2 __builtin_cpu_supports("x86-64-v2")
#define NORMKIT_V3 __builtin_cpu_supports("x86-64-v3")
#define NORMKIT_V4 __builtin_cpu_supports("x86-64-v4")
#endif
#define NORMKIT_V4_BF16 NORMKIT_V4 && __builtin_cpu_supports("avx512bf16")
#endif

struct Sets {
  Isa list[5] = {};
  Sets() {
    int n = 0;
#if defined(NORMKIT_V2)
    __builtin_cpu_init();
    list[n++] = {"x86-64-v4+bf16", NORMKIT_V4_BF16 ? &table_v4_bf16() : nullptr};
    list[n++] = {"x86-64-v4", NORMKIT_V4 ? &table_v4() : nullptr};
    list[n++] = {"x86-64-v3", NORMKIT_V3 ? &table_v3() : nullptr};
    list[n++] = {"x86-64-v2", NORMKIT_V2 ? &table_v2() : nullptr};
#elif defined(__aarch64__)
    list[n++] = {"aarch64", &table_base()};
#else
    list[n++] = {"base", &table_base()};
#endif
  }
};

std::atomic<int64_t> calls[2] = {};

}  // namespace

const Isa *instruction_sets() {
  static const Sets sets;
  return sets.list;
}

const Isa *select_isa(const char *name) {
  for (const Isa *isa = instruction_sets(); isa->name; ++isa)
    if (isa->table && (!name || !*name || !strcmp(name, isa->name))) return isa;
  return nullptr;
}

bool run(const Isa &isa, bool backward, int kind, const Args &args) {
  if (!(backward ? isa.table->backward : isa.table->forward)[kind](args)) return false;
  calls[backward].fetch_add(1, std::memory_order_relaxed);
  return true;
}

int64_t served(bool backward) { return calls[backward].load(std::memory_order_relaxed); }

}  // namespace normkit
