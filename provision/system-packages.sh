#!/usr/bin/env bash
# Installs the Debian packages that the lab lacks. Does nothing, fast, when all are there.
# With --list it only prints their names (headers depend on the kernel, and are not among them).
# LAB_MAY_CHANGE_KERNEL=1, for a throw-away VM: where Debian's archive no longer has headers for the
# running Debian kernel, its present kernel is installed too, with headers, and a reboot is asked for.
# Exit status: 0 all there; 3 this machine cannot have them, so recorded runs only; else a failure.

. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

packages=(
    python3-bpfcc # compiles and loads the programs in bpf/
    bpftool       # the second opinion in notebooks and tests
    libbpf1 libbpf-dev # what bcc's Python lacks; the C consumer of the benchmark
    clang-14 gcc make  # compilers of that consumer, and of make itself
    python3-venv       # the Python environment
    iproute2           # veth pairs and network namespaces
    redis-tools        # a real Redis: its redis-check-rdb is the server too, and no service comes along
    linux-perf         # the second reader of printed lines
    openssl            # the throw-away certificate of the status server
    git                # the code's version, in every run's provenance
    util-linux mount   # unshare and mount, for enter.sh
)

if [[ ${1:-} == --list ]]; then
    printf '%s\n' "${packages[@]}"
    exit 0
fi
if [[ $(uname -s) != Linux ]]; then
    say "This is $(uname -s), and BPF needs Linux: recorded runs only (the Vagrantfile gives a Linux)."
    exit "$RECORDED_ONLY"
fi
if ! command -v dpkg-query >/dev/null; then
    say "This Linux is not a Debian: install bcc's Python package, bpftool, libbpf and clang yourself," \
        "or use the Vagrantfile; until then recorded runs only."
    exit "$RECORDED_ONLY"
fi

mapfile -t missing < <(missing_of "${packages[@]}")

# Headers: bcc needs some. The running kernel's are best; any other version's do for maps, helpers
# and tracepoint arguments (headers.sh).
find=--find
if [[ ${LAB_MAY_CHANGE_KERNEL:-} == 1 && -z $(missing_of "linux-image-$(uname -r)") ]]; then
    find=--own
fi
need_headers=yes
if "$LAB_ROOT/provision/headers.sh" "$find" >/dev/null; then
    need_headers=no
fi

if ((${#missing[@]} == 0)) && [[ $need_headers == no ]]; then
    say "Debian packages: all there"
    exit 0
fi

wanted=${missing[*]}
if [[ $need_headers == yes ]]; then wanted="${wanted:+$wanted }and kernel headers"; fi
if ! can_be_root; then
    say "Debian packages are missing ($wanted), with neither root nor sudo to install them: what needs" \
        "them falls back on recorded runs."
    exit "$RECORDED_ONLY"
fi

install_packages() {
    local headers
    apt_update
    if [[ $need_headers == yes ]]; then
        headers=linux-headers-$(uname -r)
        if ! apt-cache show "$headers" >/dev/null 2>&1; then
            headers=linux-headers-$(dpkg --print-architecture)
            [[ $find == --own ]] && missing+=("${headers/headers/image}")
        fi
        missing+=("$headers")
    fi
    apt_install "${missing[@]}"
}

say "Debian packages to install: $wanted"
with_progress "$LAB_STATE/apt.log" "Installing Debian packages" install_packages
if [[ $find == --own ]] && ! "$LAB_ROOT/provision/headers.sh" --own; then
    say "Debian has no headers for the running kernel $(uname -r) any more. A newer kernel is installed," \
        "with its headers: reboot into it (vagrant reload)."
fi
