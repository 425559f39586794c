// See call.h.
#include "call.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>

#include "threads.h"

namespace normkit {

Chosen chosen;

namespace {

constexpr int64_t kHugeBytes = 4 << 20;

int64_t stream_bytes() {
  const long cache = sysconf(_SC_LEVEL2_CACHE_SIZE);
  return std::max<int64_t>(4 << 20, 2 * std::max<int64_t>(cache, 0) * thread_count());
}

// Fewer page faults on memory that has not been touched yet; where it has, nothing happens.
void advise(void *data, int64_t bytes) {
  if (!chosen.hugepages || bytes < kHugeBytes) return;
  const uintptr_t page = 4096, start = (uintptr_t(data) + page - 1) / page * page, end = (uintptr_t(data) + bytes) / page * page;
  madvise(reinterpret_cast<void *>(start), end - start, MADV_HUGEPAGE);
}

}  // namespace

bool launch(Args &a, bool backward, int kind, decltype(Args::parallel) shared) {
  const int64_t bytes = a.size() * size_of(a.xtype);
  a.parallel = bytes < kParallelBytes ? serial : shared;
  a.stream = bytes > (4 << 20) && bytes > stream_bytes();
  if (a.y) advise(a.y, bytes);
  return run(*chosen.isa, backward, kind, a);
}

}  // namespace normkit
