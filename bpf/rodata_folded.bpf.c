// SPDX-License-Identifier: GPL-2.0
// One decision, by a policy that stands in read-only data, in data, or in a map.
//
// Plain libbpf, not bcc's dialect: bcc knows no global variables. Compiled by clang and
// loaded by labkit.kernel.elf.
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

#define ALLOW 1
#define DENY 2

#define DENIED 0x5eed // what a denying run returns; stands in no other instruction

// volatile: the compiler must not decide by the initial value. In .rodata the verifier may.
const volatile __u32 policy_constant = ALLOW;
volatile __u32 policy_variable = ALLOW; // not 0, which would put it into .bss

struct {
	__u64 allowed;
	__u64 denied;
} runs; // in .bss: what the runs did

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} policy SEC(".maps");

static __always_inline int allow(void)
{
	__sync_fetch_and_add(&runs.allowed, 1);
	return 0;
}

static __always_inline int deny(void)
{
	int answer;

	__sync_fetch_and_add(&runs.denied, 1);
	// In assembly, or the compiler would load the number before the branch, and nobody could
	// tell by it whether the verifier left the branch in.
	asm volatile("%0 = %1" : "=r"(answer) : "i"(DENIED));
	return answer;
}

SEC("tc")
int obey_constant(struct __sk_buff *skb)
{
	if (policy_constant == DENY)
		return deny();
	return allow();
}

SEC("tc")
int obey_variable(struct __sk_buff *skb)
{
	if (policy_variable == DENY)
		return deny();
	return allow();
}

SEC("tc")
int obey_map(struct __sk_buff *skb)
{
	__u32 zero = 0, *verdict;

	verdict = bpf_map_lookup_elem(&policy, &zero);
	if (verdict && *verdict == DENY)
		return deny();
	return allow();
}

char _license[] SEC("license") = "GPL";
