// See tensorflow.h. Two functions of TensorFlow's XLA are looked up by name: nothing is linked, and no header of it is read.
#include "tensorflow.h"

#include <dlfcn.h>

#include <charconv>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <string>
#include <string_view>
#include <system_error>

#include "call.h"
#include "programs.h"
#include "threads.h"

namespace normkit {
namespace {

using namespace xla;

constexpr int64_t kWakeBytes = 1 << 20;  // below, threads that sleep wake up too late

// There is no way to say what is wrong, and memory that nobody wrote is no answer.
[[noreturn]] void give_up(const char *what, const char *text, size_t size) {
  fprintf(stderr, "normkit: %s in a call from an XLA program: %.*s\n", what, int(size), text);
  abort();
}

// The description that backends/kernels/programs.py writes: the size that is times the product of lengths that the program did
// not know, if that is an operand (before all others); whether backward, a route, eps and offset, whether centred, and the dtype
// of each slot, as in Type. The statistics are one array, in the place of the last of them.
struct Call {
  Args args{};
  bool backward = false;
  int kind = 0, types[SLOTS];
  int64_t Args::*times = nullptr;

  int type(Slot s) const { return s == MEAN || s == RESIDUE ? (args.center ? types[RSTD] : NONE) : s == VAR ? types[RSTD] : types[s]; }
  bool read(const char *at, const char *end) {
    bool whole = true;
    // Whatever the locale: strtod would take a comma.
    const auto number = [&](auto &value) {
      for (; at < end && *at == ' '; ++at) {}
      const std::from_chars_result found = std::from_chars(at, end, value);
      at = found.ptr, whole = whole && found.ec == std::errc();
    };
    const std::string_view first = std::string_view(at, size_t(end - at)).substr(0, 6);
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
};

}  // namespace

void custom_call(void *out, void *const *operands, const char *text, size_t size, void *) {
  const Subnormals subnormals;
  Call call;
  if (!call.read(text, text + size)) give_up("what was asked for makes no sense", text, size);
  const int64_t length = call.times ? *static_cast<const int64_t *>(*operands++) : 1;
  if (call.times) {
    int64_t &whole = call.args.*call.times;
    if (__builtin_mul_overflow(whole, length, &whole) || (length != 0 && !sane(call.kind, call.args))) {
      give_up("a batch has a length that makes no sense", text, size);
    }
  }
  const auto result = [&](int s) { return s >= DWEIGHT || s == Y || (s == RSTD && !call.backward); };
  int count = 0;
  for (int s = 0; s < SLOTS; ++s) count += call.types[s] != NONE && result(s);
  void *const *results = count == 1 ? &out : static_cast<void *const *>(out);
  void *at[SLOTS];
  for (int s = 0; s < SLOTS; ++s) at[s] = call.types[s] == NONE ? nullptr : result(s) ? *results++ : *operands++;
  Args &a = call.args;
  if (char *row = static_cast<char *>(at[RSTD])) {
    const int64_t bytes = (call.kind == CHANNELS ? a.channels : a.outer * a.groups) * size_of(call.types[RSTD]);
    for (const Slot s : {MEAN, RESIDUE, VAR, RSTD})
      if (call.type(s) != NONE) at[s] = row, row += bytes;
  }
  if (length == 0) {  // a sum over nothing
    const int64_t sets = call.kind == CHANNELS ? a.channels : a.outer * a.groups;
    for (const Slot s : {MEAN, RESIDUE, VAR, RSTD})
      if (at[s] && !call.backward) memset(at[s], 0, size_t(sets * size_of(call.types[RSTD])));
    for (const Slot s : {DWEIGHT, DBIAS, DMEAN, DVAR})
      if (at[s]) memset(at[s], 0, size_t(a.groups * a.channels * size_of(call.types[s])));
    return;
  }
  place(a, [&](Slot s) { return at[s]; }), set_types(a, [&](Slot s) { return call.types[s]; });
  // In a program our threads have slept since the call before; and in OpenMP each of TensorFlow's that calls would get a team.
  const bool large = a.size() * size_of(a.xtype) >= kWakeBytes;
  if (!launch(a, call.backward, call.kind, large ? pooled : serial)) give_up("memory ran out", text, size);
}

bool register_custom_call(const char *library) {
  void *const loaded = dlopen(library, RTLD_LAZY | RTLD_NOLOAD);
  if (!loaded) return false;
  const auto global = reinterpret_cast<void *(*)()>(dlsym(loaded, "_ZN3xla24CustomCallTargetRegistry6GlobalEv"));
  const auto add = reinterpret_cast<void (*)(void *, const std::string &, void *, const std::string &)>(
      dlsym(loaded, "_ZN3xla24CustomCallTargetRegistry8RegisterERKNSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEEPvS8_"));
  if (!global || !add) return false;
  add(global(), "normkit", reinterpret_cast<void *>(custom_call), "Host");
  return true;
}

}  // namespace normkit
