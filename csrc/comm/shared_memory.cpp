#include "shared_memory.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <string>
#include <thread>

#include "cpu/dispatch.h"
#include "cpu/float_environment.h"
#include "cpu/stream.h"

namespace fastagg::comm {
namespace {

constexpr int64_t kLine = 64;
constexpr int64_t kSlotBytes = kChunkElements * static_cast<int64_t>(sizeof(double));
constexpr int64_t kScaleBytes = (kChunkElements >> kMinimumBlockShift) * static_cast<int64_t>(sizeof(float));
constexpr int64_t kSlotStride = kSlotBytes + kScaleBytes;
/// From this size on a result is stored around the caches.
constexpr int64_t kStreamBytes = 4 << 20;

/// Looks at a counter before the processor is handed on, and handing it on before sleeping.
constexpr int kSpins = 256, kYields = 2000;
constexpr auto kNap = std::chrono::microseconds(50);
constexpr auto kCheckEvery = std::chrono::milliseconds(2);

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

/// What must be equal on all ranks.
struct Signature {
  int64_t count;
  int32_t code, wire, block_shift, rounding, mean;

  bool operator==(const Signature& other) const { return memcmp(this, &other, sizeof other) == 0; }
  std::string describe() const {
    return std::to_string(count) + " elements of dtype code " + std::to_string(code) + ", wire code " +
           std::to_string(wire) + (mean != 0 ? ", mean" : ", sum");
  }
};

Signature signature_of(const AllReduce& operation) {
  Signature signature;
  memset(&signature, 0, sizeof signature);  // padding is compared too
  signature.count = operation.count;
  signature.code = static_cast<int32_t>(operation.code);
  signature.wire = static_cast<int32_t>(operation.wire);
  signature.block_shift = operation.block_shift;
  signature.rounding = static_cast<int32_t>(operation.rounding);
  signature.mean = operation.mean ? 1 : 0;
  return signature;
}

/// The power of two that keeps a mean's terms inside float16: the sum of all ranks' largest values is their size.
float publish_factor(const AllReduce& operation, int ranks) {
  if (operation.wire != Code::float16 || !operation.mean) return 1;
  float factor = 1;
  while (factor * static_cast<float>(ranks) > 1) factor /= 2;
  return factor;
}

/// Where an array of codes would begin whose element `begin` lies at `data`.
template <class T>
T* shifted(T* data, Code code, int64_t begin) {
  return reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(data) - static_cast<uintptr_t>(encoded_bytes(code, begin)));
}

float* shifted_scales(float* scales, int block_shift, int64_t begin) {
  return shifted(scales, Code::float32, begin >> block_shift);
}

/// The share of a chunk that a rank reduces: whole passes of `cast`.
int64_t share_begin(int64_t count, int rank, int ranks) {
  const int64_t passes = (count + kChunk - 1) / kChunk;
  return std::min(passes * rank / ranks * kChunk, count);
}

}  // namespace

/// A rank's flags; nobody else writes them, but `lost`, which the first to notice sets for all.
struct alignas(2 * kLine) SharedMemory::Member {
  std::atomic<uint64_t> published, reduced, gathered;
  std::atomic<int32_t> waits_for, lost;  // a rank + 1; 0: none
  std::atomic<uint32_t> beats;           // of a rank that waits: it lives
  Signature signatures[2];               // of even and of odd calls: a fast rank may be one call ahead
};
static_assert(std::atomic<uint64_t>::is_always_lock_free, "counters are shared between processes");

struct SharedMemory::Slot {
  void* codes;
  float* scales;
};

size_t SharedMemory::bytes(int ranks) {
  return ranks * sizeof(Member) + static_cast<size_t>((2 * ranks + 2) * kSlotStride);
}

SharedMemory::SharedMemory(std::shared_ptr<Segment> segment, const std::vector<pid_t>& processes,
                           std::vector<int> names, int rank)
    : segment_(std::move(segment)),
      peers_(processes, std::move(names), rank),
      sums_(kChunkElements),
      ones_(processes.size(), 1.0) {}

SharedMemory::Member& SharedMemory::member(int rank) const { return reinterpret_cast<Member*>(segment_->data())[rank]; }

SharedMemory::Slot SharedMemory::slot(int rank, uint64_t chunk) const {
  const int64_t index = 2 * static_cast<int64_t>(rank) + static_cast<int64_t>(chunk & 1);
  char* codes = segment_->data() + peers_.size() * sizeof(Member) + index * kSlotStride;
  return {codes, reinterpret_cast<float*>(codes + kSlotBytes)};
}

SharedMemory::Slot SharedMemory::means(uint64_t chunk) const { return slot(peers_.size(), chunk); }

Outcome SharedMemory::all_reduce(const AllReduce& operation, std::chrono::nanoseconds timeout) {
  const FloatEnvironment environment;
  deadline_ = Clock::now() + timeout;
  if (const int lost = member(peers_.rank()).lost; lost != 0) give_up(lost - 1, "was lost before");
  const bool alone = operation.count <= kOneShotElements;
  const auto begin_of = [&](int64_t index) { return std::min(index * kChunkElements, operation.count); };
  const int64_t chunks = std::max<int64_t>((operation.count + kChunkElements - 1) / kChunkElements, 1);
  announce(operation);
  publish(operation, 0, begin_of(1), chunks_);
  compare(operation);
  Outcome outcome{true, 0};
  for (int64_t index = 0; index < chunks; ++index, ++chunks_) {
    const int64_t begin = begin_of(index), end = begin_of(index + 1);
    if (index + 1 < chunks) publish(operation, end, begin_of(index + 2), chunks_ + 1);
    wait_for_all(&Member::published, chunks_ + 1);
    outcome.wire_bytes += handed_bytes(operation, end - begin, alone);
    if (alone) {
      outcome.finite &= reduce_alone(operation, chunks_);
    } else {
      reduce(operation, begin, end, chunks_);
      wait_for_all(&Member::reduced, chunks_ + 1);
      outcome.finite &= gather(operation, begin, end, chunks_);
    }
  }
  stream_fence();
  return outcome;
}

void SharedMemory::announce(const AllReduce& operation) {
  member(peers_.rank()).signatures[calls_++ & 1] = signature_of(operation);
}

void SharedMemory::compare(const AllReduce& operation) {
  wait_for_all(&Member::published, chunks_ + 1);
  const Signature own = signature_of(operation);
  for (int peer = 0; peer < peers_.size(); ++peer) {
    const Signature other = member(peer).signatures[(calls_ - 1) & 1];
    if (other == own) continue;
    ++chunks_;  // every rank sees a difference, and so ends here: the next call begins anew
    member(peers_.rank()).reduced.store(chunks_, std::memory_order_release);
    member(peers_.rank()).gathered.store(chunks_, std::memory_order_release);
    throw Mismatch("rank " + std::to_string(peers_.name(peer)) + " has " + other.describe() + ", rank " +
                   std::to_string(peers_.name(peers_.rank())) + " has " + own.describe());
  }
}

void SharedMemory::publish(const AllReduce& operation, int64_t begin, int64_t end, uint64_t chunk) {
  Member& own = member(peers_.rank());
  if (chunk >= 2) wait_for_all(&Member::reduced, chunk - 1);  // nobody reads the slot's last chunk any more
  const Slot out = slot(peers_.rank(), chunk);
  Cast cast{};
  cast.source = {operation.data, nullptr, operation.code, 0};
  cast.code = operation.wire;
  cast.block_shift = operation.block_shift;
  cast.rounding = operation.rounding;
  cast.key = operation.key;
  cast.count = operation.count;
  cast.out = shifted(out.codes, operation.wire, begin);
  cast.scales = shifted_scales(out.scales, operation.block_shift, begin);
  cast.factor = publish_factor(operation, peers_.size());
  kernels().cast(cast, begin, end, false);
  own.published.store(chunk + 1, std::memory_order_release);
}

int64_t SharedMemory::handed_bytes(const AllReduce& operation, int64_t count, bool alone) const {
  const auto bytes = [&](int64_t elements) {
    const int64_t scales = has_scales(operation.wire) ? ((elements - 1) >> operation.block_shift) + 1 : 0;
    return elements == 0 ? 0 : encoded_bytes(operation.wire, elements) + 4 * scales;
  };
  const int64_t others = peers_.size() - 1;
  if (alone) return others * bytes(count);
  const int64_t share =
      share_begin(count, peers_.rank() + 1, peers_.size()) - share_begin(count, peers_.rank(), peers_.size());
  return bytes(count) - bytes(share) + others * bytes(share);
}

bool SharedMemory::add_up(const AllReduce& operation, uint64_t chunk, int64_t count, int64_t begin, int64_t end,
                          Code code, void* out) const {
  std::vector<Source> sources;
  for (int rank = 0; rank < peers_.size(); ++rank) {
    const Slot in = slot(rank, chunk);
    sources.push_back({in.codes, in.scales, operation.wire, operation.block_shift});
  }
  Leaf leaf{};
  leaf.sources = sources.data();
  leaf.weights = ones_.data();
  leaf.clients = peers_.size();
  leaf.fold = Fold::mean;
  leaf.code = code;
  leaf.divisor = (operation.mean ? peers_.size() : 1) * static_cast<double>(publish_factor(operation, peers_.size()));
  leaf.count = count;
  leaf.out = out;
  return kernels().weighted_sum(leaf, begin, end, false);
}

void SharedMemory::reduce(const AllReduce& operation, int64_t begin, int64_t end, uint64_t chunk) {
  const int64_t count = end - begin;
  const int64_t first = share_begin(count, peers_.rank(), peers_.size());
  const int64_t last = share_begin(count, peers_.rank() + 1, peers_.size());
  if (chunk >= 2) wait_for_all(&Member::gathered, chunk - 1);
  const Slot out = means(chunk);
  if (!has_scales(operation.wire) && operation.rounding == Rounding::nearest) {
    add_up(operation, chunk, count, first, last, operation.wire, out.codes);
  } else {
    add_up(operation, chunk, count, first, last, Code::float32, sums_.data());
    Cast cast{};
    cast.source = {shifted(sums_.data(), Code::float32, begin), nullptr, Code::float32, 0};
    cast.code = operation.wire;
    cast.block_shift = operation.block_shift;
    cast.rounding = operation.rounding;
    cast.key = operation.key;
    cast.key.rank = UINT32_MAX;  // the means' own random numbers, the same whoever rounds them
    cast.count = operation.count;
    cast.out = shifted(out.codes, operation.wire, begin);
    cast.scales = shifted_scales(out.scales, operation.block_shift, begin);
    kernels().cast(cast, begin + first, begin + last, false);
  }
  member(peers_.rank()).reduced.store(chunk + 1, std::memory_order_release);
}

bool SharedMemory::reduce_alone(const AllReduce& operation, uint64_t chunk) {
  const bool finite = add_up(operation, chunk, operation.count, 0, operation.count, operation.code, operation.data);
  Member& own = member(peers_.rank());
  own.reduced.store(chunk + 1, std::memory_order_release);
  own.gathered.store(chunk + 1, std::memory_order_release);
  return finite;
}

bool SharedMemory::gather(const AllReduce& operation, int64_t begin, int64_t end, uint64_t chunk) {
  const Slot in = means(chunk);
  Cast cast{};
  cast.source = {shifted(in.codes, operation.wire, begin), shifted_scales(in.scales, operation.block_shift, begin),
                 operation.wire, operation.block_shift};
  cast.code = operation.code;
  cast.rounding = Rounding::nearest;
  cast.count = operation.count;
  cast.out = operation.data;
  const bool stream = encoded_bytes(operation.code, operation.count) >= kStreamBytes;
  const bool finite = kernels().cast(cast, begin, end, stream);
  member(peers_.rank()).gathered.store(chunk + 1, std::memory_order_release);
  return finite;
}

void SharedMemory::wait_for_all(Counter counter, uint64_t value) {
  for (int peer = 0; peer < peers_.size(); ++peer)
    if ((member(peer).*counter).load(std::memory_order_acquire) < value) wait_for(peer, counter, value);
}

void SharedMemory::wait_for(int peer, Counter counter, uint64_t value) {
  const auto& awaited = member(peer).*counter;
  const auto has_come = [&] { return awaited.load(std::memory_order_acquire) >= value; };
  for (int spin = 0; spin < kSpins; ++spin, relax())
    if (has_come()) return;
  Member& own = member(peers_.rank());
  own.waits_for = peer + 1;
  auto next_check = Clock::now() + kCheckEvery;
  for (int64_t turn = 0; !has_come(); ++turn) {
    if (turn < kYields) sched_yield();
    else std::this_thread::sleep_for(kNap);
    if (Clock::now() < next_check) continue;
    next_check = Clock::now() + kCheckEvery;
    ++own.beats;
    if (own.lost != 0) give_up(own.lost - 1, "was lost");
    if (const int ended = peers_.ended(); ended >= 0 && !has_come()) give_up(ended, "has ended");
    if (Clock::now() > deadline_) give_up(culprit(peer), "did not come within the timeout");
  }
  own.waits_for = 0;
}

void SharedMemory::give_up(int peer, const std::string& reason) {
  for (int rank = 0; rank < peers_.size(); ++rank) {
    int32_t none = 0;
    member(rank).lost.compare_exchange_strong(none, peer + 1);
  }
  throw PeerLost(peers_.name(peer), "rank " + std::to_string(peers_.name(peer)) + " " + reason);
}

int SharedMemory::culprit(int peer) const {
  std::vector<uint32_t> before;
  for (int rank = 0; rank < peers_.size(); ++rank) before.push_back(member(rank).beats);
  std::this_thread::sleep_for(25 * kCheckEvery);
  for (int step = 0; step < peers_.size(); ++step) {
    const int next = member(peer).waits_for;
    if (member(peer).beats == before[peer] || next == 0 || next - 1 == peers_.rank()) break;
    peer = next - 1;  // it waits for somebody itself
  }
  return peer;
}

}  // namespace fastagg::comm
