#!/bin/sh
# Makes the virtual environment $1 and installs headkv into it, in place, with everything that its book and tests need.
# Called by the Makefile when pyproject.toml or constraints.txt changed. PYTHON chooses the interpreter.
set -eu
cd "$(dirname "$0")/.."
venv=${1:?usage: tools/setup.sh VENV}
gigabytes=8 # torch with its CUDA libraries takes 6 of them

stop() {
    printf '\nheadkv: %s\n\n' "$*" >&2
    exit 1
}

recent_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; }

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        command -v "$PYTHON" >/dev/null 2>&1 || stop "PYTHON=$PYTHON is not there; name a Python 3.10 or later."
        recent_enough "$PYTHON" || stop "PYTHON=$PYTHON is $("$PYTHON" --version 2>&1); headkv needs Python 3.10 or later."
        echo "$PYTHON"
        return
    fi
    for candidate in python3 python python3.13 python3.12 python3.11 python3.10; do
        if recent_enough "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    stop "no Python 3.10 or later was found; install one, or name it: make PYTHON=/path/to/python3.12"
}

check_rust() {
    PATH=$PATH:$HOME/.cargo/bin
    cargo --version >/dev/null 2>&1 ||
        stop "no Rust toolchain was found (cargo); install one with rustup (https://rustup.rs) and run make again."
    needed=$(sed -n 's/^rust-version = "\([0-9.]*\)".*/\1/p' Cargo.toml)
    found=$(rustc --version 2>/dev/null | cut -d ' ' -f 2)
    [ "$(printf '%s\n' "$needed" "$found" | sort -V | head -n 1)" = "$needed" ] ||
        stop "Rust $found is too old, headkv needs $needed or later; with rustup: rustup update stable"
    command -v cc >/dev/null 2>&1 || stop "no C linker was found (cc), which Rust needs; on Debian: apt-get install gcc libc6-dev"
}

check_disk() {
    [ -x "$venv/bin/python" ] && return
    free=$(df -Pk . | awk 'NR == 2 { print int($4 / 1048576) }')
    [ "$free" -ge "$gigabytes" ] || stop "only ${free} GB are free here, and torch needs about ${gigabytes}; make room and run make again."
}

make_venv() {
    if ! recent_enough "$venv/bin/python"; then
        "$python" -c 'import venv, ensurepip' 2>/dev/null ||
            stop "$python has no venv module; on Debian: apt-get install python3-venv"
        echo "headkv: making $venv with $("$python" --version)"
        "$python" -m venv --clear "$venv" || stop "the virtual environment $venv could not be made with $python (see above)."
    fi
    PATH=$(cd "$venv/bin" && pwd):$PATH
    VIRTUAL_ENV=$(cd "$venv" && pwd)
    export PATH VIRTUAL_ENV
}

# uv installs the same packages in a tenth of pip's time; where it can not be had, pip does.
install() {
    if [ "${installer:-}" != pip ]; then
        uv pip install --quiet -c constraints.txt "$@"
    else
        python -m pip install --quiet -c constraints.txt "$@"
    fi
}

python=$(find_python)
check_rust
check_disk
make_venv
echo "headkv: installing into $venv (a few minutes the first time)"
build="maturin hatchling setuptools wheel" # what builds headkv and headkv-kernels, and the sources that lm-eval needs
if ! { python -m pip install --quiet uv && uv pip install --quiet -c constraints.txt $build; }; then
    echo "headkv: going on with pip alone"
    installer=pip
    { python -m pip install --quiet --upgrade "pip>=25.1" && install $build; } || # the first pip that knows --group
        stop "packages could not be installed; is there a network, or a package mirror set for pip?"
fi
install --no-build-isolation -e ./kernels -e '.[widgets,plots]' --group dev || stop "the installation failed; the lines above say why."
