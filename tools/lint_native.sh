#!/usr/bin/env bash
# Checks the native sources: their format, warnings as errors on every compiler there is, and the stubs.
set -euo pipefail
cd "$(dirname "$0")/.."

section() { printf '\n-- %s\n' "$*"; }

section "clang-format"
bash tools/native_sources.sh | xargs clang-format --dry-run -Werror

section "C++ build with warnings as errors"
cmake -S . -B build/lint/native -G Ninja -DFASTAGG_WERROR=ON -DFASTAGG_CUDA=OFF \
  -DSKBUILD_PROJECT_VERSION=0 -DPython_EXECUTABLE="$(command -v python)" \
  -Dpybind11_DIR="$(python -m pybind11 --cmakedir)" >/dev/null
cmake --build build/lint/native

section "stubs of the native modules"
bash tools/stubs.sh check

section "CUDA with warnings as errors"
bash tools/lint_cuda.sh

section "NEON: cross-compiling for aarch64 with warnings as errors"
bash tools/lint_aarch64.sh
