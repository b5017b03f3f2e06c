#!/usr/bin/env bash
# Writes the stubs of the native modules that tools/lint_native.sh has built (write), or compares them (check).
set -euo pipefail
cd "$(dirname "$0")/.."

# The package as installed: the stubs are made from modules that can be imported.
stage=build/lint/stage
rm -rf "$stage"
cmake --install build/lint/native --prefix "$stage" >/dev/null
cp python/fastagg/*.py "$stage/fastagg/"

status=0
for module in _core _cuda; do
  if ! ls "$stage"/fastagg/$module.* >/dev/null 2>&1; then
    echo "$module: not in this build, its stub is not looked at"
    continue
  fi
  PYTHONPATH=$stage pybind11-stubgen --exit-code -o build/lint/stubs "fastagg.$module"
  stub=build/lint/stubs/fastagg/$module.pyi
  # The version is the build's, and not an interface.
  sed -i -E "s/^(__[a-z]+__: str) = .*/\1/" "$stub"
  ruff check --select I,F401,UP --fix --quiet "$stub" || true
  ruff format --quiet "$stub"
  case ${1:-check} in
    write) cp "$stub" "python/fastagg/$module.pyi" ;;
    check) diff -u "python/fastagg/$module.pyi" "$stub" || { echo "$module.pyi is old: make stubs"; status=1; } ;;
  esac
done
exit $status
