#!/usr/bin/env bash
# test.sh [PYTEST ARGUMENTS]: every test. Three run at a time, as each of them waits now and then;
# those that need both CPUs run one after another (tests/conftest.py, RACES), beside the others.

. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

cd "$LAB_ROOT"
exec provision/enter.sh .venv/bin/python -m pytest \
    --numprocesses 3 --dist loadfile --no-loadscope-reorder "$@"
