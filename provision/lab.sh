#!/usr/bin/env bash
# JupyterLab on this machine's own address only, with a token that is new each time. LAB_PORT is its
# port; LAB_NOTEBOOKS is a folder to show in place of .lab/notebooks, where copies of the notebooks
# are made. (lab-service.sh, in a throw-away VM, sets JUPYTER_TOKEN and, for VirtualBox, LAB_LISTEN.)

. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

cd "$LAB_ROOT"
say "JupyterLab: open the address with the token that is shown in a moment; Ctrl-C twice ends it."
exec provision/enter.sh .venv/bin/python -m labkit.lab.jupyter
