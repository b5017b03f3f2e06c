#include "operations.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "dispatch.h"
#include "float_environment.h"
#include "thread_pool.h"

namespace fastagg::cpu {
namespace {

/// Elements of a task: large enough to amortise its start, small enough to balance the threads.
constexpr int64_t kTask = 16 * kChunk;
/// Below this many bytes the threads take longer to wake than the work takes.
constexpr int64_t kParallelBytes = 256 << 10;
/// From this size on a result outlives no cache: it is stored around them.
constexpr int64_t kStreamBytes = 4 << 20;

/// Threads worth waking for an operation that touches so many bytes.
int threads_for(int64_t bytes) { return bytes >= kParallelBytes ? get_num_threads() : 1; }

/// A range of one leaf.
struct Task { int64_t leaf, begin, end; };

int64_t touched_bytes(const Leaf& leaf) {
  int64_t bytes = encoded_bytes(leaf.code, leaf.count);
  for (int32_t k = 0; k < leaf.clients; ++k) bytes += encoded_bytes(leaf.sources[k].code, leaf.count);
  return bytes;
}

/// Cuts the leaves into tasks; small leaves are tasks of their own.
std::vector<Task> tasks_of(const Leaf* leaves, int64_t count) {
  std::vector<Task> tasks;
  for (int64_t leaf = 0; leaf < count; ++leaf)
    for (int64_t begin = 0; begin < leaves[leaf].count; begin += kTask)
      tasks.push_back({leaf, begin, std::min(begin + kTask, leaves[leaf].count)});
  return tasks;
}

}  // namespace

void weighted_sum(const Leaf* leaves, int64_t count, bool* finite) {
  const Kernels& loops = kernels();
  const std::vector<Task> tasks = tasks_of(leaves, count);
  int64_t bytes = 0, written = 0;
  for (int64_t leaf = 0; leaf < count; ++leaf) {
    bytes += touched_bytes(leaves[leaf]);
    written += encoded_bytes(leaves[leaf].code, leaves[leaf].count);
  }
  const bool stream = written >= kStreamBytes;
  std::vector<uint8_t> task_finite(tasks.size());
  parallel_for(static_cast<int64_t>(tasks.size()), threads_for(bytes), [&](int64_t index) {
    const Task& task = tasks[index];
    task_finite[index] = loops.weighted_sum(leaves[task.leaf], task.begin, task.end, stream);
  });
  std::fill_n(finite, count, true);
  for (size_t index = 0; index < tasks.size(); ++index) finite[tasks[index].leaf] &= task_finite[index] != 0;
}

bool cast(const Cast& cast) {
  const Kernels& loops = kernels();
  const int64_t written = encoded_bytes(cast.code, cast.count);
  const int64_t tasks = (cast.count + kTask - 1) / kTask;
  std::vector<uint8_t> task_finite(tasks);
  parallel_for(tasks, threads_for(encoded_bytes(cast.source.code, cast.count) + written), [&](int64_t task) {
    const int64_t begin = task * kTask, end = std::min(begin + kTask, cast.count);
    task_finite[task] = loops.cast(cast, begin, end, written >= kStreamBytes);
  });
  return std::all_of(task_finite.begin(), task_finite.end(), [](uint8_t finite) { return finite != 0; });
}

bool reduce(const Reduction& reduction, int64_t begin, int64_t end, double* squares) {
  const Kernels& loops = kernels();
  const int64_t written = encoded_bytes(reduction.result.code, end - begin);
  const int64_t read = encoded_bytes(reduction.sources[0].code, end - begin) * reduction.ranks;
  const int64_t tasks = (end - begin + kTask - 1) / kTask;
  std::vector<uint8_t> task_finite(tasks);
  std::vector<double> task_squares(tasks);
  parallel_for(tasks, threads_for(read + written), [&](int64_t task) {
    const int64_t first = begin + task * kTask, last = std::min(first + kTask, end);
    double* own = squares != nullptr ? &task_squares[task] : nullptr;
    task_finite[task] = loops.reduce(reduction, first, last, own);
  });
  if (squares != nullptr)
    for (const double own : task_squares) *squares += own;  // in the order of the elements, whichever thread was first
  return std::all_of(task_finite.begin(), task_finite.end(), [](uint8_t finite) { return finite != 0; });
}

bool reduce_float64(const double* const* sources, int32_t ranks, int64_t count, double divisor, double factor,
                    double* out, double* squares) {
  const FloatEnvironment environment;
  bool finite = true;
  double sum_of_squares = 0;
  for (int64_t i = 0; i < count; ++i) {
    double sum = -0.0;
    for (int32_t rank = 0; rank < ranks; ++rank) sum += sources[rank][i];
    out[i] = sum / divisor * factor;
    finite &= std::isfinite(out[i]);
    sum_of_squares += out[i] * out[i];
  }
  if (squares != nullptr) *squares += sum_of_squares;
  return finite;
}

}  // namespace fastagg::cpu
