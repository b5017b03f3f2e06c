#include "segment.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <string>
#include <system_error>

namespace fastagg::comm {
namespace {

[[noreturn]] void fail(int error, const std::string& doing) {
  throw std::system_error(error, std::generic_category(), doing);
}

int create_file(size_t bytes) {
#if defined(__linux__)
  const int descriptor = memfd_create("fastagg", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (descriptor < 0) fail(errno, "creating shared memory");
  // Sealed: a peer that shrank it would end the others with a bus error.
  if (fchmod(descriptor, S_IRUSR | S_IWUSR) != 0 || ftruncate(descriptor, static_cast<off_t>(bytes)) != 0 ||
      fcntl(descriptor, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) {
    const int error = errno;
    close(descriptor);
    fail(error, "sizing shared memory");
  }
  return descriptor;
#else
  (void)bytes;
  fail(ENOSYS, "shared memory needs Linux");
#endif
}

}  // namespace

Segment Segment::create(size_t bytes) { return Segment(create_file(bytes), bytes); }

Segment Segment::attach(pid_t creator, int descriptor, size_t bytes) {
  const std::string path = "/proc/" + std::to_string(creator) + "/fd/" + std::to_string(descriptor);
  const int own = open(path.c_str(), O_RDWR | O_CLOEXEC);
  if (own < 0) fail(errno, "opening " + path);
  struct stat status{};
  const bool known = fstat(own, &status) == 0 && S_ISREG(status.st_mode) && status.st_uid == geteuid() &&
                     status.st_size == static_cast<off_t>(bytes);
  if (!known) {
    close(own);
    fail(EPERM, path + " is not this user's segment");
  }
  return Segment(own, bytes);
}

Segment::Segment(int descriptor, size_t bytes) : descriptor_(descriptor), bytes_(bytes) {
  void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
  if (data == MAP_FAILED) {
    const int error = errno;
    close_descriptor();
    fail(error, "mapping shared memory");
  }
  data_ = static_cast<char*>(data);
}

Segment::Segment(Segment&& other) noexcept : descriptor_(other.descriptor_), data_(other.data_), bytes_(other.bytes_) {
  other.descriptor_ = -1;
  other.data_ = nullptr;
}

Segment::~Segment() {
  if (data_ != nullptr) munmap(data_, bytes_);
  close_descriptor();
}

void Segment::close_descriptor() {
  if (descriptor_ >= 0) close(descriptor_);
  descriptor_ = -1;
}

}  // namespace fastagg::comm
