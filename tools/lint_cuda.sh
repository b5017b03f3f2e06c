#!/usr/bin/env bash
# Compiles the CUDA floor by nvcc with warnings as errors; without nvcc it skips.
set -euo pipefail
cd "$(dirname "$0")/.."

if ! command -v nvcc >/dev/null; then
  echo "skipped: no nvcc"
  exit 0
fi
mkdir -p build/lint/cuda
for source in csrc/cuda/*.cu; do
  echo "$source"
  nvcc -std=c++17 -fmad=false -Icsrc -Werror all-warnings -Xcompiler -Wall,-Wextra,-Werror \
    -c -o "build/lint/cuda/$(basename "$source").o" "$source"
done
