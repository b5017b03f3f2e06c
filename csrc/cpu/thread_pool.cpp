#include "thread_pool.h"

#include <pthread.h>
#if defined(__linux__)
#include <sched.h>
#endif

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
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

  void run() {
    const FloatEnvironment environment;
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) body(context, task);
    stream_fence();
  }
};

class ThreadPool {
 public:
  /// The caller and `helpers` threads run the job; returns when every task is done.
  void run(Job& job, int helpers) {
    grow(helpers);
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
    stopping_ = false;
  }

 private:
  void grow(int helpers) {
    while (static_cast<int>(threads_.size()) < helpers) threads_.emplace_back([this] { work(); });
  }

  void work() {
    std::unique_lock lock(mutex_);
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
  if (threads <= 1) return job.run();
  const std::unique_lock in_use(*pool_in_use, std::try_to_lock);
  if (!in_use) return job.run();
  if (pool == nullptr) {
    static const int registered = pthread_atfork(nullptr, nullptr, start_afresh_in_child);
    (void)registered;
    pool = new ThreadPool;
  }
  pool->shrink(get_num_threads() - 1);
  pool->run(job, threads - 1);
}

}  // namespace fastagg
