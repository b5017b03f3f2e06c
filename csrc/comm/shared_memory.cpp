#include "shared_memory.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <thread>

#include "cpu/dispatch.h"
#include "cpu/float_environment.h"
#include "cpu/operations.h"
#include "cpu/stream.h"

namespace fastagg::comm {
namespace {

constexpr int64_t kLine = 64;
/// From this size on a result is stored around the caches.
constexpr int64_t kStreamBytes = 4 << 20;

/// Looks at a counter before the processor is handed on, and handing it on before sleeping.
constexpr int kSpins = 256, kYields = 2000;
constexpr auto kNap = std::chrono::microseconds(50);
constexpr auto kCheckEvery = std::chrono::milliseconds(2);
constexpr int64_t kChecksBetweenSignals = 50;

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

[[noreturn]] void throw_lost(int name, const std::string& reason) {
  throw PeerLost(name, "rank " + std::to_string(name) + " " + reason);
}

int64_t bytes_of(const Exchange& exchange, int64_t elements) {
  const int64_t blocks = has_scales(exchange.wire) && elements > 0 ? ((elements - 1) >> exchange.block_shift) + 1 : 0;
  return encoded_bytes(exchange.wire, elements) + 4 * blocks;
}

/// Elements of a slot: at least one pass of `cast` for every rank's piece.
int64_t slot_elements(int ranks) { return std::max(kChunkElements / ranks / kChunk, int64_t{1}) * kChunk * ranks; }
int64_t slot_codes_bytes(int ranks) { return slot_elements(ranks) * static_cast<int64_t>(sizeof(double)); }
int64_t slot_stride(int ranks) {
  return slot_codes_bytes(ranks) + (slot_elements(ranks) >> kMinimumBlockShift) * static_cast<int64_t>(sizeof(float));
}

}  // namespace

/// A rank's flags; nobody else writes them, but `lost`, which the first to notice sets for all.
struct alignas(2 * kLine) SharedMemory::Member {
  std::atomic<uint64_t> published, reduced, gathered;
  std::atomic<int32_t> waits_for, lost;  // a rank + 1, and the name of one + 1; 0: none
  std::atomic<uint32_t> beats;           // of a rank that waits: it lives
  // Of even and of odd calls: a fast rank may be one call ahead.
  double squares[2];  // of what this rank has reduced
  Phases phases[2];
  int64_t counts[2];
  char descriptions[2][kDescriptionBytes];
};
static_assert(std::atomic<uint64_t>::is_always_lock_free, "counters are shared between processes");

/// What a chunk has of one slice, and where it lies encoded: element i is the i-th of `codes`.
struct SharedMemory::Piece {
  int64_t begin, end;
  void* codes;
  float* scales;
};

size_t SharedMemory::bytes(int ranks) {
  return ranks * sizeof(Member) + static_cast<size_t>(kSlots * (ranks + 1) * slot_stride(ranks));
}

SharedMemory::SharedMemory(std::shared_ptr<Segment> segment, const std::vector<pid_t>& processes,
                           std::vector<int> names, int rank)
    : segment_(std::move(segment)),
      peers_(processes, std::move(names), rank),
      piece_elements_(slot_elements(peers_.size()) / peers_.size()),
      sources_(processes.size()) {}

SharedMemory::Member& SharedMemory::member(int rank) const { return reinterpret_cast<Member*>(segment_->data())[rank]; }

SharedMemory::Piece SharedMemory::piece_of(const Exchange& exchange, int owner, int64_t chunk, int slot) const {
  const int ranks = peers_.size();
  const Slice slice = slice_of(exchange.count, owner, ranks);
  const int64_t begin = std::min(slice.begin + chunk * piece_elements_, slice.end);
  const int64_t index = kSlots * slot + static_cast<int64_t>(exchanged_ + chunk) % kSlots;
  const int64_t place = owner * piece_elements_;
  char* codes = segment_->data() + ranks * sizeof(Member) + index * slot_stride(ranks);
  float* scales = reinterpret_cast<float*>(codes + slot_codes_bytes(ranks));
  return {begin, std::min(begin + piece_elements_, slice.end),
          shifted(codes + encoded_bytes(exchange.wire, place), exchange.wire, begin),
          shifted(scales + (place >> exchange.block_shift), Code::float32, begin >> exchange.block_shift)};
}

int64_t SharedMemory::chunks_of(const Exchange& exchange) const {
  const int64_t largest = slice_of(exchange.count, 0, peers_.size()).end;
  return std::max<int64_t>((largest + piece_elements_ - 1) / piece_elements_, 1);
}

Outcome SharedMemory::all_reduce(const Exchange& exchange, const Patience& patience) {
  const FloatEnvironment environment;
  const bool one_shot = in_one_shot(exchange.count, peers_.size());
  begin(exchange, one_shot ? Phases::one_shot : Phases::all_reduce, patience);
  return end(exchange, one_shot ? reduce_slices_of(exchange, 0, peers_.size()) : share_slices(exchange));
}

bool SharedMemory::share_slices(const Exchange& exchange) {
  bool finite = true;
  const int64_t chunks = chunks_of(exchange);
  publish(exchange, 0);
  compare(exchange.description);
  for (int64_t chunk = 0; chunk <= chunks; ++chunk) {
    if (chunk + 1 < chunks) publish(exchange, chunk + 1);
    if (chunk < chunks) reduce_to_means(exchange, chunk);
    if (chunk > 0) finite &= gather(exchange, chunk - 1);
  }
  return finite;
}

bool SharedMemory::reduce_slices_of(const Exchange& exchange, int first, int last) {
  bool finite = true;
  const int64_t chunks = chunks_of(exchange);
  publish(exchange, 0);
  compare(exchange.description);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    if (chunk + 1 < chunks) publish(exchange, chunk + 1);
    wait_for_all(&Member::published, chunk + 1);
    for (int owner = first; owner < last; ++owner) finite &= reduce_in_place(exchange, chunk, owner);
    finish(chunk, {&Member::reduced, &Member::gathered});
  }
  return finite;
}

Outcome SharedMemory::reduce_scatter(const Exchange& exchange, const Patience& patience) {
  const FloatEnvironment environment;
  begin(exchange, Phases::reduce_scatter, patience);
  return end(exchange, reduce_slices_of(exchange, peers_.rank(), peers_.rank() + 1));
}

Outcome SharedMemory::all_gather(const Exchange& exchange, const Patience& patience) {
  const FloatEnvironment environment;
  begin(exchange, Phases::all_gather, patience);
  bool finite = true;
  const int64_t chunks = chunks_of(exchange);
  publish_slice(exchange, 0);
  compare(exchange.description);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    if (chunk + 1 < chunks) publish_slice(exchange, chunk + 1);
    finite &= gather(exchange, chunk);
  }
  return end(exchange, finite);
}

void SharedMemory::broadcast(void* data, int64_t bytes, int root, const std::string& description,
                             const Patience& patience) {
  begin(description, bytes, Phases::broadcast, patience);
  const int ranks = peers_.size();
  const int64_t size = slot_stride(ranks);
  const int64_t chunks = std::max<int64_t>((bytes + size - 1) / size, 1);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t index = kSlots * root + static_cast<int64_t>(exchanged_ + chunk) % kSlots;
    char* slot = segment_->data() + ranks * sizeof(Member) + index * size;
    char* piece = static_cast<char*>(data) + chunk * size;
    const auto length = static_cast<size_t>(std::min(bytes - chunk * size, size));
    const bool sends = peers_.rank() == root;
    if (sends) wait_for_all(&Member::reduced, chunk + 1 - kSlots);  // nobody reads the slot any more
    if (sends && length > 0) memcpy(slot, piece, length);
    finish(chunk, {&Member::published});
    if (chunk == 0) compare(description);
    if (!sends) wait_for_one(root, &Member::published, chunk + 1);
    if (!sends && length > 0) memcpy(piece, slot, length);
    finish(chunk, {&Member::reduced, &Member::gathered});
  }
  exchanged_ += chunks;
  ++calls_;
}

void SharedMemory::begin(const Exchange& exchange, Phases phases, const Patience& patience) {
  begin(exchange.description, exchange.count, phases, patience);
  squares_ = exchange.norm ? &member(peers_.rank()).squares[calls_ & 1] : nullptr;
}

void SharedMemory::begin(const std::string& description, int64_t count, Phases phases, const Patience& patience) {
  patience_ = &patience;
  deadline_ = Clock::now() + patience.timeout;
  phases_ = phases;
  Member& own = member(peers_.rank());
  if (const int lost = own.lost; lost != 0) throw_lost(lost - 1, "was lost before");
  snprintf(own.descriptions[calls_ & 1], kDescriptionBytes, "%s", description.c_str());
  own.phases[calls_ & 1] = phases;
  own.counts[calls_ & 1] = count;
  own.squares[calls_ & 1] = 0;
}

void SharedMemory::compare(const std::string& description) {
  wait_for_all(&Member::published, 1);
  const int slot = calls_ & 1;
  const Member& own = member(peers_.rank());
  for (int peer = 0; peer < peers_.size(); ++peer) {
    const Member& other = member(peer);
    if (other.phases[slot] == own.phases[slot] && other.counts[slot] == own.counts[slot] &&
        strncmp(other.descriptions[slot], own.descriptions[slot], kDescriptionBytes) == 0)
      continue;
    const std::string theirs = other.descriptions[slot];
    finish(0, {&Member::reduced, &Member::gathered});
    ++calls_, ++exchanged_;  // every rank sees a difference, and so ends here: the next call begins anew
    throw Mismatch("rank " + std::to_string(peers_.name(peer)) + " has " + theirs + "; rank " +
                   std::to_string(peers_.name(peers_.rank())) + " has " + description);
  }
}

Outcome SharedMemory::end(const Exchange& exchange, bool finite) {
  Outcome outcome{finite, wire_bytes(exchange), 0};
  if (phases_ == Phases::one_shot) {
    outcome.squares = member(peers_.rank()).squares[calls_ & 1];  // of everything, and final
  } else {
    for (int rank = 0; rank < peers_.size(); ++rank) outcome.squares += member(rank).squares[calls_ & 1];
    if (exchange.wire != Code::float64) outcome.squares *= exchange.factor * exchange.factor;
  }
  exchanged_ += chunks_of(exchange);
  ++calls_;
  stream_fence();
  return outcome;
}

void SharedMemory::finish(int64_t chunk, std::initializer_list<Counter> phases) {
  for (const Counter phase : phases)
    (member(peers_.rank()).*phase).store(exchanged_ + chunk + 1, std::memory_order_release);
}

/// Whether a rank can read its own values where they are: nothing is added to them, nothing lost.
bool SharedMemory::reads_own_values(const Exchange& exchange) const {
  return exchange.code == exchange.wire && !has_scales(exchange.wire) && exchange.encoded_factor == 1 &&
         exchange.residual == nullptr;
}

void SharedMemory::publish(const Exchange& exchange, int64_t chunk) {
  wait_for_all(&Member::reduced, chunk + 1 - kSlots);  // nobody reads the slot's last chunk any more
  const bool leaves_out_own = phases_ != Phases::one_shot && reads_own_values(exchange);
  for (int owner = 0; owner < peers_.size(); ++owner)
    if (owner != peers_.rank() || !leaves_out_own)
      publish_piece(exchange, piece_of(exchange, owner, chunk, peers_.rank()));
  finish(chunk, {&Member::published});
}

void SharedMemory::publish_piece(const Exchange& exchange, const Piece& piece) {
  const float factor = exchange.encoded_factor;
  const Cast encoded = encoded_in(exchange, piece, factor, exchange.key.rank);
  if (exchange.wire == Code::float64) {
    const auto* data = static_cast<const double*>(exchange.data);
    std::copy(data + piece.begin, data + piece.end, static_cast<double*>(piece.codes) + piece.begin);
  } else if (exchange.residual != nullptr) {
    const Feedback feedback{exchange.residual, exchange.residual_factor, exchange.error, 1 / factor, false};
    kernels().reduce({&encoded.source, 1, 1 / factor, feedback, encoded}, piece.begin, piece.end, nullptr);
  } else {
    kernels().cast(encoded, piece.begin, piece.end, false);
  }
}

void SharedMemory::publish_slice(const Exchange& exchange, int64_t chunk) {
  wait_for_all(&Member::gathered, chunk + 1 - kSlots);
  const Piece piece = piece_of(exchange, peers_.rank(), chunk, peers_.size());
  const Cast encoded = encoded_in(exchange, piece, 1, kMeansRank);
  if (exchange.wire == Code::float64) {
    sources_.assign(1, encoded.source);
    add_up_float64(piece, 1, exchange.factor, static_cast<double*>(encoded.out));
  } else {
    kernels().reduce({&encoded.source, 1, 1, {}, encoded}, piece.begin, piece.end, squares_);
  }
  finish(chunk, {&Member::published, &Member::reduced});
}

void SharedMemory::reduce_to_means(const Exchange& exchange, int64_t chunk) {
  wait_for_all(&Member::published, chunk + 1);
  wait_for_all(&Member::gathered, chunk + 1 - kSlots);
  const Piece piece = piece_of(exchange, peers_.rank(), chunk, peers_.size());
  // The means have random numbers of their own, the same whoever rounds them.
  const double factor = exchange.wire == Code::float64 ? exchange.factor : 1;  // into the one rounding; others gather
  add_up(exchange, chunk, peers_.rank(), encoded_in(exchange, piece, 1, kMeansRank), factor, exchange.error);
  finish(chunk, {&Member::reduced});
}

bool SharedMemory::reduce_in_place(const Exchange& exchange, int64_t chunk, int owner) {
  Cast result{};
  result.code = exchange.code;
  result.rounding = Rounding::nearest;
  result.count = exchange.count;
  result.out = exchange.data;
  // What rounding to the tensor's own 16 bits takes is the owner's to feed back.
  const bool loses = owner == peers_.rank() && (exchange.code == Code::float16 || exchange.code == Code::bfloat16);
  return add_up(exchange, chunk, owner, result, exchange.factor, loses ? exchange.error : nullptr);
}

bool SharedMemory::add_up(const Exchange& exchange, int64_t chunk, int owner, const Cast& result, double factor,
                          float* error) {
  const int ranks = peers_.size();
  sources_.resize(ranks);
  for (int rank = 0; rank < ranks; ++rank) {
    const Piece piece = piece_of(exchange, owner, chunk, rank);
    sources_[rank] = {piece.codes, piece.scales, exchange.wire, exchange.block_shift};
  }
  if (reads_own_values(exchange)) sources_[peers_.rank()] = {exchange.data, nullptr, exchange.code, 0};
  const Piece piece = piece_of(exchange, owner, chunk, owner);
  const auto share = static_cast<float>(exchange.mean ? ranks : 1);
  if (exchange.wire == Code::float64) return add_up_float64(piece, share, factor, static_cast<double*>(result.out));
  // What encoding a mean loses is the owner's alone to feed back: as its share of the next sum, before the factor.
  const Feedback feedback{nullptr, 0, error, static_cast<float>(share / factor), true};
  const auto divisor = static_cast<float>(share * exchange.encoded_factor / factor);
  return kernels().reduce({sources_.data(), ranks, divisor, feedback, result}, piece.begin, piece.end, squares_);
}

bool SharedMemory::add_up_float64(const Piece& piece, double divisor, double factor, double* out) {
  std::vector<const double*> sources;
  for (const Source& source : sources_) sources.push_back(static_cast<const double*>(source.data) + piece.begin);
  return cpu::reduce_float64(sources.data(), static_cast<int32_t>(sources.size()), piece.end - piece.begin, divisor,
                             factor, out + piece.begin, squares_);
}

bool SharedMemory::gather(const Exchange& exchange, int64_t chunk) {
  wait_for_all(&Member::reduced, chunk + 1);
  bool finite = true;
  for (int owner = 0; owner < peers_.size(); ++owner)
    finite &= gather_piece(exchange, piece_of(exchange, owner, chunk, peers_.size()));
  finish(chunk, {&Member::gathered});
  return finite;
}

bool SharedMemory::gather_piece(const Exchange& exchange, const Piece& piece) const {
  if (exchange.wire == Code::float64) {
    const double* means = static_cast<const double*>(piece.codes) + piece.begin;
    double* out = static_cast<double*>(exchange.data) + piece.begin;
    return cpu::reduce_float64(&means, 1, piece.end - piece.begin, 1, 1, out, nullptr);
  }
  Cast cast{};
  cast.source = {piece.codes, piece.scales, exchange.wire, exchange.block_shift};
  cast.code = exchange.code;
  cast.rounding = Rounding::nearest;
  cast.count = exchange.count;
  cast.out = exchange.data;
  cast.factor = static_cast<float>(exchange.factor);
  const bool stream = encoded_bytes(exchange.code, exchange.count) >= kStreamBytes;
  return kernels().cast(cast, piece.begin, piece.end, stream);
}

Cast SharedMemory::encoded_in(const Exchange& exchange, const Piece& piece, float factor, uint32_t random_rank) const {
  Cast cast{};
  cast.source = {exchange.data, nullptr, exchange.code, 0};
  cast.code = exchange.wire;
  cast.block_shift = exchange.block_shift;
  cast.rounding = exchange.rounding;
  cast.key = exchange.key;
  cast.key.rank = random_rank;
  cast.count = exchange.count;
  cast.out = piece.codes;
  cast.scales = piece.scales;
  cast.factor = factor;
  cast.stretches = exchange.stretches;
  cast.stretch_count = exchange.stretch_count;
  return cast;
}

int64_t SharedMemory::wire_bytes(const Exchange& exchange) const {
  int64_t scattered = 0, gathered = 0;
  for (int rank = 0; rank < peers_.size(); ++rank) {
    const Slice slice = slice_of(exchange.count, rank, peers_.size());
    const int64_t bytes = bytes_of(exchange, slice.end - slice.begin);
    if (rank != peers_.rank()) scattered += bytes;
    if (rank == peers_.rank() || phases_ == Phases::one_shot) gathered += bytes * (peers_.size() - 1);
  }
  if (phases_ == Phases::reduce_scatter) return scattered;
  if (phases_ == Phases::all_reduce) return scattered + gathered;
  return gathered;
}

void SharedMemory::wait_for_all(Counter counter, int64_t chunks) {
  const auto value = static_cast<int64_t>(exchanged_) + chunks;
  for (int peer = 0; peer < peers_.size(); ++peer)
    if (static_cast<int64_t>((member(peer).*counter).load(std::memory_order_acquire)) < value)
      wait_for(peer, counter, static_cast<uint64_t>(value));
}

void SharedMemory::wait_for_one(int peer, Counter counter, int64_t chunks) {
  wait_for(peer, counter, exchanged_ + static_cast<uint64_t>(chunks));
}

void SharedMemory::wait_for(int peer, Counter counter, uint64_t value) {
  const auto& awaited = member(peer).*counter;
  const auto has_come = [&] { return awaited.load(std::memory_order_acquire) >= value; };
  for (int spin = 0; spin < kSpins; ++spin, relax())
    if (has_come()) return;
  Member& own = member(peers_.rank());
  own.waits_for = peer + 1;
  auto next_check = Clock::now() + kCheckEvery;
  int64_t checks = 0;
  for (int64_t turn = 0; !has_come(); ++turn) {
    if (turn < kYields) sched_yield();
    else std::this_thread::sleep_for(kNap);
    if (Clock::now() < next_check) continue;
    next_check = Clock::now() + kCheckEvery;
    ++own.beats;
    if (const int lost = own.lost; lost != 0) throw_lost(lost - 1, "was lost");
    if (const int ended = peers_.ended(); ended >= 0 && !has_come()) give_up(ended, "has ended");
    if (interrupted_ || (++checks % kChecksBetweenSignals == 0 && patience_->is_interrupted()))
      give_up(peers_.rank(), "was interrupted");
    if (Clock::now() > deadline_) give_up(culprit(peer), "did not come within the timeout");
  }
  own.waits_for = 0;
}

int SharedMemory::tell_lost(int name) {
  int32_t first = 0;
  if (member(0).lost.compare_exchange_strong(first, name + 1)) first = name + 1;
  for (int rank = 1; rank < peers_.size(); ++rank) member(rank).lost = first;
  return first - 1;
}

void SharedMemory::interrupt() {
  interrupted_ = true;
  tell_lost(peers_.name(peers_.rank()));
}

void SharedMemory::give_up(int peer, const std::string& reason) {
  const int first = tell_lost(peers_.name(peer));
  throw_lost(first, first == peers_.name(peer) ? reason : "was lost");
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
