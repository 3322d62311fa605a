#!/usr/bin/env bash
# vagrant up from nothing, with libvirt and a box made of the lab's own image, to a notebook's finding
# fetched through the forwarded port; then vagrant destroy, and a look for what is left. For a person
# to run, as root: some ten minutes with an emulated CPU.

. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

cd "$LAB_ROOT"
((EUID == 0)) || die "This test starts libvirt's daemons: run it as root."
provision/vm-packages.sh vagrant vagrant-libvirt libvirt-daemon-system libvirt-clients dnsmasq-base \
    iptables qemu-utils
image=$(provision/vm-image.sh)
LAB_VM_ACCEL=$(.venv/bin/python -m provision.vm accelerator)
LAB_PORT=$(.venv/bin/python -c 'from provision import vm; print(vm.free_port())')
work=$(mktemp -d "$LAB_STATE/vagrant.XXXXXX")
# Its own boxes and state: nobody's other machines are touched.
export LAB_VM_ACCEL LAB_PORT LAB_VM_BOX=map-freshness-lab-test
export VAGRANT_HOME=$work/home VAGRANT_DOTFILE_PATH=$work/state
export VAGRANT_DEFAULT_PROVIDER=libvirt VAGRANT_CHECKPOINT_DISABLE=1
step() { say "$1 ($((SECONDS)) s)"; }

# Rules and chains of libvirt's in the firewall: each line is the command that makes it.
firewall() {
    local tool
    for tool in iptables ip6tables; do
        "$tool-save" 2>/dev/null | awk -v tool="$tool" '
            /^\*/ { table = substr($1, 2) }
            /^:LIBVIRT_/ { print tool, "-t", table, "-N", substr($1, 2) }
            /^-A .*LIBVIRT_/ { print tool, "-t", table, $0 }'
    done
}

# What a VM of libvirt can leave behind, one a line: in libvirt, ...
libvirt_traces() {
    {
        virsh -q list --all --name | sed 's/^/domain /'
        virsh -q net-list --all --name | sed 's/^/network /'
        virsh -q pool-list --all --name | while read -r pool; do
            [[ -n $pool ]] || continue
            echo "pool $pool"
            virsh -q vol-list "$pool" | awk -v pool="$pool" '{ print "volume", pool, $1 }'
        done
    } | sed '/ $/d' | sort
}

# ... and in this machine; in its firewall no more than the daemons that are started here.
machine_traces() {
    {
        if [[ $start == yes ]]; then
            firewall
            echo "forwarding $(</proc/sys/net/ipv4/ip_forward)"
            pgrep -ax libvirtd || pgrep -ax virtlogd || true
        fi
        ip -o link | awk -F': ' '{ print "interface", $2 }' | grep -E 'virbr|vnet' || true
        pgrep -af 'qemu-system|dnsmasq' | grep -E "$LAB_VM_BOX|vagrant-libvirt" || true
    } | sort
}

start_daemons() {
    # libvirt runs QEMU as a user of its own; where /dev/kvm is root's alone it then looks at QEMU
    # anew with each call, 50 s each when emulated. Settings for these daemons alone: the mount is
    # seen by nobody else.
    printf 'user = "root"\ngroup = "root"\nsecurity_driver = "none"\n' >"$work/qemu.conf"
    unshare --mount sh -c "
        mount --bind '$work/qemu.conf' /etc/libvirt/qemu.conf
        virtlogd -d -p '$work/virtlogd.pid'
        libvirtd -d -p '$work/libvirtd.pid'"
    local tries
    for tries in $(seq 100); do
        virsh -q list >/dev/null 2>&1 && return
        sleep 0.2
    done
    die "libvirtd does not answer after $((tries / 5)) s."
}

# libvirtd leaves its rules, and forwarding switched on, when it ends.
end_daemons() {
    local file pid line
    for file in "$work/libvirtd.pid" "$work/virtlogd.pid"; do
        [[ -s $file ]] || continue
        pid=$(<"$file")
        kill "$pid" 2>/dev/null || true
        timeout 20 tail --pid="$pid" --follow /dev/null || say "Process $pid does not end."
    done
    # Rules before chains, which must be empty. None has a word with a blank in it.
    firewall | sort | comm -13 "$work/machine" - | sort --key=4,4 >"$work/rules"
    while read -r line; do
        line=${line/ -A / -D }
        # shellcheck disable=SC2086
        ${line/ -N / -X }
    done <"$work/rules"
    sed -n 's/^forwarding //p' "$work/machine" >/proc/sys/net/ipv4/ip_forward
}

remove_everything() {
    local status=$? volume
    trap - EXIT
    timeout 300 vagrant destroy --force >>"$work/log" 2>&1 || true
    # The box, as a volume, outlives the machine by design; the pool and the network are libvirt's.
    while read -r volume; do
        virsh -q vol-delete --pool default "$volume" >/dev/null || true
    done < <(virsh -q vol-list default 2>/dev/null | awk -v box="$LAB_VM_BOX" 'index($1, box) { print $1 }')
    if virsh -q net-info vagrant-libvirt >/dev/null 2>&1 && ! grep -qx 'network vagrant-libvirt' "$work/libvirt"; then
        virsh -q net-destroy vagrant-libvirt >/dev/null 2>&1 || true
        virsh -q net-undefine vagrant-libvirt >/dev/null 2>&1 || true
    fi
    if virsh -q pool-info default >/dev/null 2>&1 && ! grep -qx 'pool default' "$work/libvirt"; then
        virsh -q pool-destroy default >/dev/null 2>&1 || true
        virsh -q pool-undefine default >/dev/null 2>&1 || true
    fi
    { diff "$work/libvirt" <(libvirt_traces) || true; } >"$work/left"
    if [[ $start == yes ]]; then end_daemons; fi
    { diff "$work/machine" <(machine_traces) || true; } >>"$work/left"
    if [[ -s $work/left ]]; then
        say "Left behind:"
        cat "$work/left" >&2
        status=1
    fi
    if ((status == 0)); then
        rm -rf "$work"
        step "passed, and nothing is left"
    else
        say "The log is in $work/log"
    fi
    exit "$status"
}

make_box() {
    local key=$work/key home=/home/vagrant/.ssh
    ssh-keygen -q -t ed25519 -N '' -C lab -f "$key"
    cp --sparse=always "$image/disk.raw" "$work/disk.raw"
    # A key made for this test lets Vagrant in, not the one that everybody knows.
    debugfs -w -f - "$work/disk.raw" >/dev/null 2>&1 <<EOT
mkdir $home
sif $home uid 1000
sif $home gid 1000
sif $home mode 040700
write $key.pub $home/authorized_keys
sif $home/authorized_keys uid 1000
sif $home/authorized_keys gid 1000
sif $home/authorized_keys mode 0100600
EOT
    qemu-img convert -O qcow2 "$work/disk.raw" "$work/box.img"
    rm "$work/disk.raw"
    printf '{"provider": "libvirt", "format": "qcow2", "virtual_size": 8}\n' >"$work/metadata.json"
    # The image has no boot loader: libvirt starts the kernel, as make vm-boot does.
    cat >"$work/Vagrantfile" <<EOT
Vagrant.configure("2") do |config|
  config.ssh.private_key_path = "$key"
  config.ssh.insert_key = false
  config.vm.provider "libvirt" do |libvirt|
    libvirt.machine_type = "pc"
    libvirt.disk_bus = "virtio"
    libvirt.kernel = "$image/vmlinux"
    libvirt.initrd = "$image/initrd"
    libvirt.cmd_line = "root=/dev/vda rw console=ttyS0 quiet net.ifnames=0 nokaslr mitigations=off"
  end
end
EOT
    tar -C "$work" -cf "$work/lab.box" metadata.json Vagrantfile box.img
    rm "$work/box.img"
}

start=yes
if virsh -q list >/dev/null 2>&1; then start=no; fi
machine_traces >"$work/machine"
: >"$work/libvirt"
trap remove_everything EXIT
trap 'exit 130' INT TERM
if [[ $start == yes ]]; then start_daemons; fi
libvirt_traces >"$work/libvirt"
make_box
vagrant box add --name "$LAB_VM_BOX" "$work/lab.box" >"$work/log" 2>&1 || die "The box cannot be added: see $work/log"
rm "$work/lab.box"
step "the box is added; vagrant up"
if ! timeout 1200 vagrant up --no-tty --provider=libvirt 2>&1 | tee -a "$work/log" >&2; then
    die "vagrant up failed."
fi
step "vagrant up is done"
url=$(grep -o 'http://127\.0\.0\.1:[0-9]*/lab?token=[0-9a-f]*' "$work/log" | tail -n 1)
[[ -n $url ]] || die "vagrant up printed no address."
ss -Hltn "sport = :$LAB_PORT" | awk '{ print $4 }' | grep -qvE '^127\.0\.0\.1:' &&
    die "Port $LAB_PORT is open beyond this machine."
timeout 1200 .venv/bin/python provision/vagrant-check.py "$url"
step "a notebook's finding came through the forwarded port"
timeout 300 vagrant destroy --force >>"$work/log" 2>&1
step "vagrant destroy is done"
