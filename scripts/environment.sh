# Sourced by the other scripts: `environment [EXTRAS]` makes .venv at the top of the repository if it is missing, installs
# the package in it (with extras: dev,tasks), and activates it. Does nothing twice; PYTHON chooses the interpreter
# (default python3).

environment() {
    local top stamp python=${PYTHON:-python3} extra=${1:-}
    top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    if [ ! -x "$top/.venv/bin/python" ]; then
        if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
            echo "error: $python is $("$python" --version 2>&1), Python 3.11 or newer is needed: set PYTHON=/path/to/python3.11" >&2
            return 2
        fi
        echo "Making $top/.venv ..."
        "$python" -m venv "$top/.venv" || return
    fi
    . "$top/.venv/bin/activate"
    # Installed once for each state of setup.py.
    stamp="$top/.venv/installed-${extra:-core}-$(cksum < "$top/setup.py" | cut -d ' ' -f 1)"
    if [ ! -e "$stamp" ]; then
        echo "Installing t5x_like${extra:+ with the extra '$extra'} (a minute or two) ..."
        python -m pip install --quiet --disable-pip-version-check --editable "$top${extra:+[$extra]}" || return
        touch "$stamp"
    fi
}
