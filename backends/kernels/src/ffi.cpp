// The kernels inside XLA programs on the CPU, with XLA's threads. One handler serves every call: the attributes say which.
#include "ffi.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <thread>

#include "call.h"
#include "programs.h"
#include "threads.h"

namespace normkit::xla {
namespace {

constexpr int64_t kSharedBytes = 256 << 10;  // XLA's threads start slower than others: below, one is as fast as two

struct Memory {
  char *data = nullptr;
  int type = NONE;
  int64_t step = 0;  // bytes from one instance of the call to the next; 0: shared by all
};

struct Call {
  Args args{};
  int64_t kind = 0, instances = 1;
  bool backward = false;
  Memory memory[SLOTS];
};

template <class T, class F> bool holds(const T *value, F T::*last) {
  return value && value->size >= size_t(reinterpret_cast<const char *>(&(value->*last) + 1) - reinterpret_cast<const char *>(value));
}

__attribute__((format(printf, 3, 4))) Error *refuse(const Frame *frame, int code, const char *format, ...) {
  char text[256];
  va_list values;
  va_start(values, format);
  vsnprintf(text, sizeof text, format, values);
  va_end(values);
  ErrorArguments arguments{sizeof arguments, nullptr, text, code};
  return frame->api->create_error(&arguments);
}

int type_of(int element) {
  switch (element) {
    case kFloat16: return F16;
    case kFloat32: return F32;
    case kFloat64: return F64;
    case kBfloat16: return BF16;
    default: return NONE;
  }
}

// Sizes and options; null where they make sense.
Error *describe(const Frame *frame, Call &call, int64_t &operands, int64_t &results, int64_t &batched) {
  Args &a = call.args;
  int64_t center = 0;
  // XLA sorts attributes by name.
  const struct {
    const char *name;
    int type;
    void *out;
  } known[] = {{"batch", kInt64, &call.instances}, {"batched", kInt64, &batched}, {"center", kInt64, &center},
               {"channels", kInt64, &a.channels},  {"eps", kFloat64, &a.eps},     {"groups", kInt64, &a.groups},
               {"inner", kInt64, &a.inner},        {"kind", kInt64, &call.kind},  {"offset", kFloat64, &a.offset},
               {"operands", kInt64, &operands},    {"outer", kInt64, &a.outer},   {"results", kInt64, &results}};
  const Attributes &given = frame->attributes;
  int64_t i = 0;
  for (const auto &[name, type, out] : known) {
    const Scalar *scalar = i < given.count && given.kinds[i] == kScalar ? static_cast<const Scalar *>(given.values[i]) : nullptr;
    if (!scalar || scalar->type != type || given.names[i]->size != strlen(name) || memcmp(given.names[i]->data, name, strlen(name)))
      return refuse(frame, kInvalidArgument, "normkit: attribute %lld must be %s, an %s.", (long long)i, name,
                    type == kInt64 ? "int64" : "float64");
    memcpy(out, scalar->value, 8), ++i;
  }
  a.center = center != 0;
  if (!sane(call.kind, a, call.instances))
    return refuse(frame, kInvalidArgument, "normkit: the call needs a known kind and positive sizes.");
  return nullptr;
}

// The buffers, each of the size and dtype that it must have; null where they do.
Error *gather(const Frame *frame, Call &call, int64_t operands, int64_t results, int64_t batched) {
  Args &a = call.args;
  Memory *m = call.memory;
  const int64_t params = a.groups * a.channels, sets = call.kind == CHANNELS ? a.channels : a.outer * a.groups;
  int64_t next[2] = {0, 0};
  for (int s = 0; s < SLOTS; ++s)
    for (const bool written : {false, true}) {
      const Buffers &list = written ? frame->results : frame->operands;
      if (!((written ? results : operands) >> s & 1)) continue;
      if (next[written] >= list.count) return refuse(frame, kInvalidArgument, "normkit: %s is missing.", kNames[s]);
      const int64_t i = next[written]++;
      const Buffer *buffer = list.items[i];
      if (list.kinds[i] != kBuffer || !holds(buffer, &Buffer::shape))
        return refuse(frame, kInvalidArgument, "normkit: %s is not a buffer of this version of the interface.", kNames[s]);
      const bool large = s == X || s == DY || s == Y, stats = s >= MEAN && s <= RSTD, many = written || (batched >> s & 1);
      int64_t count = 1;
      for (int64_t d = 0; d < buffer->rank; ++d) count *= buffer->shape[d];
      const int64_t one = large ? a.size() : stats ? sets : params, wanted = many ? one * call.instances : one;
      const int type = type_of(buffer->type);
      if (count != wanted || !fits(s, type, s == X ? type : m[X].type) || m[s].type != NONE)
        return refuse(frame, kInvalidArgument, "normkit: %s has %lld elements of type %d, and must have %lld of a dtype that fits x.",
                      kNames[s], (long long)count, buffer->type, (long long)wanted);
      m[s] = {static_cast<char *>(buffer->data), type, many ? one * size_of(type) : 0};
    }
  const auto type = [&](Slot s) { return m[s].type; };
  call.backward = m[DY].type != NONE;
  if (next[0] != frame->operands.count || next[1] != frame->results.count || !complete(call.kind, a.center, type))
    return refuse(frame, kInvalidArgument, "normkit: the arrays do not make up a call.");
  if (!alike(type))
    return refuse(frame, kInvalidArgument, "normkit: a gradient must have the dtype of what it is the gradient of.");
  set_types(a, type);
  return nullptr;
}

// Instances whose rows follow each other in memory and share their parameters are one call with more rows.
void fold(Call &call) {
  const Memory *m = call.memory;
  bool one = call.kind != CHANNELS || m[GIVEN_MEAN].type != NONE;
  for (int s : {X, DY, MEAN, RESIDUE, VAR, RSTD}) one = one && (m[s].type == NONE || m[s].step);
  for (int s : {WEIGHT, BIAS, GIVEN_MEAN, GIVEN_VAR, DWEIGHT, DBIAS, DMEAN, DVAR}) one = one && (m[s].type == NONE || !m[s].step);
  if (one) call.args.outer *= call.instances, call.instances = 1;
}

Args instance(const Call &call, int64_t i) {
  Args a = call.args;
  place(a, [&](Slot s) { return call.memory[s].data + i * call.memory[s].step; });
  return a;
}

// Whose threads the call on this thread may use.
struct Pool {
  const Frame *frame;
  int64_t threads;
};
thread_local const Pool *pool = nullptr;

// Tasks that several threads take; the last of them to let go frees it, as one that was woken too late may come after the end.
struct Region {
  int64_t tasks;
  Task task;
  void *context;
  std::atomic<int> owners;
  std::atomic<int64_t> next{0}, done{0};
  std::mutex mutex;
  std::condition_variable finished;

  Region(int64_t tasks, Task task, void *context, int owners) : tasks(tasks), task(task), context(context), owners(owners) {}
  void work() {
    const Subnormals subnormals;
    int64_t mine = 0;
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks; ++mine) task(context, i);
    if (mine && done.fetch_add(mine, std::memory_order_acq_rel) + mine == tasks) {
      std::lock_guard<std::mutex> guard(mutex);
      finished.notify_all();
    }
  }
  void wait() {
    const auto ended = [&] { return done.load(std::memory_order_acquire) == tasks; };
    for (int spin = 0; spin < 200 && !ended(); ++spin) std::this_thread::yield();
    std::unique_lock<std::mutex> guard(mutex);
    finished.wait(guard, ended);
  }
  void release() {
    if (owners.fetch_sub(1, std::memory_order_acq_rel) == 1) delete this;
  }
};

// The caller works too, and waits only for threads that took a task: none of XLA's need be free.
void shared(int64_t tasks, Task task, void *context) {
  const Pool *own = pool;
  const int64_t threads = !own || tasks < own->threads ? tasks : own->threads;
  Region *region = own && threads > 1 ? new (std::nothrow) Region(tasks, task, context, int(threads)) : nullptr;
  if (!region) return serial(tasks, task, context);
  const Api *api = own->frame->api;
  for (int64_t t = 1; t < threads; ++t) {
    const auto help = [](void *data) {
      static_cast<Region *>(data)->work();
      static_cast<Region *>(data)->release();
    };
    ScheduleArguments arguments{sizeof arguments, nullptr, own->frame->context, help, region};
    if (Error *error = api->schedule(&arguments)) {
      DestroyArguments destroy{sizeof destroy, nullptr, error};
      api->destroy_error(&destroy);
      region->release();
    }
  }
  region->work();
  region->wait();
  region->release();
}

int64_t threads_of(const Frame *frame) {
  int64_t threads = 1;
  ThreadsArguments arguments{sizeof arguments, nullptr, frame->context, &threads};
  if (!holds(frame->api, &Api::threads)) return 1;
  if (Error *error = frame->api->threads(&arguments)) {
    DestroyArguments destroy{sizeof destroy, nullptr, error};
    frame->api->destroy_error(&destroy);
    return 1;
  }
  const int most = thread_limit();
  return most > 0 && most < threads ? most : threads;
}

bool execute(const Frame *frame, Call &call) {
  const Subnormals subnormals;
  const Pool mine{frame, threads_of(frame)};
  struct Restore {
    const Pool *before = pool;
    ~Restore() { pool = before; }
  } restore;
  pool = &mine;
  const int64_t bytes = call.args.size() * size_of(call.args.xtype);
  if (call.instances == 1 || bytes >= kSharedBytes) {
    for (int64_t i = 0; i < call.instances; ++i) {
      Args a = instance(call, i);
      if (!launch(a, call.backward, int(call.kind), bytes < kSharedBytes ? serial : shared)) return false;
    }
    return true;
  }
  // Instances too small to be shared are shared out whole.
  struct Batch {
    const Call &call;
    int64_t per;
    std::atomic<bool> done{true};
  } batch{call, kParallelBytes / bytes + 1};
  const auto some = [](void *context, int64_t task) {
    Batch &b = *static_cast<Batch *>(context);
    for (int64_t i = task * b.per; i < (task + 1) * b.per && i < b.call.instances; ++i) {
      Args a = instance(b.call, i);
      if (!launch(a, b.call.backward, int(b.call.kind), serial)) b.done = false;
    }
  };
  shared((call.instances + batch.per - 1) / batch.per, some, &batch);
  return batch.done;
}

}  // namespace

Error *handle(Frame *frame) {
  const bool known = holds(frame->api, &Api::create_error) && frame->api->version.major == kMajor;
  if (frame->extensions && frame->extensions->type == kMetadata) {
    // The newest version that both sides know; what is out of range, XLA refuses in its own words.
    Metadata *asked = reinterpret_cast<MetadataExtension *>(frame->extensions)->metadata;
    const int minor = known ? frame->api->version.minor : kOldestMinor;  // older ones do not say
    if (holds(asked, &Metadata::version))
      asked->version = {sizeof(Version), nullptr, kMajor, std::min(std::max(minor, kOldestMinor), kNewestMinor)};
    return nullptr;
  }
  if (!known) abort();  // not reached: such a version is refused when the handler is registered
  if (!holds(frame, &Frame::attributes) || !holds(&frame->operands, &Buffers::items) || !holds(&frame->results, &Buffers::items) ||
      !holds(&frame->attributes, &Attributes::values))
    return refuse(frame, kInvalidArgument, "normkit: the call frame is older than version %d.%d of the interface.", kMajor, kOldestMinor);
  if (frame->stage != kExecute) return refuse(frame, kInvalidArgument, "normkit: the handler is for execution only.");
  Call call;
  int64_t operands, results, batched;
  if (Error *error = describe(frame, call, operands, results, batched)) return error;
  if (Error *error = gather(frame, call, operands, results, batched)) return error;
  if (!call.instances) return nullptr;
  fold(call);
  if (!execute(frame, call)) return refuse(frame, kExhausted, "normkit: memory ran out.");
  return nullptr;
}

}  // namespace normkit::xla
