#!/usr/bin/env bash
# JupyterLab on this machine's own address only, with a token that is new each time. LAB_PORT is its
# port, LAB_NOTEBOOKS the folder that it shows. (lab-service.sh, in a throw-away VM, sets the token
# and, for VirtualBox, LAB_LISTEN.)

. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

cd "$LAB_ROOT"
port=${LAB_PORT:-8888}
[[ $port =~ ^[0-9]+$ ]] || die "LAB_PORT must be a port number, not '$port'."

# Jupyter keeps its token and its kernels' keys in files while it runs: in a folder that goes away.
JUPYTER_RUNTIME_DIR=$(mktemp -d "$LAB_STATE/jupyter.XXXXXX")
export JUPYTER_RUNTIME_DIR
trap 'rm -rf "$JUPYTER_RUNTIME_DIR"' EXIT
# Ctrl-C is Jupyter's: it asks, and this script waits for its end.
trap : INT TERM

# A taken port is an error: the port that a VM forwards must not wander.
options=(
    --ServerApp.ip="${LAB_LISTEN:-127.0.0.1}"
    --ServerApp.port="$port"
    --ServerApp.port_retries=0
    --ServerApp.root_dir="${LAB_NOTEBOOKS:-$LAB_ROOT/notebooks}"
    --ServerApp.open_browser=False
)
say "JupyterLab: open the address with the token shown below; Ctrl-C twice ends it."
# Root is needed for BPF; Jupyter refuses root unless it is told.
# shellcheck disable=SC2016
provision/enter.sh sh -c '
    [ "$(id -u)" = 0 ] && set -- --allow-root "$@"
    exec env JUPYTER_RUNTIME_DIR="$0" jupyter lab "$@"' "$JUPYTER_RUNTIME_DIR" "${options[@]}"
