// `server_step`: every leaf of a model in one launch. A thread keeps a few elements with their moments in registers:
// the same bits as csrc/cpu/server_step.h.
#include "core/server_step.h"
#include "elements.cuh"
#include "launch.cuh"

namespace fastagg::cuda {
namespace {

/// Blocks that a multiprocessor shall hold at least: with kBlocks, Yogi's square roots and quotients spilled.
constexpr int kStepBlocks = 5;

/// Elements of a thread: accesses of up to 16 bytes.
constexpr FASTAGG_INLINE int elements_of(Code code) { return code == Code::float64 ? 2 : 4; }

/// Elements [i, i + n) of an array that is aligned for vectors of n, i a multiple of n.
template <Code code, int n>
FASTAGG_INLINE Elements<code, n> load_at(const void* data, int64_t i) {
  return load_elements<code, n>(Source{data, nullptr, code, 0}, i);
}

/// Steps n elements from i on.
template <Rule rule, Code code, int n, class T>
FASTAGG_INLINE void step(const ModelLeaf& leaf, const Constants<T>& constants, int64_t i) {
  using Moments = Elements<moment_code(code), n>;
  Elements<code, n> x = load_at<code, n>(leaf.model, i), y = load_at<code, n>(leaf.mean, i);
  Moments first{}, second{};
  if constexpr (has_first_moment(rule)) first = load_at<moment_code(code), n>(leaf.first_moment, i);
  if constexpr (has_second_moment(rule)) second = load_at<moment_code(code), n>(leaf.second_moment, i);
  const ModelLeaf here{
      x.entries.values, y.entries.values, first.entries.values, second.entries.values, x.entries.values, code, n};
  for (int j = 0; j < n; ++j) step_elements<ThreadLane, rule, code, false>(here, constants, j);
  if constexpr (has_first_moment(rule)) store_elements(leaf.first_moment, nullptr, i, first);
  if constexpr (has_second_moment(rule)) store_elements(leaf.second_moment, nullptr, i, second);
  store_elements(leaf.out, nullptr, i, x);
}

/// A thread's share of the elements [begin, end) of a leaf.
template <Rule rule, Code code>
FASTAGG_INLINE void step_range(const StepLeaf& entry, const Optimizer& optimizer, int64_t begin, int64_t end,
                               int thread) {
  const Constants<typename Numbers<ThreadLane, code>::Scalar> constants(optimizer);
  if (entry.aligned) {
    constexpr int n = elements_of(code);
    const int64_t stop = end - (end - begin) % n;
    for (int64_t i = begin + n * thread; i < stop; i += n * kThreads) step<rule, code, n>(entry.leaf, constants, i);
    begin = stop;
  }
  for (int64_t i = begin + thread; i < end; i += kThreads) step<rule, code, 1>(entry.leaf, constants, i);
}

template <Rule rule>
__global__ void __launch_bounds__(kThreads, kStepBlocks)
    server_step_kernel(const __grid_constant__ Optimizer optimizer, StepTable table) {
  int64_t index = 0;
  for (int64_t task = blockIdx.x; task < table.tasks; task += gridDim.x) {
    index = leaf_of(table, index, task);
    const StepLeaf entry = table.leaves[index];
    const int64_t begin = (task - entry.first_task) * kTask;
    const int64_t end = begin + kTask < entry.leaf.count ? begin + kTask : entry.leaf.count;
    with_code(entry.leaf.code, [&](auto code) {
      constexpr Code constant = decltype(code)::value;
      if constexpr (is_float(constant))
        step_range<rule, constant>(entry, optimizer, begin, end, static_cast<int>(threadIdx.x));
    });
  }
}

/// Every rule's kernel, in the order of the enum.
template <size_t... rules>
auto kernel_of(Rule rule, std::index_sequence<rules...>) {
  constexpr void (*kernels[])(Optimizer, StepTable) = {&server_step_kernel<static_cast<Rule>(rules)>...};
  return kernels[static_cast<size_t>(rule)];
}

}  // namespace

cudaError_t server_step(const Optimizer& optimizer, const StepTable& table, cudaStream_t stream) noexcept {
  const auto kernel = kernel_of(optimizer.rule, std::make_index_sequence<kRules>{});
  return launch_persistent(kernel, table.tasks, stream, optimizer, table);
}

}  // namespace fastagg::cuda
