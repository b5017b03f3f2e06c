#!/usr/bin/env bash
# Prints the C++ and CUDA sources, those not yet committed included.
set -euo pipefail
cd "$(dirname "$0")/.."
git ls-files --cached --others --exclude-standard 'csrc/*' 'tests/*' | grep -E '\.(h|cpp|cu|cuh)$' | while read -r file; do
  [ ! -f "$file" ] || echo "$file"
done
