#include "cpu/mapped_file.h"

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>

namespace fastagg {

/// A guard's range. The signal's handler walks the list of all, so that none is ever freed: guards use them again.
struct MappedRange {
  std::atomic<bool> used{true}, cut{false};
  std::atomic<uintptr_t> begin{0}, end{0};
  MappedRange* next = nullptr;
};

namespace {

std::atomic<MappedRange*> first_range{nullptr};
std::atomic<bool> is_installed{false};
struct sigaction previous;
const auto page_bytes = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));

// What one fault replaces: a large file's end costs neither a fault for each page nor much memory.
constexpr uintptr_t kReplacedBytes = 1 << 20;

MappedRange* range_with(uintptr_t address) {
  for (MappedRange* range = first_range; range != nullptr; range = range->next) {
    if (address < range->end && address >= range->begin) return range;
  }
  return nullptr;
}

/// Puts memory of its own in the place of a mapped file's pages from the one at an address on.
bool replace_pages(uintptr_t address) {
  MappedRange* range = range_with(address);
  if (range == nullptr) return false;
  const uintptr_t begin = address / page_bytes * page_bytes;
  const uintptr_t nbytes = std::min(kReplacedBytes, range->end - begin);
  void* const place = reinterpret_cast<void*>(begin);
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED;
  if (mmap(place, nbytes, PROT_READ | PROT_WRITE, flags, -1, 0) == MAP_FAILED) return false;
  range->cut = true;
  std::memset(place, 255, nbytes);
  return true;
}

/// Does what would have been done without this handler.
void hand_on(int number, siginfo_t* info, void* context) {
  const bool is_sent = info->si_code <= 0;  // by kill(): no instruction runs into it again
  if (previous.sa_flags & SA_SIGINFO) {
    previous.sa_sigaction(number, info, context);
  } else if (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN) {
    previous.sa_handler(number);
  } else if (previous.sa_handler == SIG_DFL || !is_sent) {
    sigaction(number, &previous, nullptr);
    if (is_sent) raise(number);
  }
}

void on_bus_error(int number, siginfo_t* info, void* context) {
  const int error = errno;
  const bool is_replaced = info->si_code == BUS_ADRERR && replace_pages(reinterpret_cast<uintptr_t>(info->si_addr));
  errno = error;
  if (!is_replaced) hand_on(number, info, context);
}

/// Once, and for good: a handler that was installed later may call this one.
void install_handler() {
  if (is_installed.exchange(true)) return;
  struct sigaction action = {};
  action.sa_sigaction = on_bus_error;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigemptyset(&action.sa_mask);
  sigaction(SIGBUS, &action, &previous);
}

/// A range that no guard uses.
MappedRange* unused_range() {
  for (MappedRange* range = first_range; range != nullptr; range = range->next) {
    bool used = false;
    if (range->used.compare_exchange_strong(used, true)) return range;
  }
  auto* range = new MappedRange;
  range->next = first_range;
  while (!first_range.compare_exchange_weak(range->next, range)) {
  }
  return range;
}

}  // namespace

MappedFileGuard::MappedFileGuard(const void* begin, uint64_t nbytes) : range_(unused_range()) {
  install_handler();
  const auto address = reinterpret_cast<uintptr_t>(begin);
  range_->cut = false;
  range_->begin = address;
  range_->end = (address + nbytes + page_bytes - 1) / page_bytes * page_bytes;
}

MappedFileGuard::~MappedFileGuard() {
  range_->end = 0;
  range_->used = false;
}

bool MappedFileGuard::was_cut() const { return range_->cut; }

}  // namespace fastagg
