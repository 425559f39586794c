// What every call of a kernel has in common, wherever its arrays come from: threads, streaming stores, large pages.
#pragma once
#include "select.h"

namespace normkit {

constexpr int64_t kParallelBytes = 64 << 10;  // below, starting threads costs more than they save

// What the process chose when the module was imported.
struct Chosen {
  const Isa *isa = nullptr;
  bool hugepages = true;
};
extern Chosen chosen;

// Runs a forward or backward kernel; the task runner is only used where there is enough to share. False: memory ran out.
bool launch(Args &a, bool backward, int kind, decltype(Args::parallel) shared);

}  // namespace normkit
