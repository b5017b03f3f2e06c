#include "thread_pool.h"

#include <pthread.h>
#if defined(__linux__)
#include <sched.h>
#endif

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#include "float_environment.h"
#include "stream.h"

namespace fastagg {
namespace {

/// What one parallel_for hands to the threads.
struct Job {
  void (*body)(void*, int64_t);
  void* context;
  int64_t tasks;
  std::atomic<int64_t> next{0};
  std::mutex failing{};
  std::exception_ptr failure{};  // the first exception of a task, for the caller

  /// Does tasks until none is left. An exception, such as that of a failed allocation, ends them for all threads.
  void run() noexcept {
    const FloatEnvironment environment;
    try {
      for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) body(context, task);
    } catch (...) {
      next.store(tasks, std::memory_order_relaxed);
      const std::lock_guard lock(failing);
      if (!failure) failure = std::current_exception();
    }
    stream_fence();
  }

  void run_alone() {
    run();
    rethrow();
  }

  void rethrow() const {
    if (failure) std::rethrow_exception(failure);
  }
};

class ThreadPool {
 public:
  /// The caller and `helpers` threads, or as many as can be started, run the job; returns when every task is done.
  void run(Job& job, int helpers) {
    helpers = std::min(helpers, grow(helpers));
    {
      const std::lock_guard lock(mutex_);
      job_ = &job;
      wanted_ = helpers;
    }
    wake_.notify_all();
    job.run();
    std::unique_lock lock(mutex_);
    wanted_ = 0;  // a thread that has not woken by now is not needed
    done_.wait(lock, [this] { return active_ == 0; });
    job_ = nullptr;
    lock.unlock();
    job.rethrow();
  }

  /// Ends the threads beyond `helpers`, at the next idle moment of the pool.
  void shrink(int helpers) {
    if (static_cast<int>(threads_.size()) <= helpers) return;
    {
      const std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    wake_.notify_all();
    for (auto& thread : threads_) thread.join();
    threads_.clear();
    begun_ = 0;
    stopping_ = false;
  }

 private:
  /// Starts threads up to `helpers`; returns how many there are. A process that may have no more goes on with those it
  /// has, and tries again at its next call.
  int grow(int helpers) {
    try {
      threads_.reserve(helpers);
      while (static_cast<int>(threads_.size()) < helpers) threads_.emplace_back([this] { work(); });
    } catch (const std::system_error&) {
    } catch (const std::bad_alloc&) {
    }
    std::unique_lock lock(mutex_);
    done_.wait(lock, [this] { return begun_ == threads_.size(); });
    return static_cast<int>(threads_.size());
  }

  void work() {
    // Exceptions keep their state in memory of the thread's own. Where that is asked for only when an allocation has
    // failed, there is none for it, and the process is ended.
    [[maybe_unused]] const volatile int asked_for_now = std::uncaught_exceptions();
    std::unique_lock lock(mutex_);
    ++begun_;
    done_.notify_one();
    for (;;) {
      wake_.wait(lock, [this] { return stopping_ || wanted_ > 0; });
      if (stopping_) return;
      --wanted_;
      ++active_;
      Job& job = *job_;
      lock.unlock();
      job.run();
      lock.lock();
      if (--active_ == 0) done_.notify_one();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> threads_;
  Job* job_ = nullptr;
  size_t begun_ = 0;  // threads that have all that they need
  int wanted_ = 0, active_ = 0;
  bool stopping_ = false;
};

// Never destroyed: threads may still be waiting when the process ends, and a forked child's copy has no threads to
// join.
ThreadPool* pool = nullptr;
std::mutex* pool_in_use = new std::mutex;
std::atomic<int> thread_count{0};

/// A child has none of its parent's threads: it starts afresh, leaving the old pool's memory alone.
void start_afresh_in_child() {
  pool = nullptr;
  pool_in_use = new std::mutex;
}

int threads_from_environment() {
  const char* text = std::getenv("OMP_NUM_THREADS");
  const int count = text == nullptr ? 0 : std::atoi(text);
  return count > 0 ? count : available_processors();
}

}  // namespace

int available_processors() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

int get_num_threads() {
  const int count = thread_count.load(std::memory_order_relaxed);
  return count > 0 ? count : threads_from_environment();
}

void set_num_threads(int count) { thread_count.store(count, std::memory_order_relaxed); }

void parallel_for(int64_t tasks, int threads, void (*body)(void*, int64_t), void* context) {
  Job job{body, context, tasks};
  threads = static_cast<int>(std::min<int64_t>(tasks, threads));
  if (threads <= 1) return job.run_alone();
  const std::unique_lock in_use(*pool_in_use, std::try_to_lock);
  if (!in_use) return job.run_alone();
  if (pool == nullptr) {
    static const int registered = pthread_atfork(nullptr, nullptr, start_afresh_in_child);
    (void)registered;
    pool = new ThreadPool;
  }
  pool->shrink(get_num_threads() - 1);
  pool->run(job, threads - 1);
}

}  // namespace fastagg
