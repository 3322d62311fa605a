// SPDX-License-Identifier: GPL-2.0
// Counts events by key, as a profiler does, while user space collects the counts.

BPF_HASH(counts, u32, u64, 1024);
BPF_ARRAY(next_key, u64, 1);

int count_event(void *ctx)
{
	u64 one = 1, *turn, *count;
	int zero = 0;
	u32 key;

	turn = next_key.lookup(&zero);
	if (!turn)
		return 0;
	key = __sync_fetch_and_add(turn, 1) % KEYS;
	count = counts.lookup(&key);
	if (!count) {
		// Two CPUs may be the first at once: one inserts, the other finds it below.
		if (counts.insert(&key, &one) == 0)
			return 0;
		count = counts.lookup(&key);
		if (!count)
			return 1;
	}
	// Between the lookup and this addition a collector may have taken the element away:
	// then the event is added to memory that nobody will read.
	__sync_fetch_and_add(count, 1);
	return 0;
}
