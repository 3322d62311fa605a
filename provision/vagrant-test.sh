#!/usr/bin/env bash
# vagrant up from nothing, with libvirt and a box made of the lab's own image, to a notebook's finding
# fetched through the forwarded port; then vagrant destroy, and a look for what is left. For a person
# to run, as root: some ten minutes with an emulated CPU.

. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

cd "$LAB_ROOT"
((EUID == 0)) || die "This test starts libvirt's daemons: run it as root."
mapfile -t missing < <(missing_of vagrant vagrant-libvirt libvirt-daemon-system libvirt-clients \
    dnsmasq-base iptables rsync)
install_vagrant() {
    apt_update
    apt_install "${missing[@]}"
}
if ((${#missing[@]} > 0)); then
    with_progress "$LAB_STATE/vagrant-apt.log" "Installing ${missing[*]}" install_vagrant
fi

provision/vm-packages.sh
image=$(provision/vm-image.sh)
LAB_VM_ACCEL=$(.venv/bin/python -m labkit.vm accelerator)
LAB_PORT=$(.venv/bin/python -c 'from labkit import vm; print(vm.free_port())')
work=$(mktemp -d "$LAB_STATE/vagrant.XXXXXX")
# Its own boxes and state: nobody's other machines are touched.
export LAB_VM_ACCEL LAB_PORT LAB_VM_BOX=map-freshness-lab-test
export VAGRANT_HOME=$work/home VAGRANT_DOTFILE_PATH=$work/state
export VAGRANT_DEFAULT_PROVIDER=libvirt VAGRANT_CHECKPOINT_DISABLE=1
daemons=()

step() { say "$1 ($((SECONDS)) s)"; }

# What a VM of libvirt can leave behind, one a line.
traces() {
    {
        virsh -q list --all --name | sed 's/^/domain /'
        virsh -q net-list --all --name | sed 's/^/network /'
        virsh -q pool-list --all --name | while read -r pool; do
            [[ -n $pool ]] || continue
            echo "pool $pool"
            virsh -q vol-list "$pool" | awk -v pool="$pool" '{ print "volume", pool, $1 }'
        done
        iptables-save 2>/dev/null | grep -E '^-A .*(LIBVIRT|virbr)' | sed 's/^/rule /' || true
        ip -o link | awk -F': ' '{ print "interface", $2 }' | grep -E 'virbr|vnet' || true
        pgrep -a 'qemu-system|dnsmasq' | grep -E "$LAB_VM_BOX|vagrant-libvirt" | sed 's/^/process /' || true
    } | grep -v ' $' | sort
}

start_daemons() {
    virsh -q list >/dev/null 2>&1 && return
    # libvirt runs QEMU as a user of its own; where /dev/kvm is root's alone it then looks at QEMU
    # anew with each call, 50 s each when emulated. Settings for these daemons alone: the mount is
    # seen by nobody else.
    printf 'user = "root"\ngroup = "root"\nsecurity_driver = "none"\n' >"$work/qemu.conf"
    unshare --mount sh -c "
        mount --bind '$work/qemu.conf' /etc/libvirt/qemu.conf
        virtlogd -d -p '$work/virtlogd.pid'
        libvirtd -d -p '$work/libvirtd.pid'"
    daemons=("$work/libvirtd.pid" "$work/virtlogd.pid")
    local tries
    for tries in $(seq 100); do
        virsh -q list >/dev/null 2>&1 && return
        sleep 0.2
    done
    die "libvirtd does not answer after $((tries / 5)) s."
}

remove_everything() {
    local status=$? volume
    trap - EXIT
    vagrant destroy --force >>"$work/log" 2>&1 || true
    # The box, as a volume, outlives the machine by design; the pool and the network are libvirt's.
    while read -r volume; do
        virsh -q vol-delete --pool default "$volume" >/dev/null || true
    done < <(virsh -q vol-list default 2>/dev/null | awk -v box="$LAB_VM_BOX" 'index($1, box) { print $1 }')
    if virsh -q net-info vagrant-libvirt >/dev/null 2>&1 && ! grep -q '^network vagrant-libvirt' "$work/before"; then
        virsh -q net-destroy vagrant-libvirt >/dev/null 2>&1 || true
        virsh -q net-undefine vagrant-libvirt >/dev/null 2>&1 || true
    fi
    if virsh -q pool-info default >/dev/null 2>&1 && ! grep -q '^pool default' "$work/before"; then
        virsh -q pool-destroy default >/dev/null 2>&1 || true
        virsh -q pool-undefine default >/dev/null 2>&1 || true
    fi
    traces >"$work/after"
    if ! diff "$work/before" "$work/after" >"$work/left"; then
        say "Left behind:"
        cat "$work/left" >&2
        status=1
    fi
    local file
    for file in "${daemons[@]}"; do
        if [[ -s $file ]]; then kill "$(cat "$file")" || true; fi
    done
    if ((status == 0)); then rm -rf "$work"; else say "The log is in $work/log"; fi
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

start_daemons
traces >"$work/before"
trap remove_everything EXIT
trap 'exit 130' INT TERM
make_box
vagrant box add --name "$LAB_VM_BOX" "$work/lab.box" >"$work/log" 2>&1 || die "The box cannot be added: see $work/log"
rm "$work/lab.box"
step "the box is added; vagrant up"
if ! timeout 1200 vagrant up --provider=libvirt 2>&1 | tee -a "$work/log" >&2; then
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
