#!/usr/bin/env bash
# Checks the native sources: their format, warnings as errors on every compiler there is, and the stubs.
set -euo pipefail
cd "$(dirname "$0")/.."

section() { printf '\n-- %s\n' "$*"; }

section "clang-format"
bash tools/native_sources.sh | xargs clang-format --dry-run -Werror

section "C++ and CUDA with warnings as errors (CUDA where nvcc is on the PATH)"
bash tools/build_strict.sh

section "machine code of the CUDA kernels: local memory and whole vectors"
python tools/check_sass.py build/lint/native

section "stubs of the native modules"
bash tools/stubs.sh check

section "Clang: warnings as errors, and the bytes of every instruction set"
bash tools/lint_clang.sh

section "NEON: cross-compiling for aarch64 with warnings as errors"
bash tools/lint_aarch64.sh
