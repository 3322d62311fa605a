#!/usr/bin/env bash
# Turns a bare Debian machine into the lab: packages, headers, Python. What is there is left alone.
# A machine that cannot run BPF still gets what draws reports from recorded runs.

. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# Made by the user, so that what root adds to it can be removed by the user.
mkdir -p "$LAB_STATE"

for step in system-packages headers python; do
    status=0
    "$LAB_ROOT/provision/$step.sh" || status=$?
    if ((status != 0 && status != RECORDED_ONLY)); then
        exit "$status"
    fi
done

# Debian's redis-tools holds the server as well, under the name of its checker; the separate package
# would start a service.
if ! command -v redis-server >/dev/null && checker=$(command -v redis-check-rdb); then
    mkdir -p "$LAB_STATE/bin"
    ln -sfn "$checker" "$LAB_STATE/bin/redis-server"
fi
