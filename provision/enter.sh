#!/usr/bin/env bash
# enter.sh COMMAND...: runs COMMAND where BPF works, as root if that can be had, and leaves nothing.
#
# tracefs, debugfs and bpffs are mounted in a private mount namespace: the kernel takes the mounts
# away with the last process in it, also after kill -9. Without root COMMAND simply runs.

. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

(($# > 0)) || die "Use: provision/enter.sh COMMAND..."

inside() {
    local target type
    while read -r target type; do
        # A kernel without the file system has no such folder, or refuses: the doctor tells.
        if [[ -d $target ]] && ! mountpoint -q "$target"; then
            mount -t "$type" "$type" "$target" 2>/dev/null || true
        fi
    done <<'MOUNTS'
/sys/kernel/debug debugfs
/sys/kernel/tracing tracefs
/sys/fs/bpf bpf
MOUNTS
    exec "$@"
}

if [[ $1 == --inside ]]; then
    shift
    inside "$@"
fi

[[ -d $LAB_ROOT/.venv/bin ]] && PATH=$LAB_ROOT/.venv/bin:$PATH
# Debian keeps what the lab calls here, and an ordinary user's PATH does not.
PATH=$PATH:/usr/sbin:/sbin:$LAB_STATE/bin
export PATH
# A report and the tests start hundreds of processes; each would compile the lab's modules anew.
unset PYTHONDONTWRITEBYTECODE
if [[ -z ${BCC_KERNEL_SOURCE:-} ]]; then
    BCC_KERNEL_SOURCE=$("$LAB_ROOT/provision/headers.sh" --path)
    if [[ -n $BCC_KERNEL_SOURCE ]]; then export BCC_KERNEL_SOURCE; else unset BCC_KERNEL_SOURCE; fi
fi

if [[ $(uname -s) != Linux ]] || ! can_be_root; then
    exec "$@"
fi

here=$LAB_ROOT/provision/enter.sh
if ((EUID == 0)); then
    # A machine that forbids a new namespace (some containers) still runs what it can.
    if ! unshare --mount --propagation slave true 2>/dev/null; then
        exec "$@"
    fi
    exec unshare --mount --propagation slave "$here" --inside "$@"
fi

# By sudo: what root wrote into the checkout goes back to the user, whatever COMMAND's end.
trap : INT TERM
status=0
sudo --preserve-env env "PATH=$PATH" "$here" "$@" || status=$?
sudo find "$LAB_ROOT" -xdev -user root -exec chown -h "$(id -u):$(id -g)" {} +
exit "$status"
