#!/bin/sh
# Makes a virtual environment with llmrack in it: install.sh VENV EXTRA...
# Every package is checked against its locked hash; llama-cpp-python comes from the wheelhouse, compiled once a machine.
set -eu
venv=$1
shift
here=$(cd "$(dirname "$0")" && pwd)
project=$(dirname "$here")
python=${PYTHON:-python3}

say() { echo "setup: $*" >&2; }

command -v "$python" >/dev/null || { say "missing: $python (Debian, Ubuntu: python3)"; exit 2; }
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
    say "$("$python" --version) is too old; llmrack needs Python 3.10 or newer (3.11 for make test and make lint)"
    exit 2
}
# What is needed beside Python. As root on Debian or Ubuntu it is installed, elsewhere it is named.
packages=
"$python" -c 'import ensurepip, venv' 2>/dev/null ||
    packages="python$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')-venv"
wheel=$("$python" "$project/roles/llmrack_artifacts/files/wheelhouse.py" llama --if-built 2>/dev/null || true)
if [ -z "$wheel" ]; then
    command -v cc >/dev/null && command -v c++ >/dev/null || packages="$packages build-essential"
fi
if [ -n "$packages" ]; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        say "installing system packages:$(printf ' %s' $packages)"
        apt-get update -qq
        # shellcheck disable=SC2086
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $packages >/dev/null
    else
        say "missing system packages; on Debian or Ubuntu: sudo apt-get install$(printf ' %s' $packages)"
        exit 2
    fi
fi

if [ -z "$wheel" ]; then
    say "llama.cpp is compiled once for this machine now, which takes some minutes"
    wheel=$("$python" "$project/roles/llmrack_artifacts/files/wheelhouse.py" llama)
fi
[ -x "$venv/bin/python" ] || {
    say "making the virtual environment $venv"
    "$python" -m venv "$venv"
}
say "installing the locked packages for: $*"
set -- $(printf -- "--requirement=$here/%s.txt " "$@")
"$venv/bin/python" -m pip --disable-pip-version-check install --quiet --require-hashes --no-deps "$@"
"$venv/bin/python" -m pip --disable-pip-version-check install --quiet --no-deps --force-reinstall "$wheel"
"$venv/bin/python" -m pip --disable-pip-version-check install --quiet --no-deps --editable "$project"
"$venv/bin/python" -m pip --disable-pip-version-check check >/dev/null || {
    "$venv/bin/python" -m pip check >&2
    exit 1
}
