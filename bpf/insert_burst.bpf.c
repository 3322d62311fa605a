// SPDX-License-Identifier: GPL-2.0
// Inserts a burst of new keys, and counts what the helper answered. A careless program would not
// look: its keys are then absent, and nobody knows.
//
// The map is made by user space, which passes its descriptor.

#include <uapi/asm-generic/errno-base.h>

struct answers {
	u64 next_key;
	u64 inserted;
	u64 no_memory;
	u64 full;
	u64 other;
};

BPF_ARRAY(answers, struct answers, 1);

static inline int burst(void)
{
	struct answers *seen;
	u64 value = 1;
	int zero = 0;

	seen = answers.lookup(&zero);
	if (!seen)
		return 0;
	for (int i = 0; i < BURST; i++) {
		u32 key = seen->next_key;
		int answer;

		if (key >= INSERTIONS)
			return 0;
		seen->next_key = key + 1;
		answer = bpf_map_update_elem_(bpf_pseudo_fd(1, TABLE_FD), &key, &value, BPF_NOEXIST);
		if (answer == 0)
			seen->inserted++;
		else if (answer == -ENOMEM)
			seen->no_memory++;
		else if (answer == -E2BIG)
			seen->full++;
		else
			seen->other++;
	}
	return 0;
}

// The scheduler calls this with interrupts off: nothing can refill the allocator meanwhile.
int on_switch(void *ctx)
{
	// Two CPUs may switch at once; only the owner's thread counts, so the counters need no lock.
	if ((u32)bpf_get_current_pid_tgid() != OWNER_ID)
		return 0;
	return burst();
}

// The same with interrupts on.
int in_place(void *ctx)
{
	return burst();
}
