#!/usr/bin/env bash
# Turns a bare Debian machine into the lab: packages, headers, Python. What is there is left alone.
# A machine that cannot run BPF still gets what draws reports from recorded runs.

. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

for step in system-packages headers python; do
    status=0
    "$LAB_ROOT/provision/$step.sh" || status=$?
    if ((status != 0 && status != RECORDED_ONLY)); then
        exit "$status"
    fi
done
