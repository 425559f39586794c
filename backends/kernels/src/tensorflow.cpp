// See tensorflow.h. Two functions of TensorFlow's XLA are looked up by name: nothing is linked, and no header of it is read.
#include "tensorflow.h"

#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <string>

#include "call.h"
#include "programs.h"
#include "threads.h"

namespace normkit {
namespace {

using namespace xla;

// There is no way to say what is wrong, and memory that nobody wrote is no answer.
[[noreturn]] void give_up(const char *what, const char *text, size_t size) {
  fprintf(stderr, "normkit: %s in a call from an XLA program: %.*s\n", what, int(size), text);
  abort();
}

// The description that backends/tensorflow/compiled.py writes: whether backward, a route, eps and offset, whether centred, and the
// dtype of each slot, as in Type. The statistics are one array, in the place of the last of them.
struct Call {
  Args args{};
  long long backward = 0, kind = 0;
  int types[SLOTS];

  bool read(std::string text) {
    char *at = text.data();
    const auto whole = [&] { return strtoll(at, &at, 10); };
    backward = whole(), kind = whole();
    int64_t size = 1;
    bool sane = kind >= ROWS && kind <= COLUMNS;
    for (int64_t *n : {&args.outer, &args.groups, &args.channels, &args.inner})
      sane = (*n = whole()) > 0 && sane && !__builtin_mul_overflow(size, *n, &size);
    args.eps = strtod(at, &at), args.offset = strtod(at, &at), args.center = whole() != 0;
    for (int &type : types) type = int(whole()), sane = sane && type >= NONE && type <= BF16;
    return sane && *at == 0 && types[X] != NONE;
  }
};

// What XLA calls: out is the memory of the result, and where there are several a list of theirs. All are in row-major order.
void custom_call(void *out, void *const *operands, const char *text, size_t size, void *) {
  const Subnormals subnormals;
  Call call;
  if (!call.read(std::string(text, size))) give_up("what was asked for makes no sense", text, size);
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
      if (a.center || s >= VAR) at[s] = row, row += bytes;
  }
  place(a, [&](Slot s) { return at[s]; }), set_types(a, [&](Slot s) { return call.types[s]; });
  if (!launch(a, call.backward != 0, int(call.kind), parallel)) give_up("memory ran out", text, size);
}

}  // namespace

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
