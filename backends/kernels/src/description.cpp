// See description.h.
#include "description.h"

#include <algorithm>
#include <charconv>
#include <cstring>
#include <string_view>
#include <system_error>

#include "threads.h"

namespace normkit {

using namespace xla;

namespace {

constexpr int64_t kWakeBytes = 1 << 20;  // below, threads that sleep wake up too late
constexpr Slot kStats[] = {MEAN, RESIDUE, VAR, RSTD};

}  // namespace

int Description::type(Slot s) const { return s == MEAN || s == RESIDUE ? (args.center ? types[RSTD] : NONE) : s == VAR ? types[RSTD] : types[s]; }

bool Description::read(const char *at, size_t size) {
  const char *const end = at + size;
  bool whole = true;
  // Whatever the locale: strtod would take a comma.
  const auto number = [&](auto &value) {
    for (; at < end && *at == ' '; ++at) {}
    const std::from_chars_result found = std::from_chars(at, end, value);
    at = found.ptr, whole = whole && found.ec == std::errc();
  };
  const std::string_view first = std::string_view(at, size).substr(0, 6);
  if (first == "outer ") times = &Args::outer, at += 6;
  if (first == "inner ") times = &Args::inner, at += 6;
  int flags[2]{};
  number(flags[0]), number(kind);
  for (int64_t *n : {&args.outer, &args.groups, &args.channels, &args.inner}) number(*n);
  number(args.eps), number(args.offset), number(flags[1]);
  backward = flags[0] != 0, args.center = flags[1] != 0;
  for (int &type : types) number(type);
  if (!whole || at != end || !sane(kind, args)) return false;
  for (int s = 0; s < SLOTS; ++s)
    if (types[s] != NONE && ((s >= MEAN && s < RSTD) || types[s] < F32 || types[s] > BF16 || !fits(s, types[s], types[X]))) return false;
  const auto type_of = [&](Slot s) { return type(s); };
  return backward == (types[DY] != NONE) && complete(kind, args.center, type_of) && alike(type_of);
}

int64_t Description::count(int slot, int64_t length) const {
  if (slot == X || slot == DY || slot == Y) return args.size() * (times ? length : 1);
  if (slot != RSTD) return args.groups * args.channels;
  const int64_t rows = std::count_if(std::begin(kStats), std::end(kStats), [&](Slot s) { return type(s) != NONE; });
  return rows * sets(args) * (times == &Args::outer && kind != CHANNELS ? length : 1);
}

const char *Description::run(int64_t length, void *const (&arrays)[SLOTS]) const {
  const Subnormals subnormals;
  Args a = args;
  if (times) {
    int64_t &whole = a.*times;
    if (__builtin_mul_overflow(whole, length, &whole) || (length != 0 && !sane(kind, a))) return "a batch has a length that makes no sense";
  }
  void *at[SLOTS];
  std::copy(std::begin(arrays), std::end(arrays), at);
  if (char *row = static_cast<char *>(at[RSTD])) {
    const int64_t bytes = sets(a) * size_of(types[RSTD]);
    for (const Slot s : kStats)
      if (type(s) != NONE) at[s] = row, row += bytes;
  }
  if (times && length == 0) {  // a sum over nothing
    for (const Slot s : kStats)
      if (at[s] && !backward) memset(at[s], 0, size_t(sets(a) * size_of(types[RSTD])));
    for (const Slot s : {DWEIGHT, DBIAS, DMEAN, DVAR})
      if (at[s]) memset(at[s], 0, size_t(count(s, 0) * size_of(types[s])));
    return nullptr;
  }
  place(a, [&](Slot s) { return at[s]; }), set_types(a, [&](Slot s) { return types[s]; });
  // In a program our threads have slept since the call before; and in OpenMP each of TensorFlow's that calls would get a team.
  const bool large = a.size() * size_of(a.xtype) >= kWakeBytes;
  return launch(a, backward, kind, large ? pooled : serial) ? nullptr : "memory ran out";
}

}  // namespace normkit
