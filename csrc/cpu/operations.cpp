#include "operations.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "core/rows.h"
#include "core/squared_distances.h"
#include "core/statistics.h"
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

/// What a step reads and writes.
int64_t touched_bytes(const ModelLeaf& leaf) {
  const int64_t moment = encoded_bytes(leaf.code == Code::float64 ? Code::float64 : Code::float32, leaf.count);
  const int moments = (leaf.first_moment != nullptr) + (leaf.second_moment != nullptr);
  return 3 * encoded_bytes(leaf.code, leaf.count) + 2 * moments * moment;
}

int64_t touched_bytes(const Leaf& leaf) {
  int64_t bytes = encoded_bytes(leaf.code, leaf.count);
  for (int32_t k = 0; k < leaf.clients; ++k) bytes += encoded_bytes(leaf.sources[k].code, leaf.count);
  return bytes;
}

/// Cuts the leaves into tasks; small leaves are tasks of their own.
template <class AnyLeaf>
std::vector<Task> tasks_of(const AnyLeaf* leaves, int64_t count, int64_t elements = kTask) {
  std::vector<Task> tasks;
  for (int64_t leaf = 0; leaf < count; ++leaf)
    for (int64_t begin = 0; begin < leaves[leaf].count; begin += elements)
      tasks.push_back({leaf, begin, std::min(begin + elements, leaves[leaf].count)});
  return tasks;
}

/// Calls work(index, leaf, task, stream) for all tasks. finite[leaf] is whether all its calls say true.
template <class Work>
void for_tasks(const std::vector<Task>& tasks, const Leaf* leaves, int64_t count, bool* finite, Work&& work) {
  int64_t bytes = 0, written = 0;
  for (int64_t leaf = 0; leaf < count; ++leaf) {
    bytes += touched_bytes(leaves[leaf]);
    written += encoded_bytes(leaves[leaf].code, leaves[leaf].count);
  }
  std::vector<uint8_t> task_finite(tasks.size());
  parallel_for(static_cast<int64_t>(tasks.size()), threads_for(bytes), [&](int64_t index) {
    const Task& task = tasks[index];
    task_finite[index] = work(index, leaves[task.leaf], task, written >= kStreamBytes);
  });
  std::fill_n(finite, count, true);
  for (size_t index = 0; index < tasks.size(); ++index) finite[tasks[index].leaf] &= task_finite[index] != 0;
}

/// Memory for a tile, which nobody clears.
std::unique_ptr<double[]> make_scratch(int64_t bytes) {
  return std::unique_ptr<double[]>(new double[static_cast<size_t>((bytes + 7) / 8)]);
}

}  // namespace

void weighted_sum(const Leaf* leaves, int64_t count, bool* finite) {
  const Kernels& loops = kernels();
  for_tasks(tasks_of(leaves, count), leaves, count, finite,
            [&](int64_t, const Leaf& leaf, const Task& task, bool stream) {
              return loops.weighted_sum(leaf, task.begin, task.end, stream);
            });
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
  return kernels().reduce_float64(sources, ranks, count, divisor, factor, out, squares);
}

void server_step(const Optimizer& optimizer, const ModelLeaf* leaves, int64_t count) {
  const Kernels& loops = kernels();
  const std::vector<Task> tasks = tasks_of(leaves, count);
  int64_t bytes = 0, written = 0;
  for (int64_t leaf = 0; leaf < count; ++leaf) {
    bytes += touched_bytes(leaves[leaf]);
    written += encoded_bytes(leaves[leaf].code, leaves[leaf].count);
  }
  parallel_for(static_cast<int64_t>(tasks.size()), threads_for(bytes), [&](int64_t index) {
    const ModelLeaf& leaf = leaves[tasks[index].leaf];
    const bool stream = written >= kStreamBytes && leaf.out != leaf.model;  // what was just read is in the cache
    loops.server_step(optimizer, leaf, tasks[index].begin, tasks[index].end, stream);
  });
}

void sorted_mean(const SortedMean& op, const Leaf* leaves, int64_t count, bool* finite) {
  const Kernels& loops = kernels();
  for_tasks(tasks_of(leaves, count), leaves, count, finite,
            [&](int64_t, const Leaf& leaf, const Task& task, bool stream) {
              const auto scratch = make_scratch(tile_bytes(scratch_rows(op, leaf), is_wide(leaf) ? 8 : 4));
              return loops.sorted_mean(op, leaf, task.begin, task.end, scratch.get(), stream);
            });
}

bool squared_distances(const Leaf* leaves, int64_t count, int32_t clients, double* distances) {
  const Kernels& loops = kernels();
  const std::vector<Task> tasks = tasks_of(leaves, count, kDistanceTask);
  const auto all = static_cast<int64_t>(tasks.size());
  const int64_t parts = distance_parts(all, clients), entries = int64_t{clients} * clients;
  std::vector<double> sums(parts * entries);
  std::vector<uint8_t> part_finite(parts);
  int64_t bytes = 0;
  for (int64_t leaf = 0; leaf < count; ++leaf) bytes += touched_bytes(leaves[leaf]);
  parallel_for(parts, threads_for(bytes), [&](int64_t part) {
    const auto scratch = make_scratch(tile_bytes(clients, 8));
    bool finite = true;
    for (int64_t task = part * all / parts; task < (part + 1) * all / parts; ++task) {
      const auto& [leaf, begin, end] = tasks[task];
      finite &= loops.squared_distances(leaves[leaf], begin, end, scratch.get(), &sums[part * entries]);
    }
    part_finite[part] = finite;
  });
  std::fill_n(distances, entries, 0.0);
  for (int64_t i = 0; i < clients; ++i)
    for (int64_t j = i + 1; j < clients; ++j) {
      for (int64_t part = 0; part < parts; ++part) distances[i * clients + j] += sums[part * entries + i * clients + j];
      distances[j * clients + i] = distances[i * clients + j];
    }
  return std::all_of(part_finite.begin(), part_finite.end(), [](uint8_t finite) { return finite != 0; });
}

void statistics(const Leaf* leaves, const Measurement* measurements, int64_t count, bool* finite,
                Moments* const* moments) {
  const Kernels& loops = kernels();
  const std::vector<Task> tasks = tasks_of(leaves, count);
  std::vector<std::vector<Moments>> found(tasks.size());
  for_tasks(tasks, leaves, count, finite, [&](int64_t index, const Leaf& leaf, const Task& task, bool stream) {
    const Measurement& measurement = measurements[task.leaf];
    if (measurement.clients == 0) return loops.weighted_sum(leaf, task.begin, task.end, stream);
    found[index].resize(measurement.clients);
    return loops.statistics(leaf, measurement, task.begin, task.end, stream, found[index].data());
  });
  for (size_t index = 0; index < tasks.size(); ++index)  // in the order of the elements, whichever thread was first
    for (size_t k = 0; k < found[index].size(); ++k) merge(moments[tasks[index].leaf][k], found[index][k]);
}

}  // namespace fastagg::cpu
