#!/usr/bin/env bash
# Removes what the lab left in the kernel (after a kill: processes, network namespaces, control
# groups, pins), then what it made in this checkout: .venv, .lab, runs, reports and caches. Recorded
# runs in data/ are part of the source and stay; so do Debian's packages.

. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

cd "$LAB_ROOT"

# The processes that run this checkout's Python: number and command, a line each.
alive() {
    local process program
    for process in /proc/[0-9]*; do
        IFS= read -r -d '' program 2>/dev/null <"$process/cmdline" || continue
        [[ $program == /* ]] || program=$(readlink "$process/cwd" 2>/dev/null)/$program
        if [[ $program == "$LAB_ROOT"/.venv/bin/* ]]; then
            printf '  %s %s\n' "${process#/proc/}" "$(tr '\0' ' ' 2>/dev/null <"$process/cmdline" | head -c 100)"
        fi
    done
}

if running=$(alive) && [[ -n $running ]]; then
    die "Nothing was removed: end what still runs from this folder, then run make clean again:
$running"
fi

if [[ -x .venv/bin/python ]]; then
    provision/enter.sh .venv/bin/python -m labkit clean ||
        die "Cleaning the kernel failed; nothing was removed from this folder, so it can be tried again."
else
    say "No Python environment, so nothing of this checkout can have run."
fi

removed=()
for path in .venv .lab runs reports reports.tar.gz .pytest_cache .mypy_cache .ruff_cache .hypothesis \
    .import_linter_cache ./*.egg-info; do
    if [[ -e $path ]]; then
        rm -rf "$path"
        removed+=("$path")
    fi
done
find . -name .git -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -prune -exec rm -rf {} +
say "Removed: ${removed[*]:-nothing, all was clean}"
