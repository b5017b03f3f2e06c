// A small pool of threads: shared, idle when there is nothing to do, safe across fork().
#pragma once
#include <cstdint>
#include <type_traits>

namespace fastagg {

/// Threads that a parallel operation uses, the caller's own included.
int get_num_threads();

/// count >= 1; 0 restores the default: OMP_NUM_THREADS if set, else the processors this process may run on.
void set_num_threads(int count);

/// Processors that this process may run on.
int available_processors();

/// Calls body(task) once for each task in [0, tasks), on at most `threads` threads, the caller's own among them. One
/// caller uses the pool at a time; a second one, meanwhile, does its tasks alone. What a task throws, the caller
/// throws, once no task is under way.
void parallel_for(int64_t tasks, int threads, void (*body)(void* context, int64_t task), void* context);

template <class Body>
void parallel_for(int64_t tasks, int threads, Body&& body) {
  using Function = std::remove_reference_t<Body>;
  parallel_for(tasks, threads, [](void* context, int64_t task) { (*static_cast<Function*>(context))(task); }, &body);
}

}  // namespace fastagg
