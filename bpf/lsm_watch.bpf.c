// SPDX-License-Identifier: GPL-2.0
// Counts the calls of bpf(2) that would change one map, before the kernel does what they ask.

#include "map_of_fd.h"

enum counted { UPDATES, DELETES, VALUES, COUNTED };

BPF_ARRAY(counts, u64, COUNTED);

static inline void add(u32 which, u64 much)
{
	u64 *count = counts.lookup(&which);

	if (count)
		__sync_fetch_and_add(count, much);
}

// (command, the kernel's own copy of attr, size); an answer other than 0 would forbid the call
int on_bpf(u64 *ctx)
{
	struct element_call call = {};
	u32 command = ctx[0];
	u64 value = 0;

	if (command != BPF_MAP_UPDATE_ELEM && command != BPF_MAP_DELETE_ELEM)
		return 0;
	bpf_probe_read_kernel(&call, sizeof(call), (void *)ctx[1]);
	if (map_id(call.map_fd) != MAP_ID)
		return 0;
	if (command == BPF_MAP_DELETE_ELEM) {
		add(DELETES, 1);
		return 0;
	}
	add(UPDATES, 1);
	if (!bpf_probe_read_user(&value, sizeof(value), (void *)call.value))
		add(VALUES, value);
	return 0;
}

int update_all(void *ctx)
{
	for (u64 i = 0; i < WRITES; i++) {
		u32 key = i;
		u64 value = i;

		if (bpf_map_update_elem_(bpf_pseudo_fd(1, TABLE_FD), &key, &value, BPF_ANY))
			return i;
	}
	return WRITES;
}
