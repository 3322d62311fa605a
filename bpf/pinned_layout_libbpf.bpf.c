// SPDX-License-Identifier: GPL-2.0
// The same build for plain libbpf, which compares a pinned map with this before it takes it.

#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include "pinned_layout.h"

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, ENTRIES);
	__type(key, __u32);
	__type(value, struct policy);
} policies SEC(".maps");
