#!/usr/bin/env bash
# JupyterLab on this machine's own address only, with a token that is new each time and is written
# to no file of ours.

. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

cd "$LAB_ROOT"
# In a VM the port is forwarded, so it must not wander: a taken port is an error there, not a hint.
port=${LAB_PORT:-8888}
[[ $port =~ ^[0-9]+$ ]] || die "LAB_PORT must be a port number, not '$port'."
options=(
    --no-browser
    --ServerApp.ip=127.0.0.1
    --ServerApp.port="$port"
    --ServerApp.port_retries=0
    --ServerApp.root_dir="$LAB_ROOT/notebooks"
    --ServerApp.open_browser=False
)
say "JupyterLab: open the address with the token shown below; Ctrl-C twice ends it."
exec provision/enter.sh bash -c '
    # Root is needed for BPF; Jupyter refuses it unless told.
    if ((EUID == 0)); then set -- --allow-root "$@"; fi
    exec jupyter lab "$@"' jupyter "${options[@]}"
