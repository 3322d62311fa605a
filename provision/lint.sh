#!/usr/bin/env bash
# Every check that needs no kernel and no run: the same ones that pre-commit calls. All of them run,
# so that one look shows everything there is to mend.

. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

cd "$LAB_ROOT"
PATH=$LAB_ROOT/.venv/bin:$PATH
failed=()

check() {
    local name=$1
    shift
    if "$@"; then
        say "$name: clean"
    else
        failed+=("$name")
        say "$name: FAILED"
    fi
}

check "ruff check" ruff check --quiet .
check "ruff format" ruff format --quiet --check .
check "mypy" mypy --no-error-summary
check "import rules" lint-imports --no-logo
check "workflow" check-jsonschema --quiet --builtin-schema vendor.github-workflows .github/workflows/*.yml
check "notebooks stripped" nbstripout --verify --keep-id notebooks/*.ipynb

((${#failed[@]} == 0)) || die "These checks failed: ${failed[*]}"
