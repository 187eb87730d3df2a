#!/bin/sh
# Writes constraints.txt: versions that fit together, for every supported Python. With KEEP=1 those that it names stay,
# and only new packages are added; otherwise all are the newest. Tests must pass before it is committed.
set -eu
cd "$(dirname "$0")/.."
{
    echo "# The exact versions that headkv was tested with, for Python 3.10 and later. They constrain, they do not require:"
    echo "# pip install -c constraints.txt -e ./kernels -e '.[widgets,plots]' --group dev        (written by: make constraints)"
    uv pip compile pyproject.toml kernels/pyproject.toml --extra widgets --extra plots --extra kvpress --group dev \
        --universal --python-version 3.10 ${KEEP:+--constraint constraints.txt} \
        --no-annotate --no-header --no-emit-package headkv --no-emit-package headkv-kernels
} >constraints.new
mv constraints.new constraints.txt
