#include "peers.h"

#include <poll.h>
#include <unistd.h>
#if defined(__linux__)
#include <sys/syscall.h>
#endif

#include <cerrno>
#include <system_error>

namespace fastagg::comm {
namespace {

/// A descriptor that becomes readable when the process ends; unlike its number it never names another process.
int open_process(pid_t process) {
#if defined(SYS_pidfd_open)
  return static_cast<int>(syscall(SYS_pidfd_open, process, 0));
#else
  (void)process;
  errno = ENOSYS;
  return -1;
#endif
}

}  // namespace

Peers::Peers(const std::vector<pid_t>& processes, std::vector<int> names, int rank)
    : descriptors_(processes.size(), -1), names_(std::move(names)), rank_(rank) {
  for (size_t peer = 0; peer < processes.size(); ++peer) {
    if (static_cast<int>(peer) == rank || processes[peer] == 0) continue;
    descriptors_[peer] = open_process(processes[peer]);
    if (descriptors_[peer] < 0) {
      const int error = errno;
      if (error == ESRCH) {
        ended_ = static_cast<int>(peer);
        continue;
      }
      for (const int descriptor : descriptors_)
        if (descriptor >= 0) close(descriptor);
      throw std::system_error(error, std::generic_category(),
                              "watching the process of rank " + std::to_string(name(static_cast<int>(peer))));
    }
  }
}

Peers::~Peers() {
  for (const int descriptor : descriptors_)
    if (descriptor >= 0) close(descriptor);
}

int Peers::ended() const {
  if (ended_ >= 0) return ended_;
  std::vector<pollfd> polled;
  for (const int descriptor : descriptors_) polled.push_back({descriptor, POLLIN, 0});  // poll skips negative ones
  if (poll(polled.data(), polled.size(), 0) <= 0) return -1;
  for (size_t peer = 0; peer < polled.size(); ++peer)
    if (polled[peer].revents != 0) return static_cast<int>(peer);
  return -1;
}

}  // namespace fastagg::comm
