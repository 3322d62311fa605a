#!/usr/bin/env bash
# Fetches the Go libraries of the benchmarks' peers from Debian sid, whatever suite this machine has,
# and unpacks them below .lab: nothing is installed. Without them the benchmarks leave Go's rows out.
# Beside them stands cilium/ebpf as older suites have it, for what no version of it knows.

. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

newest=sid
suites=(bookworm trixie "$newest")
packages=(golang-github-cilium-ebpf-dev golang-golang-x-sys-dev golang-golang-x-exp-dev)
libraries=$LAB_STATE/go-libraries
# A checkout of before has the newest alone.
if [[ -d $libraries/${suites[0]} ]] || ! command -v apt-get >/dev/null || [[ ! -x $LAB_ROOT/.venv/bin/go ]]; then
    exit 0
fi

# An apt of our own, with its own lists: those of the machine stay as they are.
fetch() {
    local root=$1 mirror key=/usr/share/keyrings/debian-archive-keyring.gpg
    # shellcheck disable=SC2016
    mirror=$(apt-get indextargets --format '$(ORIGIN) $(REPO_URI)' 'Created-By: Packages' |
        awk '$1 == "Debian" && $2 !~ /security/ { print $2; exit }')
    mkdir -p "$root"/{lists,cache/archives,unpacked}
    touch "$root/status"
    local suite package
    for suite in "${suites[@]}"; do
        echo "deb [signed-by=$key] ${mirror:?no mirror of Debian is configured} $suite main"
    done >"$root/sources.list"
    cd "$root"
    local own=(-o "Dir::Etc::sourcelist=$root/sources.list" -o Dir::Etc::sourceparts=/dev/null
        -o "Dir::State::Lists=$root/lists" -o "Dir::State::status=$root/status"
        -o "Dir::Cache=$root/cache" -o Acquire::Languages=none -o APT::Sandbox::User=)
    # Each by &&: who calls asks for the status, and then no failure ends a function.
    apt-get "${own[@]}" -q update &&
        for suite in "${suites[@]}"; do
            mkdir "$suite" && (cd "$suite" && apt-get "${own[@]}" -q download "${packages[@]/%//$suite}") &&
                for package in "$suite"/*.deb; do dpkg-deb -x "$package" "$suite/unpacked" || return; done &&
                mv -T "$suite/unpacked" "unpacked/$suite" || return
        done &&
        mv unpacked/"$newest"/* unpacked && rmdir unpacked/"$newest" &&
        rm -rf "$libraries" && mv -T unpacked "$libraries"
}

work=$(mktemp -d "$LAB_STATE/go-apt.XXXXXX")
trap 'rm -rf "$work"' EXIT
if ! with_progress "$LAB_STATE/go-apt.log" "Fetching Go libraries for the benchmarks" fetch "$work"; then
    mkdir -p "$libraries/${suites[0]}" # no set-up waits for a network again that may not be there
    say "The benchmarks leave Go's rows out; remove .lab/go-libraries to have set-up try again."
fi
