// SPDX-License-Identifier: GPL-2.0
// The smallest programs that show that loading, running and attaching work.

struct key {
	u8 family;
	u32 address;
};

BPF_HASH(padded, struct key, u64, 16);
BPF_ARRAY(runs, u64, 1);

int count_runs(void *ctx)
{
	int zero = 0;
	u64 *runs_so_far = runs.lookup(&zero);

	if (runs_so_far)
		__sync_fetch_and_add(runs_so_far, 1);
	return RETURNED;
}

int answer(u64 *argument)
{
	*argument += 1;
	return RETURNED;
}

int never_verifies(void *ctx)
{
	int absent = 1;
	u64 *value = runs.lookup(&absent);

	return *value; // not checked against NULL
}
