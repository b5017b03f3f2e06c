#include "dispatch.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace fastagg {
namespace {

#if defined(__x86_64__)
/// F16C by its bit, for which older compilers have no name; that the system keeps its registers is said by AVX2.
bool has_f16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}
bool has_avx2() { return __builtin_cpu_supports("avx2") && has_f16c() && __builtin_cpu_supports("fma"); }
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#else
bool has_avx2() { return false; }
bool has_avx512() { return false; }
#endif

/// What this build and this processor have, best first.
std::vector<const Kernels*> available() {
  std::vector<const Kernels*> found;
  if (avx512_kernels != nullptr && has_avx512()) found.push_back(avx512_kernels);
  if (avx2_kernels != nullptr && has_avx2()) found.push_back(avx2_kernels);
  if (neon_kernels != nullptr) found.push_back(neon_kernels);
  found.push_back(scalar_kernels);
  return found;
}

const Kernels* find(const std::string& name) {
  std::string names;
  for (const Kernels* candidate : available()) {
    if (name == candidate->name) return candidate;
    names += names.empty() ? candidate->name : std::string(", ") + candidate->name;
  }
  throw std::invalid_argument("instruction set '" + name + "' is not available here; this processor has: " + names);
}

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

const Kernels& kernels() {
  const Kernels* current = chosen.load(std::memory_order_acquire);
  if (current == nullptr) {
    const char* wanted = std::getenv("FASTAGG_ISA");
    current = wanted != nullptr && *wanted != '\0' ? find(wanted) : available().front();
    chosen.store(current, std::memory_order_release);
  }
  return *current;
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Kernels* candidate : available()) names.emplace_back(candidate->name);
  return names;
}

void force_isa(const std::string& name) { chosen.store(find(name), std::memory_order_release); }

}  // namespace fastagg
