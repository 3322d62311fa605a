#!/usr/bin/env bash
# vm-packages.sh [PACKAGE...]: installs what a machine needs to build the lab's VM image and to boot
# it, and the PACKAGEs (Vagrant, for its tests): no part of the usual set-up, since the lab itself
# needs no VM.

. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

command -v apt-get >/dev/null ||
    die "The VM image is built with Debian's tools (mmdebstrap, apt), which this machine has not."
mapfile -t missing < <(missing_of mmdebstrap eatmydata debian-archive-keyring e2fsprogs \
    qemu-system-x86 openssh-client rsync "$@")
((${#missing[@]} > 0)) || exit 0
can_be_root || die "To build and boot a VM ${missing[*]} must be installed: run as root, or with sudo."

install_packages() {
    apt_update
    apt_install "${missing[@]}"
}
with_progress "$LAB_STATE/vm-apt.log" "Installing ${missing[*]}" install_packages
