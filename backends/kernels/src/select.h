// Which table of kernels this process uses.
#pragma once
#include "kernels.h"

namespace normkit {

struct Isa {
  const char *name;
  const Table *table;  // null: not built, or the processor has not got it
};

// All that were considered, best first; ends with a null name.
const Isa *instruction_sets();
// The one of this name, or the best where the name is null or empty; null if it cannot run here.
const Isa *select_isa(const char *name);

// Runs a kernel and counts the call; false where memory ran out.
bool run(const Isa &isa, bool backward, int kind, const Args &args);
// How many calls kernels have served in this process, whatever the library.
int64_t served(bool backward);

}  // namespace normkit
