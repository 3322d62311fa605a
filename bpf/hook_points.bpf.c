// SPDX-License-Identifier: GPL-2.0
// Counts how often one process passes a hook, and writes a map for it.

enum counted { SO_FAR, AT_START, AT_END, COUNTED };

// Mapped by the process: reading it must be no system call, which some hooks would count. So is
// the call that runs a writer, which therefore notes the passes at its own start and end.
BPF_F_TABLE("array", u32, u64, passes, COUNTED, BPF_F_MMAPABLE);

#define TABLE bpf_pseudo_fd(1, TABLE_FD)

static inline int pass(void)
{
	u32 so_far = SO_FAR;
	u64 *count;

	if (bpf_get_current_pid_tgid() >> 32 != PROCESS)
		return 0;
	count = passes.lookup(&so_far);
	if (count)
		__sync_fetch_and_add(count, 1);
	return 0;
}

static inline void note(u32 when)
{
	u32 so_far = SO_FAR;
	u64 *count = passes.lookup(&so_far), *noted = passes.lookup(&when);

	if (count && noted)
		*noted = *count;
}

// For every type of program: it looks at nothing that it is given.
int on_pass(void *ctx)
{
	return pass();
}

// (registers, ...), where every system call passes: only bpf(2) counts.
int on_system_call(u64 *ctx)
{
	u32 number = 0;

	bpf_probe_read_kernel(&number, sizeof(number), (void *)(ctx[0] + NUMBER_AT));
	return number == NR_BPF ? pass() : 0;
}

// Each answers how many writes went through, up to the first that was refused.
int update_all(void *ctx)
{
	note(AT_START);
	for (u64 i = 0; i < WRITES; i++) {
		u64 key = i << KEY_SHIFT | KEY_LOW, value = i;

		if (bpf_map_update_elem_(TABLE, &key, &value, BPF_ANY))
			return i;
	}
	note(AT_END);
	return WRITES;
}

int delete_all(void *ctx)
{
	note(AT_START);
	for (u64 i = 0; i < WRITES; i++) {
		u64 key = i << KEY_SHIFT | KEY_LOW;

		if (bpf_map_delete_elem_(TABLE, &key))
			return i;
	}
	note(AT_END);
	return WRITES;
}
