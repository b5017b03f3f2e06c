#!/usr/bin/env bash
# Rewrites requirements/*.txt from pyproject.toml: exact versions for every Python from 3.10 on, a package's the same in
# all files, so that the targets of the Makefile share one environment. Needs uv on the PATH.
set -euo pipefail
cd "$(dirname "$0")/.."

torch=2.13.0
headers= # set while a file is written that has the group cuda-headers
pins=$(mktemp)
trap 'rm -f "$pins"' EXIT

compile() {
  # torch's CUDA packages are left to torch, for its CPU build has none; what we ask for ourselves stays.
  uv pip compile --quiet --universal --python-version 3.10 --no-header --no-annotate --no-emit-package fastagg "$@" |
    awk -v headers="$headers" '!/^(nvidia-|cuda-|triton)/ || /^nvidia-cuda-(cuobjdump|nvdisasm)=/ ||
      (headers && /^nvidia-cuda-(cccl|crt|runtime)=/)'
}

write() { # FILE ARGUMENTS…: one locked file, with the versions of $pins
  local file=requirements/$1.txt
  shift
  { echo "# Written by tools/lock.sh from pyproject.toml."; compile --constraints "$pins" "$@"; } >"$file.new"
  mv "$file.new" "$file"
}

echo "torch==$torch" >"$pins"
headers=1 compile --constraints "$pins" pyproject.toml --all-extras --group lint --group cuda-headers >"$pins.all"
mv "$pins.all" "$pins"

write build --group build
write lint --group lint pyproject.toml --extra test
write demo --group build pyproject.toml --extra demo
headers=1 write test --group build --group cuda-headers pyproject.toml --extra test
write bench --group build pyproject.toml --extra bench --extra flower --extra nvflare

# The oldest Flower needs older versions than the rest has: those stand before the rest, see the Makefile.
sed -n 's/^flower = \["flwr>=\([0-9.]*\)".*/flwr==\1.0/p' pyproject.toml >"$pins"
{ echo "# Written by tools/lock.sh: the oldest Flower that fastagg supports."; compile "$pins"; } \
  >requirements/flower-oldest.txt
