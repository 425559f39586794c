// Which threads run the tasks of a call: those of an OpenMP runtime that the process has loaded already, else a pool of our own.
#pragma once
#include <cstdint>

namespace normkit {

using Task = void (*)(void *context, int64_t i);

// Runs task(context, i) for every i < tasks; serially inside a parallel region, and where only one thread is wanted.
void parallel(int64_t tasks, Task task, void *context);
void serial(int64_t tasks, Task task, void *context);
// The same in our own pool alone. For callers that are threads of a pool themselves: OpenMP would make a team for each of them.
void pooled(int64_t tasks, Task task, void *context);

// How many threads a call from this thread gets; 0 lifts a limit that was set.
int thread_count();
void limit_threads(int count);
int thread_limit();
const char *pool_name();

}  // namespace normkit
