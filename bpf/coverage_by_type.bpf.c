// SPDX-License-Identifier: GPL-2.0
// The ways in which a program writes a map that user space made. Each ends at the first write that is
// refused, and answers how many went through: so the verifier has one path to follow, not one for
// every pattern of refusals.

#define TABLE bpf_pseudo_fd(1, TABLE_FD)

int update_all(void *ctx)
{
	u64 value = VALUE;

	for (u64 i = 0; i < WRITES; i++) {
		u64 key = i << KEY_SHIFT | KEY_LOW;

		if (bpf_map_update_elem_(TABLE, &key, &value, BPF_ANY))
			return i;
	}
	return WRITES;
}

int delete_all(void *ctx)
{
	for (u64 i = 0; i < WRITES; i++) {
		u64 key = i << KEY_SHIFT | KEY_LOW;

		if (bpf_map_delete_elem_(TABLE, &key))
			return i;
	}
	return WRITES;
}

// Through the pointer that a lookup gives: no function of the kernel is called.
int store_all(void *ctx)
{
	for (u64 i = 0; i < WRITES; i++) {
		u64 key = i << KEY_SHIFT | KEY_LOW, *value;

		value = bpf_map_lookup_elem_(TABLE, &key);
		if (!value)
			return i;
		*value = VALUE;
	}
	return WRITES;
}
