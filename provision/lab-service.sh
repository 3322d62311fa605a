#!/usr/bin/env bash
# JupyterLab as a service of a throw-away VM, with a token that is made once and that root alone can
# read. Prints its address, as the machine that forwards port 8888 sees it (LAB_PORT there).
#
#   lab-service.sh        install it, start it, and print the address
#   lab-service.sh --url  only print the address

. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# Jupyter reads the token from its environment, where only root sees it, never from a command line.
settings=/etc/map-freshness-lab/jupyter.env
unit=/etc/systemd/system/lab-jupyter.service

((EUID == 0)) || exec sudo --preserve-env=LAB_PORT "${BASH_SOURCE[0]}" "$@"

print_address() {
    local token
    [[ -r $settings ]] || die "JupyterLab is no service here yet: run provision/lab-service.sh."
    token=$(sed -n 's/^JUPYTER_TOKEN=//p' "$settings")
    printf 'http://127.0.0.1:%s/lab?token=%s\n' "${LAB_PORT:-8888}" "$token"
}

# VirtualBox forwards a port to the VM's address in its NAT network, where nobody else is; with
# everything else the forward reaches the VM's loopback, and nothing needs to listen beyond that.
listen_address() {
    local address=127.0.0.1
    if [[ $(systemd-detect-virt) == oracle ]]; then
        address=$(ip -4 route get 1 | sed -n 's/.* src \([0-9.]*\).*/\1/p')
    fi
    printf '%s\n' "$address"
}

answers() {
    local address=$1
    "$LAB_ROOT/.venv/bin/python" - "$address" <<'PYTHON'
import sys
import time
import urllib.request

deadline = time.monotonic() + 180
while True:
    try:
        urllib.request.urlopen(f"http://{sys.argv[1]}:8888/api", timeout=10)
        break
    except OSError as error:
        if time.monotonic() > deadline:
            sys.exit(str(error))
        time.sleep(0.5)
PYTHON
}

case ${1:-} in
    --url) print_address; exit ;;
    "") ;;
    *) die "lab-service.sh knows --url or no argument, not '$1'." ;;
esac

[[ -d /run/systemd/system ]] || die "There is no systemd here to run a service: use make lab."
address=$(listen_address)
umask 077
mkdir -p "${settings%/*}"
if [[ ! -s $settings ]]; then
    printf 'JUPYTER_TOKEN=%s\n' "$(od -An -N24 -tx1 /dev/urandom | tr -d ' \n')" >"$settings.new"
    mv "$settings.new" "$settings"
fi
cat >"$unit.new" <<EOT
[Unit]
Description=JupyterLab of the map freshness lab
After=network-online.target
Wants=network-online.target

[Service]
Environment=LAB_LISTEN=$address LAB_PORT=8888
EnvironmentFile=$settings
ExecStart="$LAB_ROOT/provision/lab.sh"
Restart=on-failure
RestartSec=5

[Install]
WantedBy=multi-user.target
EOT
chmod 644 "$unit.new"
changed=no
if ! cmp -s "$unit.new" "$unit"; then changed=yes; fi
mv "$unit.new" "$unit"
systemctl daemon-reload
systemctl --quiet enable lab-jupyter
if [[ $changed == yes ]]; then systemctl restart lab-jupyter; else systemctl start lab-jupyter; fi
if ! why=$(answers "$address"); then
    journalctl --no-pager -n 20 -u lab-jupyter >&2
    die "JupyterLab does not answer: $why"
fi
say "JupyterLab, as root, for whoever has this address:"
print_address
