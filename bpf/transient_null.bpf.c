// SPDX-License-Identifier: GPL-2.0
// A reader that looks up keys which nobody ever deletes, and counts how often they are absent.

#ifdef LOCKED
struct value {
	struct bpf_spin_lock lock;
	u32 version;
};
#else
struct value {
	u64 version;
};
#endif

struct counts {
	u64 absent;        // the lookup answered NULL
	u64 absent_again;  // so did the retry right behind it
};

BPF_F_TABLE(KIND, u32, struct value, table, KEYS, FLAGS);
BPF_ARRAY(counts, struct counts, 1);

int read_all(void *ctx)
{
	struct counts *seen;
	int zero = 0;

	seen = counts.lookup(&zero);
	if (!seen)
		return 0;
	// The verifier of 6.1 does not follow a counter whose address is taken.
	for (u32 i = 0; i < KEYS; i++) {
		u32 key = i;

		if (table.lookup(&key))
			continue;
		// Absent: in a hash, an update links the new element and unlinks the old one in two
		// steps, and the freed element may be used again under the reader's feet.
		__sync_fetch_and_add(&seen->absent, 1);
		if (!table.lookup(&key))
			__sync_fetch_and_add(&seen->absent_again, 1);
	}
	return 0;
}
