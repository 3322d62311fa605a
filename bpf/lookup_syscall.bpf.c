// SPDX-License-Identifier: GPL-2.0
// Writes down every bpf(2) of one thread, its attributes as user space passed them, and counts the
// other calls by which a map could be reached: mmap of a descriptor, and msync.

#define ATTRIBUTES 64

// What the kernel hands to a program at syscalls:sys_enter_* (kernel/trace/trace_syscalls.c).
struct entered {
	u64 common;
	u64 number;
	u64 arguments[6];
};

struct call {
	u64 number;
	u64 command;
	u64 pointer;
	u64 size;
	u8 attributes[ATTRIBUTES];
};

struct totals {
	u64 bpf;
	u64 mmap;
	u64 msync;
};

BPF_TABLE("hash", u32, u64, table, ENTRIES);
BPF_ARRAY(calls, struct call, CALLS);
BPF_ARRAY(totals, struct totals, 1);

// By the process's own numbers: in a container they are not those of the whole machine.
static inline struct totals *totals_of_ours(void)
{
	struct bpf_pidns_info who = {};
	int zero = 0;

	if (bpf_get_ns_current_pid_tgid(NAMESPACE_DEVICE, NAMESPACE_INODE, &who, sizeof(who)))
		return NULL;
	return who.pid == THREAD ? totals.lookup(&zero) : NULL;
}

int on_bpf(struct entered *entered)
{
	struct totals *ours = totals_of_ours();
	struct call *call;
	u32 turn;

	if (!ours)
		return 0;
	turn = ours->bpf++;
	call = calls.lookup(&turn);
	if (!call)
		return 0;
	call->number = entered->number;
	call->command = entered->arguments[0];
	call->pointer = entered->arguments[1];
	call->size = entered->arguments[2];
	// All of them, whatever size was passed: the union that libraries pass is longer still. Where
	// there is no memory the helper leaves zeros.
	bpf_probe_read_user(call->attributes, ATTRIBUTES, (void *)call->pointer);
	return 0;
}

int on_mmap(struct entered *entered)
{
	struct totals *ours = totals_of_ours();

	// Without a descriptor it is ordinary memory of the process.
	if (ours && (int)entered->arguments[4] >= 0)
		ours->mmap++;
	return 0;
}

int on_msync(struct entered *entered)
{
	struct totals *ours = totals_of_ours();

	if (ours)
		ours->msync++;
	return 0;
}
