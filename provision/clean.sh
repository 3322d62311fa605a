#!/usr/bin/env bash
# Removes what the lab left in the kernel (after a kill: processes, network namespaces, control
# groups, pins), then what it made in this checkout: .venv, .lab, runs, reports and caches. Recorded
# runs in data/ are part of the source and stay; so do Debian's packages.

. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

cd "$LAB_ROOT"
if [[ -x .venv/bin/python ]]; then
    provision/enter.sh .venv/bin/python -m labkit clean ||
        die "Cleaning the kernel failed; nothing was removed from this folder, so it can be tried again."
else
    say "No Python environment, so nothing of this checkout can have run."
fi

removed=()
for path in .venv .lab runs reports .pytest_cache .mypy_cache .ruff_cache .hypothesis \
    .import_linter_cache ./*.egg-info; do
    if [[ -e $path ]]; then
        rm -rf "$path"
        removed+=("$path")
    fi
done
find . -name .git -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -prune -exec rm -rf {} +
say "Removed: ${removed[*]:-nothing, all was clean}"
