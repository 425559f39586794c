// See call.h.
#include "call.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>

#include "threads.h"

namespace normkit {

Chosen chosen;

namespace {

// Less is still in the caches when it is read next: in the cores' own, or in the one that they share, whose size virtual
// machines give wrong.
int64_t stream_bytes() {
  const int64_t own = sysconf(_SC_LEVEL2_CACHE_SIZE);
  return std::max<int64_t>(8 << 20, 2 * own * thread_count());
}

// The pages that [data, data + bytes) lies in, in pieces that end where large pages do.
struct Pages {
  char *start, *end;
  int64_t pieces;

  Pages(void *data, int64_t bytes) : end(static_cast<char *>(data) + bytes) {
    static const uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE));
    start = reinterpret_cast<char *>(uintptr_t(data) / page * page);
    pieces = int64_t((uintptr_t(end) - 1) / kHugePage - uintptr_t(start) / kHugePage) + 1;
  }
  // Whether a piece has no memory yet, by its middle; where the system does not say, it has.
  bool untouched(int64_t piece) const {
    const auto [from, to] = bounds(piece);
    unsigned char resident = 1;
    return mincore(Pages(from + (to - from) / 2, 1).start, 1, &resident) == 0 && !(resident & 1);
  }
  void fill(int64_t piece) const {
#ifdef MADV_POPULATE_WRITE
    const auto [from, to] = bounds(piece);
    if (untouched(piece)) madvise(from, size_t(to - from), MADV_POPULATE_WRITE);
#endif
  }

 private:
  struct Bounds {
    char *from, *to;
  };
  Bounds bounds(int64_t piece) const {
    char *large = reinterpret_cast<char *>((uintptr_t(start) / kHugePage + uintptr_t(piece)) * kHugePage);
    return {std::max(large, start), std::min(large + kHugePage, end)};
  }
};

// Fewer page faults on memory that has not been touched yet; where it has, nothing happens. Its first page may be others'
// as well: without it, what lies below the first boundary of large pages would get small ones. The system fills a page with
// zeros when it is first written, and a large one in each of the threads that meet in it: so it is done before, piece by piece,
// and from the last, which has small pages as the first has.
void prepare(const Args &a, void *data, int64_t bytes) {
  if (!chosen.hugepages || bytes < kHugeBytes) return;
  const Pages pages(data, bytes);
  madvise(pages.start, size_t(pages.end - pages.start), MADV_HUGEPAGE);
  bool any = false;
  for (int64_t i = 0; i < pages.pieces && !any; ++i) any = pages.untouched(i);
  if (!any) return;
  a.parallel(
      pages.pieces,
      [](void *context, int64_t i) {
        const Pages &pages = *static_cast<const Pages *>(context);
        pages.fill((i + pages.pieces - 1) % pages.pieces);
      },
      const_cast<Pages *>(&pages));
}

}  // namespace

bool launch(Args &a, bool backward, int kind, decltype(Args::parallel) shared) {
  const int64_t bytes = a.size() * size_of(a.xtype);
  a.parallel = bytes < kParallelBytes ? serial : shared;
  a.stream = bytes > stream_bytes();
  if (a.y) prepare(a, a.y, bytes);
  return run(*chosen.isa, backward, kind, a);
}

}  // namespace normkit
