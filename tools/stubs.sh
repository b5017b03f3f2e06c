#!/usr/bin/env bash
# Writes the stubs of the native modules that tools/build_strict.sh has built (write), or compares them (check, the
# default). A build without nvcc has no _cuda, so that its stub is then left alone.
set -euo pipefail
cd "$(dirname "$0")/.."

# The package as installed: the stubs are made from modules that can be imported.
stage=build/lint/stage
rm -rf "$stage"
cmake --install build/lint/native --prefix "$stage" >/dev/null
find python/fastagg -name "*.py" -printf "%P\n" | xargs -I{} install -D -m 644 python/fastagg/{} "$stage/fastagg/{}"

status=0
for module in _core _cuda; do
  if ! ls "$stage"/fastagg/$module.* >/dev/null 2>&1; then
    echo "$module: not in this build, its stub is not looked at"
    continue
  fi
  PYTHONPATH=$stage pybind11-stubgen --exit-code -o build/lint/stubs "fastagg.$module"
  stub=build/lint/stubs/fastagg/$module.pyi
  # The version is the build's, and not an interface; mypy wants to know what is in a list.
  sed -i -E -e 's/^(__[a-z]+__: str) = .*/\1/' -e 's/: list([,)])/: list[typing.Any]\1/g' \
    -e 's/: tuple([,)])/: tuple[typing.Any, ...]\1/g' -e 's/-> list:/-> list[typing.Any]:/' "$stub"
  grep -q '^import typing' "$stub" || sed -i 's/^from __future__ import annotations$/&\nimport typing/' "$stub"
  ruff check --select I,RUF022 --fix --quiet "$stub"
  ruff format --quiet "$stub"
  case ${1:-check} in
    write) cp "$stub" "python/fastagg/$module.pyi" ;;
    check) diff -u "python/fastagg/$module.pyi" "$stub" || { echo "$module.pyi is old: make stubs"; status=1; } ;;
  esac
done
exit $status
