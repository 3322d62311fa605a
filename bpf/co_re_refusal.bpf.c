// SPDX-License-Identifier: GPL-2.0
// Reads a policy from a map whose struct may carry the attribute that makes accesses relocatable.
//
// Plain libbpf, compiled by clang: it is libbpf that relocates, before the program is loaded.
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_core_read.h>

#define RELOCATABLE __attribute__((preserve_access_index))

#define ON_NOTHING 0
#define ON_MAP_VALUE 1
#define ON_KERNEL_STRUCT 2

// Ours, so no kernel has it in its BTF: there is nothing to relocate it by.
struct lab_policy {
	__u32 version;
	__u32 action;
#if ATTRIBUTE == ON_MAP_VALUE
} RELOCATABLE;
#else
};
#endif

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 8);
	__type(key, __u32);
	__type(value, struct lab_policy);
} policies SEC(".maps");

#if ATTRIBUTE == ON_KERNEL_STRUCT
// The kernel's, of which one field is named: where it stands is looked up in the kernel's BTF.
struct task_struct {
	int tgid;
} RELOCATABLE;

static __always_inline int wrong_process(void)
{
	struct task_struct *task = (void *)bpf_get_current_task();

	return BPF_CORE_READ(task, tgid) != (int)(bpf_get_current_pid_tgid() >> 32);
}
#else
static __always_inline int wrong_process(void)
{
	return 0;
}
#endif

// Not tc: there an older kernel does not tell which process runs.
SEC("syscall")
int read_version(void *ctx)
{
	struct lab_policy *policy;
	__u32 key = 1;

	policy = bpf_map_lookup_elem(&policies, &key);
	if (!policy || wrong_process())
		return 0;
	return policy->version;
}

char _license[] SEC("license") = "GPL";
