#!/usr/bin/env bash
# Builds the native modules with warnings as errors in build/lint/native; _cuda where nvcc is on the PATH.
set -euo pipefail
cd "$(dirname "$0")/.."

# All CUDA architectures of CMakeLists.txt: each may spill registers of its own, and has machine code to check.
cmake -S . -B build/lint/native -G Ninja -DFASTAGG_WERROR=ON \
  -DFASTAGG_CUDA=AUTO -UCMAKE_CUDA_ARCHITECTURES \
  -DSKBUILD_PROJECT_VERSION=0 -DPython_EXECUTABLE="$(command -v python)" \
  -Dpybind11_DIR="$(python -m pybind11 --cmakedir)" | grep -iE 'nvcc|CUDA' || true
cmake --build build/lint/native
