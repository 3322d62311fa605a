#!/usr/bin/env bash
# Makes .venv with the exact versions of pyproject.toml, labkit itself (editable) and bcc.
# With the environment of environment.yml active in conda, .venv is a link to that instead.
# Exit status: 0 done; 3 done, but there is no bcc: recorded runs only; else a failure.

. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

venv=$LAB_ROOT/.venv
stamp=$venv/provisioned

conda_is_active() {
    [[ ${CONDA_DEFAULT_ENV:-} == map-freshness-lab && -d ${CONDA_PREFIX:-}/conda-meta ]]
}

# conda has installed the versions of environment.yml; what is left is labkit itself.
install_into_conda() {
    if conda_is_active && [[ $(readlink "$venv") != "$CONDA_PREFIX" ]]; then
        rm -rf "$venv"
        ln -s "$CONDA_PREFIX" "$venv"
    fi
    "$venv/bin/python" -m pip install --disable-pip-version-check --no-input --no-deps --editable "$LAB_ROOT"
}

# Debian's own interpreter comes first: a Python built elsewhere may lack what ctypes needs.
find_python() {
    local candidate
    for candidate in /usr/bin/python3 python3.11 python3.12 python3.13 python3; do
        if command -v "$candidate" >/dev/null &&
            "$candidate" -I -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return 0
        fi
    done
    return 1
}

# What makes an environment stale when it changes: the place, the interpreter, the pins, and the
# packages and commands of this checkout that it finds.
wanted() {
    printf '%s\n' "$LAB_ROOT"
    "$1" -I -c '
import sys, tomllib
with open(sys.argv[1], "rb") as file:
    content = tomllib.load(file)
project, packages = content["project"], content["tool"]["setuptools"]["packages"]["find"]["include"]
pins = project["dependencies"] + [p for extra in project["optional-dependencies"].values() for p in extra]
print(sys.version.split()[0], *pins, *packages, *project["scripts"], sep="\n")' "$LAB_ROOT/pyproject.toml"
}

install_environment() {
    # A changed pin is installed in place, under whoever works in the environment; one that was
    # moved, broken or left half made is made anew.
    if [[ $(head -n 1 "$stamp" 2>/dev/null) != "$LAB_ROOT" ]] || ! "$venv/bin/python" -c '' 2>/dev/null; then
        "$python" -m venv --clear "$venv"
    fi
    "$venv/bin/python" -m pip install --disable-pip-version-check --no-input \
        --editable "${LAB_ROOT}[lab,test,go]"
}

mkdir -p "$LAB_STATE"
# Two makes at once in one checkout: the second waits, then finds all done.
exec 8<"$LAB_STATE"
if command -v flock >/dev/null; then flock 8; fi

make_it=install_into_conda
if conda_is_active; then
    python=$CONDA_PREFIX/bin/python
elif [[ -L $venv ]]; then # conda's, made before
    python=$venv/bin/python
else
    python=$(find_python) || die "Python 3.11 or newer with venv is needed (Debian: python3-venv)."
    make_it=install_environment
fi
if [[ -x $venv/bin/python && $(cat "$stamp" 2>/dev/null) == "$(wanted "$python")" ]]; then
    say "Python environment: up to date"
else
    with_progress "$LAB_STATE/pip.log" "Making the Python environment (under a minute with a fast network)" \
        "$make_it"
    wanted "$python" >"$stamp.new"
    mv "$stamp.new" "$stamp"
fi

for link in "$venv"/lib/python3.*/site-packages/bcc; do
    # Importing bcc to check it takes a third of a second: once is enough.
    if [[ -L $link && -d $link ]]; then exit 0; fi
done
exec "$LAB_ROOT/provision/link-bcc.sh" "$venv/bin/python"
