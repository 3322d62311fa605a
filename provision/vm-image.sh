#!/usr/bin/env bash
# Builds the VM image: Debian 12 with its stock kernel, set up by the scripts beside this one. Prints
# the image's folder. An image of the same scripts and pins is kept, and a build that is cut off
# leaves none: a folder has its name only when all is in it.
#
#   LAB_VM_CACHE  folder of images (default: .lab/vm/images); several checkouts may share one
#
# Packages and wheels are fetched by this machine's own apt and pip, as they are configured; none of
# that configuration gets into the image but apt's list of sources.

. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# What tools say is read below.
export LC_ALL=C.UTF-8

cache=${LAB_VM_CACHE:-$LAB_STATE/vm/images}
suite=bookworm
size=8G
need_mb=5000

# What the build reads of the checkout, and nothing else: so these files are the image's name.
sources=(
    provision/common.sh provision/setup.sh provision/system-packages.sh provision/headers.sh
    provision/python.sh provision/link-bcc.sh provision/enter.sh provision/vm-image.sh
    provision/vm-guest provision/vm-kernel.py
)
base_packages=(
    linux-image-amd64 linux-headers-amd64 initramfs-tools zstd
    systemd-sysv systemd-resolved udev kmod dbus openssh-server sudo rsync
    procps iproute2 iputils-ping less vim-tiny ca-certificates
)

pins() { grep -o '"[^" ]*==[^" ]*"' "$LAB_ROOT/pyproject.toml" | tr -d '"' | grep -v '^numba='; }

image_name() {
    cd "$LAB_ROOT"
    {
        pins
        find "${sources[@]}" -type f -print0 | sort -z | xargs -0 sha256sum
    } | sha256sum | cut -c1-16
}

# The host's apt sources of that suite, so that a mirror, a proxy's address or a local archive is
# used here too; none printed means mmdebstrap's default.
apt_sources() {
    # shellcheck disable=SC2016
    apt-get indextargets --format '$(ORIGIN) $(RELEASE) deb $(REPO_URI) $(RELEASE) $(COMPONENT)' \
        'Created-By: Packages' 2>/dev/null |
        awk -v suite="$suite" '$1 == "Debian" && index($2, suite) == 1 { $1 = $2 = ""; print substr($0, 3) }' |
        sort -u
}

fetch_wheels() {
    local wheels=$1
    # For the image's Python and C library, whatever this machine's are.
    pins | "$LAB_ROOT/.venv/bin/python" -m pip download --disable-pip-version-check --no-input \
        --dest "$wheels.new" --only-binary=:all: --python-version 3.11 \
        --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
        --requirement /dev/stdin 'setuptools>=66' &&
        mv -T "$wheels.new" "$wheels"
}

# Runs as root. In $work: root/ while it is being made, then the files of the image.
build() {
    local work=$1 wheels=$2
    local root=$work/root sources_list=$work/apt.list packages option
    apt_sources >"$sources_list"
    packages=$(IFS=,; echo "${base_packages[*]},$("$LAB_ROOT/provision/system-packages.sh" --list | paste -sd,)")
    local aptopts=()
    while read -r option; do aptopts+=("--aptopt=$option"); done < <(
        apt-config dump 2>/dev/null | grep -E '^Acquire::(https?::Proxy|Check-Valid-Until|Check-Date) ' || true)
    local mirror=()
    [[ -s $sources_list ]] && mirror=("$sources_list")
    # shellcheck disable=SC2016
    mmdebstrap --variant=minbase --mode=root --format=directory --quiet \
        --hook-dir=/usr/share/mmdebstrap/hooks/eatmydata \
        --include="$packages" "${aptopts[@]}" \
        --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
        --essential-hook='mkdir -p "$1/etc/initramfs-tools/conf.d"
            echo "MODULES=list" >"$1/etc/initramfs-tools/conf.d/lab"
            printf "%s\n" virtio_pci virtio_blk ext4 >"$1/etc/initramfs-tools/modules"' \
        --customize-hook="'$LAB_ROOT/provision/vm-image.sh' --customize \"\$1\" '$wheels'" \
        "$suite" "$root" "${mirror[@]}"
    finish "$work" "$root"
}

# In the new root, before it becomes a disk: the checkout's scripts set up the lab in it.
customize() {
    local root=$1 wheels=$2 name
    mkdir -p "$root/vagrant/labkit" "$root/wheels"
    cd "$LAB_ROOT"
    cp -r --parents "${sources[@]}" pyproject.toml README.md labkit/__init__.py experiments/__init__.py "$root/vagrant/"
    cp "$wheels"/* "$root/wheels/"
    chroot "$root" env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 \
        PIP_NO_INDEX=1 PIP_FIND_LINKS=/wheels PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore \
        /vagrant/provision/setup.sh
    rm -rf "$root/wheels"
    # Go's own library as experiment 20 builds it (go_map.py), which takes an emulated CPU longer than
    # all else that the experiment does.
    local build
    for build in "CGO_ENABLED=0 .venv/bin/go build fmt" \
        "CGO_ENABLED=1 .venv/bin/go build -race fmt runtime/race runtime/cgo"; do
        chroot "$root" env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root \
            sh -c "cd /vagrant && GOCACHE=/vagrant/.lab/go-cache GO111MODULE=off $build"
    done

    echo lab >"$root/etc/hostname"
    echo '127.0.1.1 lab' >>"$root/etc/hosts"
    echo 'LANG=C.UTF-8' >"$root/etc/default/locale"
    echo '/dev/vda / ext4 defaults,noatime 0 1' >"$root/etc/fstab"
    ln -sf ../run/systemd/resolve/stub-resolv.conf "$root/etc/resolv.conf"
    install -m 644 provision/vm-guest/lab.network "$root/etc/systemd/network/50-lab.network"
    install -m 755 provision/vm-guest/lab-share.sh "$root/usr/local/sbin/lab-share"
    install -m 644 provision/vm-guest/lab-share.service "$root/etc/systemd/system/lab-share.service"
    chroot "$root" systemctl --quiet enable systemd-networkd systemd-resolved ssh lab-share
    # Nobody can log in as this user until vagrant-test.sh writes a key.
    chroot "$root" useradd --create-home --shell /bin/bash vagrant
    echo 'vagrant ALL=(ALL) NOPASSWD: ALL' >"$root/etc/sudoers.d/vagrant"
    # A throw-away VM: what looks after a server for years only takes time at its start.
    for name in apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer \
        e2scrub_reap.service fstrim.timer systemd-pstore.service; do
        chroot "$root" systemctl --quiet mask "$name"
    done
}

finish() {
    local work=$1 root=$2
    cp "$root"/boot/initrd.img-* "$work/initrd"
    # Unpacked once here, and not by the emulated CPU at each boot.
    "$LAB_ROOT/.venv/bin/python" "$LAB_ROOT/provision/vm-kernel.py" "$root"/boot/vmlinuz-* "$work/vmlinux"
    cut -d' ' -f1,2 "$root/etc/ssh/ssh_host_ed25519_key.pub" >"$work/host_key"
    truncate -s "$size" "$work/disk.raw"
    mke2fs -q -t ext4 -L lab -m 0 -E lazy_itable_init=1 -d "$root" "$work/disk.raw"
    rm -rf "$root" "$work/apt.list"
    sync -f "$work"
}

# give_up LOG FOLDER: leaves nothing of what was being made in FOLDER.
give_up() {
    as_root rm -rf "$2"
    grep -qE 'No space left on device|enough free space' "$1" || exit 1
    die "The disk became full while the VM image was built in $cache: free some space, or name another" \
        "folder in LAB_VM_CACHE."
}

# watched PID COMMAND...: runs COMMAND in a process namespace, which the kernel ends with all that is
# in it, mounts too, once PID has ended: a build that nobody waits for must not go on.
watched() {
    local owner=$1 status=0
    shift
    unshare --mount --pid --fork --kill-child "$@" &
    local work=$!
    tail --pid="$owner" --follow /dev/null &
    local watch=$!
    wait -n "$work" "$watch" || status=$?
    kill -KILL "$work" "$watch" 2>/dev/null || true
    return "$status"
}

case ${1:-} in
    --name) image_name; exit ;;
    --watched) watched "$2" "$0" --build "$3" "$4"; exit ;;
    --build) build "$2" "$3"; exit ;;
    --customize) customize "$2" "$3"; exit ;;
    "") ;;
    *) die "vm-image.sh knows --name or no argument, not '$1'." ;;
esac

name=$(image_name)
image=$cache/$name
mkdir -p "$cache"
cache=$(cd "$cache" && pwd -P)
image=$cache/$name
if [[ ! -d $image ]]; then
    # Two builds of one image at once: the second waits, then finds it.
    exec 8<"$cache"
    if ! flock --nonblock 8; then
        say "Another build of a VM image is going on in $cache: waiting for it."
        flock 8
    fi
fi
if [[ ! -d $image ]]; then
    [[ $(uname -m) == x86_64 ]] || die "The VM image is for x86-64 machines; this is $(uname -m)."
    can_be_root || die "Building the VM image needs root: run as root, or with sudo."
    free_mb=$(df --output=avail -m "$cache" | tail -n 1)
    ((free_mb >= need_mb)) ||
        die "Building the VM image needs $need_mb MB of disk, and $cache has ${free_mb} MB: free some" \
            "space, or name another folder in LAB_VM_CACHE."
    # What builds that were cut off have left.
    as_root rm -rf "$cache"/*.part
    wheels=$cache/wheels-$(pins | sha256sum | cut -c1-16)
    if [[ ! -d $wheels ]]; then
        rm -rf "$wheels.new"
        with_progress "$LAB_STATE/vm-wheels.log" "Fetching the Python packages of the VM image" \
            fetch_wheels "$wheels" || give_up "$LAB_STATE/vm-wheels.log" "$wheels.new"
    fi
    part=$image.part
    mkdir -p "$part"
    with_progress "$LAB_STATE/vm-image.log" "Building the VM image (about two minutes)" \
        as_root "$LAB_ROOT/provision/vm-image.sh" --watched $$ "$part" "$wheels" ||
        give_up "$LAB_STATE/vm-image.log" "$part"
    as_root chown -R "$(id -u):$(id -g)" "$part"
    mv -T "$part" "$image"
fi
printf '%s\n' "$image"
