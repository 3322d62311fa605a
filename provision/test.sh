#!/usr/bin/env bash
# test.sh [PYTEST ARGUMENTS]: every test. Those that need no kernel run two at a time; then the
# kernel's, one at a time, as they count how writers and readers meet on two CPUs.

. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

cd "$LAB_ROOT"
readonly INTERRUPTED=2 NO_TESTS=5

# Sets `status` to pytest's.
run_part() {
    status=0
    provision/enter.sh .venv/bin/python -m pytest "$@" || status=$?
    if ((status == INTERRUPTED)); then exit "$status"; fi
}

# The tests of a file stay together, as they may share a report or a VM's folder. The files stay in
# their order, as the first one takes longest.
run_part -m "not kernel" --numprocesses 2 --dist loadfile --no-loadscope-reorder "$@"
first=$status
run_part -m kernel "$@"
# Arguments may name tests of one part alone.
if ((first == NO_TESTS)); then exit "$status"; fi
if ((first != 0 || status == NO_TESTS)); then exit "$first"; fi
exit "$status"
