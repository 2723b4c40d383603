#!/usr/bin/env bash
# ./run.sh                        set up, then the main job: extract, train, evaluate (on videos that it draws itself)
# ./run.sh test [pytest options]  set up, then every check and test
# PRESET=lvu-relationship ./run.sh     the paper's run, where its weights and data are
# SET="--set a.b=c --set d.e=f" OUT=runs/mine ./run.sh     other settings, in a run folder of their own
# VENV=DIR ./run.sh               with the virtual environment there (default .venv)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
ROOT=$PWD
VENV=${VENV:-.venv}
PRESET=${PRESET:-miniature}
OUT=${OUT:-runs/$PRESET}

say() { printf '\n== %s\n' "$*" >&2; }
fail() { printf 'error: %s\n' "$*" >&2; exit 5; }

find_python() {
    local name
    for name in python3.13 python3.12 python3.11 python3 python; do
        if "$name" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
            command -v "$name"
            return
        fi
    done
    fail "needs Python 3.11, 3.12 or 3.13 with the venv module, and found none on the PATH.
Install one (for example the packages python3.12 and python3.12-venv), then run this again."
}

# What the installed packages depend on: equal stamps mean that there is nothing to install.
stamp_of() {
    "$1" -c 'import hashlib, platform; print(*(
        hashlib.sha256(open(name, "rb").read()).hexdigest() for name in ("requirements.lock", "pyproject.toml")
    ), platform.python_version())'
}

ready() {
    [ -x "$VENV/bin/python" ] && [ ! -e "$VENV/.installing" ] \
        && [ "$(cat "$VENV/.installed" 2>/dev/null)" = "$(stamp_of "$VENV/bin/python")" ]
}

install() {
    local python quiet=--quiet
    if [ -t 2 ]; then quiet=; fi
    # What an interrupted set-up left is begun anew; an environment that somebody else made is only added to.
    if [ -e "$VENV/.installing" ] && [ -e "$VENV/.made-by-run.sh" ]; then
        say "the last set-up was interrupted; beginning anew"
        rm -rf "$VENV"
    fi
    if [ ! -x "$VENV/bin/python" ]; then
        python=$(find_python)
        say "virtual environment in $VENV ($("$python" --version))"
        mkdir -p "$VENV"
        touch "$VENV/.made-by-run.sh" "$VENV/.installing"
        "$python" -m venv "$VENV"
    fi
    touch "$VENV/.installing"
    say "installing the versions of requirements.lock (6 GB and a few minutes, the first time)"
    "$VENV/bin/python" -m pip install $quiet --disable-pip-version-check -r requirements.lock
    "$VENV/bin/python" -m pip install $quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
    stamp_of "$VENV/bin/python" > "$VENV/.installed"
    rm "$VENV/.installing"
}

set_up() {
    if ready; then return; fi
    mkdir -p "$(dirname "$VENV")"
    if command -v flock >/dev/null; then # two checkouts may share one environment; the loser of the race waits
        exec 9< "$(dirname "$VENV")"
        flock 9
    fi
    if ! ready; then install; fi
    exec 9<&-
}

run_tests() {
    say "ruff";         ruff check .
                        ruff format --check .
    say "mypy";         mypy
    say "import rules"; lint-imports
    say "tests";        python -m pytest -n 2 --dist loadfile "$@"
}

# Exit code 3: some videos failed. Training decides whether it can do without them.
failures_only() {
    local code=$?
    [ "$code" -eq 3 ] || exit "$code"
}

run_job() {
    # shellcheck disable=SC2206 # SET is a list of words
    local options=(--preset "$PRESET" ${SET:-})
    local extraction=("${options[@]}") cores
    if [ "$PRESET" = miniature ]; then
        cores=$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
        say "videos"
        pipeline synth --videos 2680 --workers "$cores"
        # Its encoders are too small for more than one core. A worker takes 0.7 GB.
        if [ "$cores" -gt 1 ]; then extraction+=(--workers $((cores < 4 ? cores : 4))); fi
    fi
    say "frozen features: image tokens and diffusion targets"
    pipeline extract "${extraction[@]}" || failures_only
    if [ "$PRESET" = miniature ] && [ -z "${SET:-}" ] && [ "$OUT" = runs/miniature ]; then
        say "students, with and without the diffusion teacher, and what they have to beat"
        pipeline tour --out "$OUT"
        return
    fi
    say "student"
    pipeline train-student "${options[@]}" --out "$OUT"
    say "evaluation"
    pipeline evaluate --run "$OUT"
}

case ${1:-} in
    '' | test) ;;
    *) sed -n '2,6s/^# //p' run.sh >&2; exit 2 ;;
esac
set_up
case $VENV in /*) ;; *) VENV=$ROOT/$VENV ;; esac
export PATH="$VENV/bin:$PATH"
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}" # this checkout, whichever one the environment was set up from
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}" # idle threads of torch sleep instead of slowing the others down

case ${1:-} in
    test) shift; run_tests "$@" ;;
    '') run_job ;;
esac
