#!/usr/bin/env bash
# Installs the browser in which tests look at JupyterLab and the report's pages: 440 MB, and no part
# of the usual set-up, since the lab itself needs none. Where it cannot be had, those tests say so.

. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if ! command -v chromium >/dev/null; then
    if ! command -v apt-get >/dev/null || ! can_be_root; then
        say "Chromium is missing, and cannot be installed here: tests with a browser are skipped."
        exit 0
    fi
    install_packages() {
        apt_update
        apt_install chromium
    }
    with_progress "$LAB_STATE/browser-apt.log" "Installing Chromium" install_packages
fi
