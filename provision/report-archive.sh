#!/usr/bin/env bash
# The report as one file, reports.tar.gz: whoever unpacks it opens reports/index.html, which loads
# nothing from anywhere. An older archive is replaced once the new one is whole.

. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

cd "$LAB_ROOT"
[[ -f reports/index.html ]] || die "There is no report yet: run make report first."
partial=$(mktemp .partial-reports-XXXXXX.tar.gz)
trap 'rm -f "$partial"' EXIT
tar -czf "$partial" reports || die "The archive could not be written: free some space."
chmod 644 "$partial"
mv "$partial" reports.tar.gz
say "reports.tar.gz has the report: unpack it, and open reports/index.html."
