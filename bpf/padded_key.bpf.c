// SPDX-License-Identifier: GPL-2.0
// A policy looked up by a key whose layout may have bytes that belong to no field.

struct key {
#ifdef PADDED
	u8 protocol; // the compiler puts three bytes behind it that nobody names
#else
	u32 protocol;
#endif
	u32 address;
};

struct counts {
	u64 found;
	u64 absent;
};

BPF_HASH(policy, struct key, u64, 2 * KEYS);
BPF_ARRAY(counts, struct counts, 1);

int look_up_all(void *ctx)
{
	struct counts *seen;
	int zero = 0;

	seen = counts.lookup(&zero);
	if (!seen)
		return 0;
	for (u32 address = 0; address < KEYS; address++) {
		struct key key;

		// A program has to clear its key: the hash is over all bytes, and before Linux 6.3
		// the verifier refused a key with bytes that were never written. User space has
		// nobody who would refuse it.
		__builtin_memset(&key, 0, sizeof(key));
		key.protocol = 6;
		key.address = address;
		if (policy.lookup(&key))
			seen->found++;
		else
			seen->absent++;
	}
	return 0;
}
