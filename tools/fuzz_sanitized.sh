#!/usr/bin/env bash
# Random calls from Python, mostly wrong ones, with _core under AddressSanitizer and UBSan. SEED=7 repeats a run.
set -euo pipefail
cd "$(dirname "$0")/.."

folder=build/sanitize/address/native # what make sanitize has compiled is not compiled again
cmake -S tests/native -B "$folder" -DFASTAGG_SANITIZE=address,undefined -DFASTAGG_SANITIZED_MODULE=ON \
  -DFASTAGG_VERSION="$(python -c 'from importlib.metadata import version; print(version("fastagg"))')" \
  -DPython_EXECUTABLE="$(command -v python)" -Dpybind11_DIR="$(python -m pybind11 --cmakedir)" >/dev/null
cmake --build "$folder" --parallel 2 --target _core
site=$folder/site
rm -rf "$site" && mkdir "$site" && cp -r python/fastagg "$site/"
rm -f "$site"/fastagg/_c*.so
cp "$folder"/_core*.so "$site/fastagg/"

# The interpreter knows no sanitizer: its libraries come first, and its own leaks and large requests are no faults.
preloaded=
for library in asan ubsan stdc++; do
  preloaded+="$("${CXX:-g++}" -print-file-name=lib$library.so) "
done
ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 LD_PRELOAD=$preloaded \
  PYTHONPATH=$site:tests python tests/fuzz_arguments.py --seconds 20 ${SEED:+--seed "$SEED"}
