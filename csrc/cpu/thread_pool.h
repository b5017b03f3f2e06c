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

/// Calls body(task, worker) once for each task in [0, tasks), on at most `threads` threads, the caller's own among
/// them: each is another worker, numbered from 0 on. One caller uses the pool at a time; a second one, meanwhile, does
/// its tasks alone. A body should not allocate, for where memory is short a thread that throws for the first time ends
/// the process: its caller allocates for each worker. What a task throws all the same, the caller throws.
void parallel_for(int64_t tasks, int threads, void (*body)(void* context, int64_t task, int worker), void* context);

template <class Body>
void parallel_for(int64_t tasks, int threads, Body&& body) {
  using Function = std::remove_reference_t<Body>;
  parallel_for(
      tasks, threads,
      [](void* context, int64_t task, int worker) {
        Function& function = *static_cast<Function*>(context);
        if constexpr (std::is_invocable_v<Function&, int64_t, int>) function(task, worker);
        else function(task);
      },
      &body);
}

}  // namespace fastagg
