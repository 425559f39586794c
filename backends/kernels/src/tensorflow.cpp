// See tensorflow.h. Two functions of TensorFlow's XLA are looked up by name: nothing is linked, and no header of it is read.
#include "tensorflow.h"

#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <string>

#include "description.h"

namespace normkit {
namespace {

using namespace xla;

// There is no way to say what is wrong, and memory that nobody wrote is no answer.
[[noreturn]] void give_up(const char *what, const char *text, size_t size) {
  fprintf(stderr, "normkit: %s in a call from an XLA program: %.*s\n", what, int(size), text);
  abort();
}

}  // namespace

void custom_call(void *out, void *const *operands, const char *text, size_t size, void *) {
  Description call;
  if (!call.read(text, size)) give_up("what was asked for makes no sense", text, size);
  const int64_t length = call.times ? *static_cast<const int64_t *>(*operands++) : 1;
  int count = 0;
  for (int s = 0; s < SLOTS; ++s) count += call.there(s) && call.is_result(s);
  void *const *results = count == 1 ? &out : static_cast<void *const *>(out);
  void *at[SLOTS];
  for (int s = 0; s < SLOTS; ++s) at[s] = !call.there(s) ? nullptr : call.is_result(s) ? *results++ : *operands++;
  if (const char *wrong = call.run(length, at)) give_up(wrong, text, size);
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
