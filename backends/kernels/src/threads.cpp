// See threads.h. No OpenMP runtime is linked: its entry points are looked up in what is loaded, so that the pool of a library
// such as PyTorch is shared and its limits (OMP_NUM_THREADS, torch.set_num_threads, threadpoolctl) hold here too.
#include "threads.h"

#include <dlfcn.h>
#include <link.h>
#include <pthread.h>
#include <sched.h>
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

namespace normkit {
namespace {

struct OpenMP {
  void (*parallel)(void (*)(void *), void *, unsigned, unsigned) = nullptr;
  int (*max_threads)() = nullptr;
  int (*in_parallel)() = nullptr;

  bool load(void *library) {
    if (!library) return false;
    parallel = reinterpret_cast<decltype(parallel)>(dlsym(library, "GOMP_parallel"));
    max_threads = reinterpret_cast<decltype(max_threads)>(dlsym(library, "omp_get_max_threads"));
    in_parallel = reinterpret_cast<decltype(in_parallel)>(dlsym(library, "omp_in_parallel"));
    return parallel && max_threads && in_parallel;
  }
};

std::atomic<const OpenMP *> found_openmp{nullptr};
std::atomic<unsigned long long> searched_at{0};  // how many libraries had been loaded when none was found
std::atomic<int> limit{0};
std::atomic<bool> forked{false};
thread_local bool inside = false;

int visit(dl_phdr_info *info, size_t, void *data) {
  const char *name = info->dlpi_name ? info->dlpi_name : "";
  const char *base = strrchr(name, '/');
  base = base ? base + 1 : name;
  for (const char *known : {"libgomp", "libiomp5", "libomp"})
    if (!strncmp(base, known, strlen(known))) {
      strncpy(static_cast<char *>(data), name, 4095);
      return 1;
    }
  return 0;
}

const OpenMP *openmp() {
  if (forked) return nullptr;  // its threads do not survive a fork, and libgomp does not notice
  if (const OpenMP *known = found_openmp) return known;
  unsigned long long loaded = 0;
  dl_iterate_phdr([](dl_phdr_info *info, size_t, void *n) { return *static_cast<unsigned long long *>(n) = info->dlpi_adds, 1; }, &loaded);
  if (loaded == searched_at) return nullptr;
  OpenMP runtime;
  bool found = runtime.load(dlopen("libgomp.so.1", RTLD_NOLOAD | RTLD_LAZY));
  if (!found) {
    char path[4096] = "";
    if (dl_iterate_phdr(visit, path)) found = runtime.load(dlopen(path, RTLD_NOLOAD | RTLD_LAZY));
  }
  if (!found) {
    searched_at = loaded;
    return nullptr;
  }
  const OpenMP *fresh = new OpenMP(runtime), *none = nullptr;
  if (!found_openmp.compare_exchange_strong(none, fresh)) delete fresh;
  return found_openmp;
}

// The caller works too, and in the end waits only for threads that took a task: one that wakes up late finds nothing to do.
class Pool {
 public:
  bool run(int threads, int64_t tasks, Task task, void *context) {
    std::unique_lock<std::mutex> alone(busy_, std::try_to_lock);
    if (!alone) return false;
    {
      std::lock_guard<std::mutex> guard(state_);
      while (workers_ < threads - 1 && start()) {
      }
      task_ = task, context_ = context, tasks_ = tasks, next_ = 0, seats_ = threads - 1, ++generation_;
    }
    wake_.notify_all();
    work();
    std::unique_lock<std::mutex> guard(state_);
    seats_ = 0;
    done_.wait(guard, [&] { return active_ == 0; });
    return true;
  }

 private:
  bool start() {
    try {
      std::thread([this] { loop(); }).detach();
    } catch (const std::system_error &) {
      return false;
    }
    ++workers_;
    return true;
  }
  void work() {
    inside = true;
    for (int64_t i; (i = next_.fetch_add(1)) < tasks_;) task_(context_, i);
    inside = false;
  }
  void loop() {
    uint64_t seen = 0;
    for (;;) {
      for (int spin = 0; spin < 200 && generation_ == seen; ++spin) std::this_thread::yield();
      {
        std::unique_lock<std::mutex> guard(state_);
        wake_.wait(guard, [&] { return generation_ != seen && seats_ > 0; });
        seen = generation_;
        --seats_, ++active_;
      }
      work();
      std::lock_guard<std::mutex> guard(state_);
      if (--active_ == 0) done_.notify_all();
    }
  }

  std::mutex busy_, state_;
  std::condition_variable wake_, done_;
  int workers_ = 0, active_ = 0, seats_ = 0;
  std::atomic<uint64_t> generation_{0};
  std::atomic<int64_t> next_{0};
  int64_t tasks_ = 0;
  Task task_ = nullptr;
  void *context_ = nullptr;
};

// Never destroyed: its threads may outlive static objects. A forked child, which has none of them, gets a new one.
std::atomic<Pool *> pool{nullptr};

void after_fork() {
  forked = true;
  inside = false;
  pool = nullptr;
}

Pool *own_pool() {
  static const int registered = pthread_atfork(nullptr, nullptr, after_fork);
  (void)registered;
  if (Pool *known = pool) return known;
  Pool *fresh = new Pool, *none = nullptr;
  if (!pool.compare_exchange_strong(none, fresh)) delete fresh;
  return pool;
}

int processors() {
  if (const char *text = getenv("OMP_NUM_THREADS")) {
    const int count = atoi(text);
    if (count > 0) return count;
  }
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
  const long count = sysconf(_SC_NPROCESSORS_ONLN);
  return count > 0 ? int(count) : 1;
}

struct Region {
  int64_t tasks;
  Task task;
  void *context;
  std::atomic<int64_t> next{0};
};

}  // namespace

void serial(int64_t tasks, Task task, void *context) {
  for (int64_t i = 0; i < tasks; ++i) task(context, i);
}

int thread_count() {
  const OpenMP *runtime = openmp();
  const int most = limit;
  const int count = runtime ? runtime->max_threads() : processors();
  return most > 0 && (!runtime || most < count) ? most : count;
}

void limit_threads(int count) { limit = count; }
int thread_limit() { return limit; }

const char *pool_name() { return openmp() ? "openmp" : "own"; }

void pooled(int64_t tasks, Task task, void *context) {
  const int64_t count = thread_count(), threads = count < tasks ? count : tasks;
  if (threads < 2 || inside || !own_pool()->run(int(threads), tasks, task, context)) serial(tasks, task, context);
}

void parallel(int64_t tasks, Task task, void *context) {
  own_pool();  // also registers what a fork needs
  const OpenMP *runtime = openmp();
  if (!runtime) return pooled(tasks, task, context);
  const int64_t count = thread_count(), threads = count < tasks ? count : tasks;
  if (threads < 2 || inside || runtime->in_parallel()) return serial(tasks, task, context);
  Region region{tasks, task, context};
  runtime->parallel(
      [](void *data) {
        Region &r = *static_cast<Region *>(data);
        for (int64_t i; (i = r.next.fetch_add(1, std::memory_order_relaxed)) < r.tasks;) r.task(r.context, i);
      },
      &region, unsigned(threads), 0);
}

}  // namespace normkit
