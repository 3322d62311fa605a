#!/usr/bin/env bash
# Finds kernel headers for bcc. Where the running kernel has none of its own, builds one merged tree
# of links from Debian's split packages under .lab/headers: bcc takes a single directory only.
#
#   headers.sh         make the tree if it is needed; says what bcc will use
#   headers.sh --find  make nothing; exit status 0 if headers can be had without installing
#   headers.sh --own   make nothing; exit status 0 if the running kernel has headers of its own
#   headers.sh --path  print the value for BCC_KERNEL_SOURCE; nothing when bcc finds headers alone
#
# Headers of another version serve for maps, helpers and tracepoint arguments, never for the inside
# of kernel structures (there the programs use BTF).

. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

tree=$LAB_STATE/headers

running_kernel_has_headers() {
    local modules
    modules=/lib/modules/$(uname -r)
    [[ -e $modules/build/include || -e $modules/source/include || -e /sys/kernel/kheaders.tar.xz ]]
}

# Prints "KERNEL_ARCH FLAVOUR_DIR COMMON_DIR" of the newest installed version that has both halves.
newest_split_headers() {
    local arch flavour common version
    case $(uname -m) in
        x86_64) arch=x86 ;;
        aarch64) arch=arm64 ;;
        *) return 1 ;;
    esac
    while read -r flavour; do
        version=${flavour##*/linux-headers-}
        common=/usr/src/linux-headers-${version%-*}-common
        if [[ -d $flavour/include/generated && -d $common/include/linux ]]; then
            printf '%s %s %s\n' "$arch" "$flavour" "$common"
            return 0
        fi
    done < <(printf '%s\n' /usr/src/linux-headers-*-*64 | sort -rV)
    return 1
}

build_tree() {
    local arch=$1 flavour=$2 common=$3 fresh
    mkdir -p "$LAB_STATE"
    fresh=$(mktemp -d "$LAB_STATE/headers.XXXXXX")
    chmod 755 "$fresh"
    mkdir -p "$fresh/include" "$fresh/arch/$arch/include"
    # The flavour adds generated/ and config/, of which the common half has none.
    ln -s "$common"/include/* "$flavour"/include/* "$fresh/include/"
    ln -s "$common/arch/$arch/include"/* "$flavour/arch/$arch/include"/* "$fresh/arch/$arch/include/"
    printf '%s\n' "$flavour" >"$fresh/origin"
    # Readers see the old tree or the new one, never half of one.
    rm -rf "$tree.old"
    [[ -e $tree ]] && mv -T "$tree" "$tree.old"
    mv -T "$fresh" "$tree"
    rm -rf "$tree.old"
}

case ${1:-} in
    --find)
        running_kernel_has_headers || newest_split_headers >/dev/null
        ;;
    --own)
        running_kernel_has_headers
        ;;
    --path)
        if ! running_kernel_has_headers && [[ -e $tree/include/linux ]]; then
            printf '%s\n' "$tree"
        fi
        ;;
    "")
        if running_kernel_has_headers; then
            say "Kernel headers: the running kernel's own"
            exit 0
        fi
        if ! found=$(newest_split_headers); then
            say "No kernel headers are installed: recorded runs only."
            exit "$RECORDED_ONLY"
        fi
        read -r arch flavour common <<<"$found"
        if [[ ! -e $tree/include/linux/bpf.h || $(cat "$tree/origin" 2>/dev/null) != "$flavour" ]]; then
            build_tree "$arch" "$flavour" "$common"
        fi
        say "Kernel headers: those of ${flavour##*/linux-headers-} for the running $(uname -r), through .lab/headers"
        ;;
    *)
        die "headers.sh knows --find, --own, --path or no argument, not '$1'."
        ;;
esac
