#!/usr/bin/env bash
# Compiles the CPU floor for aarch64 with warnings as errors, by GCC and where it is there by Clang; without a cross compiler it installs one in CI, or skips.
set -euo pipefail
cd "$(dirname "$0")/.."

compiler=aarch64-linux-gnu-g++
if ! command -v $compiler >/dev/null && [ "${CI:-}" = true ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  apt-get install -y -qq g++-aarch64-linux-gnu >/dev/null || true
fi
if ! command -v $compiler >/dev/null; then
  echo "skipped: no $compiler"
  exit 0
fi
for source in csrc/cpu/*.cpp csrc/comm/*.cpp; do
  echo "$source"
  $compiler -std=c++17 -O1 -ffp-contract=off -fPIC -Wall -Wextra -Werror -Icsrc -c "$source" -o /dev/null
  if command -v clang++ >/dev/null; then
    clang++ --target=aarch64-linux-gnu -std=c++17 -fsyntax-only -Wall -Wextra -Werror -Icsrc "$source"
  fi
done
