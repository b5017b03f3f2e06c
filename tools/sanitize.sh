#!/usr/bin/env bash
# Runs the native code under AddressSanitizer with UBSan, and under ThreadSanitizer: the CPU's loops and thread pool, and
# the CUDA kernels on the CPU. The drivers are C++, so that no sanitizer has to live with an interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."

export UBSAN_OPTIONS=print_stacktrace=1
# A forked child keeps its parent's threads in memory only: those are no leaks.
export ASAN_OPTIONS=detect_leaks=0
export TSAN_OPTIONS=die_after_fork=0

# Without nvcc CUDA's headers come from the environment's packages.
headers=$(PYTHONPATH=tests python -c 'import cuda_on_cpu_module as module; print(module.cuda_headers() or "")')

for sanitizers in address,undefined thread; do
  folder=build/sanitize/${sanitizers%%,*}
  printf '\n-- the CPU floor and the same-host transport under %s\n' "$sanitizers"
  cmake -S tests/native -B "$folder/native" -DFASTAGG_SANITIZE="$sanitizers" >/dev/null
  cmake --build "$folder/native" --parallel 2
  if [ "$sanitizers" = thread ]; then "$folder/native/conformance" threads; # loops of one thread have no races
  else "$folder/native/conformance"; fi
  "$folder/native/exchange"
  printf '\n-- the CUDA kernels on the CPU under %s\n' "$sanitizers"
  cmake -S tests/cuda_on_cpu -B "$folder/cuda" -DFASTAGG_CUDA_ON_CPU_MODULE=OFF -DFASTAGG_SANITIZE="$sanitizers" \
    -DFASTAGG_CUDA_HEADERS="$headers" >/dev/null
  cmake --build "$folder/cuda" --parallel 2 --target driver peers
  "$folder/cuda/driver"
  "$folder/cuda/peers"
done
