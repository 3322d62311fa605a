// SPDX-License-Identifier: GPL-2.0
// Looks up the key that is written next, again and again, in a map that never lacks it.

struct counts {
	u64 lookups;
	u64 absent;  // the lookup answered NULL
};

BPF_ARRAY(next, u32, 1);
BPF_ARRAY(counts, struct counts, 1);

int look(void *ctx)
{
	u32 zero = 0, key;
	u32 *told = next.lookup(&zero);
	struct counts *seen = counts.lookup(&zero);

	if (!told || !seen)
		return 0;
	// A copy: the word may change while the lookup compares it with key after key.
	key = *(volatile u32 *)told;
	seen->lookups++;
	if (!bpf_map_lookup_elem_(bpf_pseudo_fd(1, TABLE_FD), &key))
		seen->absent++;
	return 0;
}
