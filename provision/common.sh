# Shared by the scripts beside it; sourced, never run.
# shellcheck shell=bash

set -euo pipefail

# What make starts ends with it, also where make is killed: the kernel tells each script in turn.
if [[ -n ${MAKELEVEL:-} && ${LAB_BOUND:-} != "$$" ]] && setpriv --pdeathsig TERM true 2>/dev/null; then
    export LAB_BOUND=$$
    exec setpriv --pdeathsig TERM -- "$0" "$@"
fi

# The checkout, whatever directory the caller is in.
LAB_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
# Everything that provisioning makes besides .venv: header links, logs, tool links.
# shellcheck disable=SC2034
LAB_STATE=$LAB_ROOT/.lab

# Exit status that says: no BPF on this machine, go on with recorded runs.
# shellcheck disable=SC2034
RECORDED_ONLY=3

say() { printf 'lab: %s\n' "$*" >&2; }

die() {
    say "$*"
    exit 1
}

# Runs a command as root: directly, or by sudo where that is possible.
as_root() {
    if ((EUID == 0)); then
        "$@"
    else
        sudo "$@"
    fi
}

# Whether as_root can work. Asks for a password only where somebody can type one.
can_be_root() {
    ((EUID == 0)) && return 0
    command -v sudo >/dev/null || return 1
    sudo -n true 2>/dev/null && return 0
    [[ -t 0 && -t 2 ]] || return 1
    say "Root is needed to run BPF programs; sudo may ask for your password (refuse with Ctrl-C)."
    sudo -v
}

# with_progress LOG WHAT COMMAND...: runs COMMAND with its output in LOG, shows every two seconds
# that it is alive, and shows the end of LOG if it fails.
with_progress() {
    local log=$1 what=$2 pid start=$SECONDS status=0
    shift 2
    mkdir -p "$(dirname "$log")"
    "$@" >"$log" 2>&1 </dev/null &
    pid=$!
    # Ctrl-C must not leave an installer running behind the prompt.
    trap 'kill "$pid" 2>/dev/null || true; exit 130' INT TERM
    local ticks=0
    while kill -0 "$pid" 2>/dev/null; do
        sleep 0.2
        ticks=$((ticks + 1))
        if ((ticks % 10 == 0)); then
            if [[ -t 2 ]]; then
                printf '\r\033[Klab: %s ... %d s' "$what" $((SECONDS - start)) >&2
            elif ((ticks % 50 == 0)); then
                say "$what ... $((SECONDS - start)) s"
            fi
        fi
    done
    wait "$pid" || status=$?
    trap - INT TERM
    [[ -t 2 ]] && printf '\r\033[K' >&2
    if ((status != 0)); then
        tail -n 15 "$log" >&2
        say "$what failed with status $status; the whole output is in $log"
        return "$status"
    fi
    say "$what: done in $((SECONDS - start)) s"
}

# Prints those of the Debian packages named that are not installed.
missing_of() {
    local installed
    installed=$(dpkg-query -W -f '${db:Status-Status} ${Package}\n' "$@" 2>/dev/null || true)
    local name
    for name in "$@"; do
        grep -qx "installed $name" <<<"$installed" || printf '%s\n' "$name"
    done
}

# Also for calls side by side: apt's list lock does not wait by itself, so a lock on apt's own folder
# serialises ours, and leaves no file.
apt_update() { as_root flock /var/lib/apt apt-get update -q; }
apt_install() {
    as_root env DEBIAN_FRONTEND=noninteractive \
        apt-get -o DPkg::Lock::Timeout=300 install -q -y --no-install-recommends "$@"
}
