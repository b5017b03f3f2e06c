#!/usr/bin/env bash
# Compiles the native sources with Clang, warnings as errors, and runs the conformance program; without Clang it skips.
set -euo pipefail
cd "$(dirname "$0")/.."

compiler=${CLANG:-clang++}
if ! command -v "$compiler" >/dev/null; then
  echo "skipped: no $compiler"
  exit 0
fi
includes=$(python -c 'import pybind11, sysconfig; print("-I" + pybind11.get_include(), "-I" + sysconfig.get_path("include"))')
for source in csrc/bindings/core.cpp csrc/bindings/shared_memory.cpp; do
  echo "$source"
  # shellcheck disable=SC2086
  "$compiler" -std=c++17 -fsyntax-only -Wall -Wextra -Werror '-DFASTAGG_VERSION="0"' -Icsrc $includes "$source"
done
cmake -S tests/native -B build/lint/clang -DCMAKE_CXX_COMPILER="$compiler" >/dev/null
cmake --build build/lint/clang --parallel 2 --target conformance
build/lint/clang/conformance
