#!/usr/bin/env bash
# link-bcc.sh PYTHON: links the distribution's bcc, and nothing else of the distribution, into the
# environment (venv or conda) of the interpreter PYTHON. bcc is not on the Python index (the package
# of that name there is another) nor on conda-forge, and its Python part is pure Python over
# libbcc.so.0, so any Python 3 can import it.

. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

[[ $# == 1 ]] || die "Use: provision/link-bcc.sh PYTHON (the interpreter of the environment)."
python=$1
source_folder=/usr/lib/python3/dist-packages/bcc

command -v "$python" >/dev/null || die "There is no interpreter '$python'."
if [[ ! -d $source_folder ]]; then
    say "bcc is not installed (Debian: python3-bpfcc): recorded runs only."
    exit "$RECORDED_ONLY"
fi

# Isolated, and without sitecustomize: only the environment's own folder counts.
read -r is_environment site < <("$python" -I -c '
import os, sys, sysconfig
own = sys.prefix != sys.base_prefix or os.path.isdir(os.path.join(sys.prefix, "conda-meta"))
print("yes" if own else "no", sysconfig.get_path("purelib"))')
[[ $is_environment == yes ]] ||
    die "'$python' is not of a venv or conda environment; link-bcc.sh changes no system Python."

if [[ -e $site/bcc && ! -L $site/bcc ]]; then
    die "$site/bcc is a package of that name from elsewhere; uninstall it (pip uninstall bcc), then try again."
fi
if [[ $(readlink "$site/bcc" 2>/dev/null) != "$source_folder" ]]; then
    ln -sfn "$source_folder" "$site/bcc"
fi

"$python" -c 'import bcc, sys; sys.exit(not hasattr(bcc, "BPF"))' ||
    die "'$python' imports a bcc that has no BPF: another package of that name, or libbcc is broken."
say "bcc: the distribution's, linked into ${site%/lib/*}"
