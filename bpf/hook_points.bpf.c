// SPDX-License-Identifier: GPL-2.0
// Counts how often one process passes a hook, and writes a map for it.

BPF_ARRAY(passes, u64, 1);

// For every type of program: it looks at nothing that it is given.
int on_pass(void *ctx)
{
	u32 zero = 0;
	u64 *count;

	if (bpf_get_current_pid_tgid() >> 32 != PROCESS)
		return 0;
	count = passes.lookup(&zero);
	if (count)
		__sync_fetch_and_add(count, 1);
	return 0;
}

// Answers how often the hook was passed meanwhile.
int write_map(void *ctx)
{
	u32 zero = 0;
	u64 *count = passes.lookup(&zero), before;

	if (!count)
		return 0;
	before = *count;
	for (u64 i = 0; i < WRITES; i++) {
		u64 key = i << KEY_SHIFT | KEY_LOW, value = i;

		bpf_map_update_elem_(bpf_pseudo_fd(1, TABLE_FD), &key, &value, BPF_ANY);
		bpf_map_delete_elem_(bpf_pseudo_fd(1, TABLE_FD), &key);
	}
	return *count - before;
}
