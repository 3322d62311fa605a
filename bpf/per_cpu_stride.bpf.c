// SPDX-License-Identifier: GPL-2.0
// Marks the value of the CPU that it runs on, so that user space can tell whose slot it reads.

struct value {
	u32 words[WORDS];
};

BPF_TABLE("percpu_array", u32, struct value, in_array, 1);
BPF_TABLE("percpu_hash", u32, struct value, in_hash, 1);

static inline void mark(struct value *own)
{
	u32 cpu = bpf_get_smp_processor_id();

	// Every word differs from every other word of every CPU, and none is zero.
	for (u32 i = 0; i < WORDS; i++)
		own->words[i] = (cpu + 1) << 16 | (i + 1);
}

int mark_own(void *ctx)
{
	struct value *own;
	u32 key = 0;

	own = in_array.lookup(&key);
	if (own)
		mark(own);
	own = in_hash.lookup(&key);
	if (own)
		mark(own);
	return 0;
}
