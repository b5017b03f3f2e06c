// `all_reduce`: one kernel a rank, which exchanges with the others' through memory that all devices reach.
//
// As in csrc/comm every rank owns a slice of the elements. A launch takes a piece of every slice, cut into tasks, and a
// task belongs to the block of threads of one number on every rank. It passes the phases of csrc/comm: *publish*, the
// block encodes this rank's values into its memory; *reduce*, the owner's block adds up what all ranks have published
// and encodes the mean; *gather*, all blocks decode the means. Between phases a block meets its namesakes of the other
// ranks, and nobody else: blocks that have not started keep nobody waiting. In one shot every rank reduces all that was
// published. Exchanges take turns with two slots: who meets in this one has ended the last, and reads it no more.
#include "reduce.cuh"
#include "reduce_float64.cuh"
#include "signal.cuh"

namespace fastagg::cuda {
namespace {

/// Blocks whose registers a multiprocessor has room for: more than there will be, for the kernels of a model's backward
/// pass need room beside them.
constexpr int kBlocksOfRegisters = 3;
/// Looks at a flag before the clock and the host's word are looked at.
constexpr int kLooks = 256;
/// log2 of a task's elements: many small ones share out few elements, large ones cost less.
constexpr int kSmallTask = 10, kLargeTask = 12;

/// One launch: a piece of every slice.
struct Launch {
  PeerExchange peers;
  bool one_shot;
  bool aligned;               // the data, the residual and the error, to kAlignment
  int64_t passes;             // of every slice
  int32_t larger;             // slices that have one more
  int64_t first, piece;       // of each slice: its elements [first, first + piece)
  int32_t tasks, task_shift;  // of each piece
};

FASTAGG_INLINE int64_t smaller(int64_t one, int64_t other) { return one < other ? one : other; }

FASTAGG_INLINE PeerControl& control_of(const PeerExchange& peers, int rank) {
  return *reinterpret_cast<PeerControl*>(peers.memory[rank]);
}

/// The elements of an owner's slice that a task has.
__device__ inline Slice elements_of(const Launch& launch, int owner, int32_t task) {
  const int64_t pass = owner * launch.passes + smaller(owner, launch.larger);
  const int64_t slice = pass * kChunk, passes = launch.passes + (owner < launch.larger ? 1 : 0);
  const int64_t end =
      smaller(smaller(slice + launch.first + launch.piece, slice + passes * kChunk), launch.peers.exchange.count);
  const int64_t begin = smaller(slice + launch.first + (int64_t{task} << launch.task_shift), end);
  return {begin, smaller(begin + (int64_t{1} << launch.task_shift), end)};
}

/// Where a rank keeps an owner's piece encoded, or its means: those of "owner" number `ranks`. Element i is its i-th.
template <Code wire>
__device__ inline Source encoded_at(const Launch& launch, uint32_t call, int rank, int place, int owner) {
  const PeerExchange& peers = launch.peers;
  const Exchange& op = peers.exchange;
  char* slot = peers.memory[rank] + kPeerControlBytes + call % 2 * peers.slot_bytes;
  const int64_t begin = (owner * launch.passes + smaller(owner, launch.larger)) * kChunk + launch.first;
  const int64_t at = place * launch.piece - begin;
  char* codes = slot + encoded_bytes(wire, launch.piece) * place - encoded_bytes(wire, begin);
  float* scales = reinterpret_cast<float*>(slot + encoded_bytes(wire, launch.piece) * (peers.ranks + 1));
  return {codes, has_scales(wire) ? scales + (at >> op.block_shift) : nullptr, wire, op.block_shift};
}

/// This rank's own values.
struct OwnValues {
  Source source;
  FASTAGG_INLINE int32_t ranks() const { return 1; }
  FASTAGG_INLINE const Source& operator[](int) const { return source; }
  static constexpr FASTAGG_INLINE bool takes(Code from, Code) { return from <= Code::bfloat16; }
};

/// What ranks have published of an owner's piece, or one rank's means.
template <Code wire>
struct Published {
  const Launch& launch;
  uint32_t call;
  int first, count, place, owner;
  FASTAGG_INLINE int32_t ranks() const { return count; }
  __device__ Source operator[](int rank) const { return encoded_at<wire>(launch, call, first + rank, place, owner); }
  static constexpr FASTAGG_INLINE bool takes(Code from, Code) { return from == wire; }
};

/// One block's part in a launch.
template <Code wire, Rounding rounding>
class Exchanger {
 public:
  __device__ Exchanger(const Launch& launch, uint32_t call) : launch_(launch), call_(call) {}

  __device__ void publish() const {
    for_each_task([&](int owner, Slice elements) {
      const OwnValues values{{op().data, nullptr, op().code, 0}};
      const Source row = encoded_at<wire>(launch_, call_, rank(), owner, owner);
      if constexpr (wire == Code::float64) {
        Found unused;
        add_up_float64(values, 1, 1, doubles(row.data), elements.begin, elements.end, this_block(), unused);
      } else {
        const float factor = op().encoded_factor;
        const Feedback feedback{op().residual, op().residual_factor, op().error, 1 / factor, false};
        const SumWork<OwnValues> work{encoded(row, op().key.rank),
                                      launch_.aligned,
                                      nullptr,
                                      nullptr,
                                      feedback,
                                      1 / factor,
                                      factor,
                                      op().code,
                                      values};
        FeedbackSink sink(work);
        encode_range<wire, rounding>(work, elements.begin, elements.end, this_block(), sink);
      }
    });
  }

  /// Encodes the means of this rank's slice.
  __device__ void reduce() const {
    for_each_task([&](int owner, Slice elements) {
      if (owner != rank()) return;
      const Published<wire> values{launch_, call_, 0, launch_.peers.ranks, owner, owner};
      const Source row = encoded_at<wire>(launch_, call_, rank(), launch_.peers.ranks, owner);
      if constexpr (wire == Code::float64) {
        Found unused;
        add_up_float64(values, share(), op().factor, doubles(row.data), elements.begin, elements.end, this_block(),
                       unused);  // the factor goes into the one rounding
      } else {
        const float divisor = share() * op().encoded_factor;
        const SumWork<Published<wire>> work{encoded(row, kMeansRank),
                                            launch_.aligned,
                                            nullptr,
                                            nullptr,
                                            Feedback{nullptr, 0, op().error, share(), true},
                                            divisor,
                                            exact_inverse(divisor),
                                            wire,
                                            values};
        FeedbackSink sink(work);
        encode_range<wire, rounding>(work, elements.begin, elements.end, this_block(), sink);
      }
    });
  }

  /// Writes the results: the quotients of what all have published, or the owners' means.
  __device__ void finish() {
    const bool reduces = launch_.one_shot, loses = op().code == Code::float16 || op().code == Code::bfloat16;
    const int ranks = launch_.peers.ranks;
    const auto factor = static_cast<float>(op().factor);
    const auto divisor = static_cast<float>(share() * op().encoded_factor / op().factor);
    for_each_task([&](int owner, Slice elements) {
      const Published<wire> values{launch_, call_, reduces ? 0 : owner, reduces ? ranks : 1, reduces ? owner : ranks,
                                   owner};
      // What rounding to the tensor's own 16 bits takes is the owner's to feed back.
      float* error = reduces && loses && owner == rank() ? op().error : nullptr;
      const Feedback feedback{nullptr, 0, error, static_cast<float>(share() / op().factor), true};
      write(values, divisor, reduces ? exact_inverse(divisor) : factor, feedback, elements);
    });
  }

  /// Writes NaN instead of the results.
  __device__ void poison() {
    found_ = {kInfinity, bit_cast<double>(INT64_C(0x7ff8000000000000))};
    for_each_task([&](int, Slice elements) {
      with_code(op().code, [&](auto code) {
        if constexpr (decltype(code)::value <= Code::bfloat16) fill_with_nan<decltype(code)::value>(elements);
      });
    });
  }

  /// Meets this block's namesakes on the other ranks at a moment; false if one of them does not come.
  __device__ bool meet(uint32_t moment) const {
    const PeerExchange& peers = launch_.peers;
    const uint32_t now = 2 * call_ + moment;
    bool lost = false;
    __syncthreads();
    for (auto peer = static_cast<int>(threadIdx.x); peer < peers.ranks; peer += kThreads)
      signal(&control_of(peers, peer).arrived[blockIdx.x][peers.rank], uint64_t{peers.description} << 32 | now);
    for (auto peer = static_cast<int>(threadIdx.x); peer < peers.ranks; peer += kThreads)
      lost |= !wait_for(control_of(peers, peers.rank).arrived[blockIdx.x][peer], now, peer);
    return __syncthreads_or(lost) == 0;
  }

  __device__ const Found& found() const { return found_; }

 private:
  __device__ const Exchange& op() const { return launch_.peers.exchange; }
  __device__ int rank() const { return launch_.peers.rank; }
  __device__ float share() const { return op().mean ? static_cast<float>(launch_.peers.ranks) : 1.0f; }
  __device__ static Team this_block() { return {threadIdx.x, kThreads}; }
  __device__ static double* doubles(const void* data) { return static_cast<double*>(const_cast<void*>(data)); }

  template <class Function>
  __device__ void for_each_task(Function&& function) const {
    const int32_t tasks = launch_.tasks * launch_.peers.ranks;
    for (auto task = static_cast<int32_t>(blockIdx.x); task < tasks; task += static_cast<int32_t>(gridDim.x)) {
      const int owner = task / launch_.tasks;
      function(owner, elements_of(launch_, owner, task - owner * launch_.tasks));
    }
  }

  __device__ Cast encoded(const Source& row, uint32_t random_rank) const {
    Cast cast{{op().data, nullptr, op().code, 0},
              wire,
              op().block_shift,
              rounding,
              op().key,
              op().count,
              const_cast<void*>(row.data),
              static_cast<float*>(const_cast<void*>(row.companion))};
    cast.key.rank = random_rank;
    cast.stretches = op().stretches;
    cast.stretch_count = op().stretch_count;
    return cast;
  }

  __device__ void write(const Published<wire>& values, float divisor, float inverse, const Feedback& feedback,
                        Slice elements) {
    if constexpr (wire == Code::float64) {
      const bool reduces = launch_.one_shot;
      add_up_float64(values, reduces ? share() : 1.0, reduces ? op().factor : 1.0, doubles(op().data), elements.begin,
                     elements.end, this_block(), found_);
    } else {
      Cast result{{}, op().code, 0, Rounding::nearest, {}, op().count, op().data, nullptr};
      const SumWork<Published<wire>> work{result,  launch_.aligned, nullptr, nullptr, feedback,
                                          divisor, inverse,         wire,    values};
      FeedbackSink sink(work);
      with_code(op().code, [&](auto code) {
        constexpr Code to = decltype(code)::value;
        if constexpr (to <= Code::bfloat16)
          raise_to(encode_range<to, Rounding::nearest>(work, elements.begin, elements.end, this_block(), sink));
      });
      found_.squares += sink.squares();
    }
  }

  __device__ void raise_to(int32_t largest) { found_.largest = largest > found_.largest ? largest : found_.largest; }

  template <Code code>
  __device__ void fill_with_nan(Slice elements) const {
    auto* out = static_cast<Element<code>*>(op().data);
    for (int64_t i = elements.begin + threadIdx.x; i < elements.end; i += kThreads) {
      if constexpr (code == Code::float64) out[i] = bit_cast<double>(INT64_C(0x7ff8000000000000));
      else if constexpr (code == Code::float32) out[i] = bit_cast<float>(0x7fc00000);
      else out[i] = code == Code::float16 ? 0x7e00 : 0x7fc0;
    }
  }

  /// Waits for a peer's flag; false if it does not come in time, or another peer is known to be lost, or the peer was
  /// called with something else. One that has passed the moment has found both alike.
  __device__ bool wait_for(const uint64_t& flag, uint32_t moment, int peer) const {
    const PeerExchange& peers = launch_.peers;
    const uint32_t number = static_cast<uint32_t>(peer) + 1;
    for (int64_t deadline = 0;;) {
      for (int look = 0; look < kLooks; ++look, relax()) {
        const uint64_t seen = observe(&flag);
        const auto ahead = static_cast<int32_t>(static_cast<uint32_t>(seen) - moment);
        if (ahead == 0 && seen >> 32 != peers.description) return give_up(number | kDiffers);
        if (ahead >= 0) return true;
      }
      const int64_t now = nanoseconds();
      if (deadline == 0) deadline = now + peers.timeout;
      if (read_word(peers.lost) != 0) return false;
      if (now >= deadline) return give_up(number);
    }
  }

  __device__ bool give_up(uint32_t reason) const {
    if (read_word(launch_.peers.lost) == 0) write_word(launch_.peers.lost, reason);
    return false;
  }

  const Launch& launch_;
  const uint32_t call_;
  Found found_;
};

template <Code wire, Rounding rounding>
__global__ void __launch_bounds__(kThreads, kBlocksOfRegisters)
    all_reduce_kernel(const __grid_constant__ Launch launch) {
  const PeerExchange& peers = launch.peers;
  PeerControl& own = control_of(peers, peers.rank);
  Exchanger<wire, rounding> exchanger(launch, own.calls);
  bool met = __syncthreads_or(own.failed != 0) == 0;
  if (met) {
    exchanger.publish();
    met = exchanger.meet(1);
  }
  if (met && !launch.one_shot) {
    exchanger.reduce();
    met = exchanger.meet(2);
  }
  if (met) exchanger.finish();
  else exchanger.poison();
  report(peers.nonfinite, peers.exchange.code, exchanger.found().largest);
  keep_squares(peers.squares, exchanger.found().squares);
  if (threadIdx.x != 0) return;
  if (!met) own.failed = 1;
  if (atomicAdd(&own.ended, 1u) + 1 < gridDim.x) return;
  own.ended = 0;  // the last block: all have read the number of this call
  own.calls += 1;
}

using Kernel = void (*)(Launch);

template <Code wire>
Kernel kernel_of(Rounding rounding) {
  return rounding == Rounding::stochastic ? all_reduce_kernel<wire, Rounding::stochastic>
                                          : all_reduce_kernel<wire, Rounding::nearest>;
}

/// The kernel of a wire; null for other codes.
Kernel kernel_of(Code wire, Rounding rounding) {
  switch (wire) {
    case Code::float64:
      return all_reduce_kernel<Code::float64, Rounding::nearest>;
    case Code::float32:
      return all_reduce_kernel<Code::float32, Rounding::nearest>;
    case Code::float16:
      return kernel_of<Code::float16>(rounding);
    case Code::bfloat16:
      return kernel_of<Code::bfloat16>(rounding);
    case Code::wire_fp8_e4m3:
      return kernel_of<Code::wire_fp8_e4m3>(rounding);
    case Code::wire_fp8_e5m2:
      return kernel_of<Code::wire_fp8_e5m2>(rounding);
    case Code::wire_int8:
      return kernel_of<Code::wire_int8>(rounding);
    case Code::wire_int4:
      return kernel_of<Code::wire_int4>(rounding);
    case Code::wire_sign:
      return all_reduce_kernel<Code::wire_sign, Rounding::nearest>;
    default:
      return nullptr;
  }
}

/// Elements of every slice that a launch has room for: whole passes.
int64_t piece_of(const PeerExchange& peers) {
  const Exchange& op = peers.exchange;
  const int64_t scales = has_scales(op.wire) ? kChunk >> op.block_shift : 0;
  const int64_t pass = encoded_bytes(op.wire, kChunk) + scales * static_cast<int64_t>(sizeof(float));
  return peers.slot_bytes / (pass * (peers.ranks + 1)) * kChunk;
}

/// Cuts the pieces into tasks: large ones where every block has some to do.
void plan_tasks(Launch& launch, int64_t largest_piece) {
  const int64_t enough = int64_t{2} * launch.peers.blocks;
  const int shift = (largest_piece >> kLargeTask) * launch.peers.ranks < enough ? kSmallTask : kLargeTask;
  launch.task_shift = std::max<int32_t>(shift, launch.peers.exchange.block_shift);
  launch.tasks = static_cast<int32_t>(((largest_piece - 1) >> launch.task_shift) + 1);
}

}  // namespace

cudaError_t all_reduce(const PeerExchange& peers, cudaStream_t stream) noexcept {
  const Exchange& op = peers.exchange;
  const Kernel kernel = kernel_of(op.wire, op.rounding);
  const int64_t passes = (op.count + kChunk - 1) / kChunk, largest = slice_of(op.count, 0, peers.ranks).end;
  const uintptr_t bits = reinterpret_cast<uintptr_t>(op.data) | reinterpret_cast<uintptr_t>(op.residual) |
                         reinterpret_cast<uintptr_t>(op.error);
  Launch launch{peers,
                in_one_shot(op.count, peers.ranks),
                bits % kAlignment == 0,
                passes / peers.ranks,
                static_cast<int32_t>(passes % peers.ranks),
                0,
                piece_of(peers),
                0,
                0};
  if (kernel == nullptr || op.code > Code::bfloat16 || (op.wire == Code::float64 && op.code != Code::float64) ||
      peers.ranks > kMaximumRanks || peers.blocks > kPeerBlocks || launch.piece == 0)
    return cudaErrorInvalidValue;
  for (; launch.first < largest; launch.first += launch.piece) {
    plan_tasks(launch, std::min(launch.piece, largest - launch.first));
    const auto blocks = static_cast<unsigned>(std::min(launch.tasks * peers.ranks, peers.blocks));
    const cudaError_t error = cuda::launch(kernel, blocks, kThreads, 0, stream, launch);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace fastagg::cuda
