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

void *page_of(const void *data, int64_t offset) {
  static const uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE));
  return reinterpret_cast<void *>((uintptr_t(data) + uintptr_t(offset)) / page * page);
}

// Whether memory has no pages yet, by a few places in it; where the system does not say, it has.
bool untouched(const void *data, int64_t bytes) {
  constexpr int places = 8;
  int missing = 0;
  for (int k = 0; k < places; ++k) {
    unsigned char resident = 1;
    if (mincore(page_of(data, bytes / places * k + bytes / places / 2), 1, &resident) != 0) return false;
    missing += !(resident & 1);
  }
  return 2 * missing > places;
}

// Fewer page faults on memory that has not been touched yet; where it has, nothing happens. Its first page may be others'
// as well: without it, what lies below the first boundary of large pages would get small ones.
void advise(void *data, int64_t bytes) {
  if (!chosen.hugepages || bytes < kHugeBytes) return;
  const auto start = static_cast<char *>(page_of(data, 0));
  madvise(start, size_t(static_cast<char *>(data) + bytes - start), MADV_HUGEPAGE);
}

}  // namespace

bool launch(Args &a, bool backward, int kind, decltype(Args::parallel) shared) {
  const int64_t bytes = a.size() * size_of(a.xtype);
  a.parallel = bytes < kParallelBytes ? serial : shared;
  a.stream = bytes > (4 << 20) && bytes > stream_bytes();
  a.fresh = a.stream && a.y && kind == ROWS && untouched(a.y, bytes);
  // The system fills a page with zeros when it is first written, in the caches: past them, it would be written twice. Channels
  // are written a piece of each page at a time, long after that.
  if (a.fresh) a.stream = false;
  if (a.y) advise(a.y, bytes);
  return run(*chosen.isa, backward, kind, a);
}

}  // namespace normkit
