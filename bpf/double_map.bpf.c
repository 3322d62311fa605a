// SPDX-License-Identifier: GPL-2.0
// Readers of a table that is switched from generation to generation: an inner map, or half an array.

struct piece {
	char bytes[WORK_BYTES];
};

struct counts {
	u64 sweeps;
	u64 mixed; // sweeps that saw more than one generation
	u64 moved; // sweeps that found their generation replaced in the end, and tell nothing
	u64 generations; // changes of generation from one sweep to the next
	u64 last;
};

BPF_ARRAY(inner, u64, KEYS);
BPF_ARRAY_OF_MAPS(outer, "inner", 1);
BPF_ARRAY(halves, u64, 2 * KEYS);
BPF_ARRAY(word, u64, 1); // generation in force; its lowest bit is the half
BPF_ARRAY(counts, struct counts, 1);
BPF_ARRAY(work, struct piece, 2);

struct sweep {
	u64 first;
	u64 differ;
};

// What a program does with each value: it copies so many bytes to and fro.
static inline void note(struct sweep *sweep, u64 *value, u32 key)
{
	u32 zero = 0, one = 1;
	struct piece *from = work.lookup(&zero), *to = work.lookup(&one);

	if (!value || !from || !to)
		return;
	if (key == 0)
		sweep->first = *value;
	sweep->differ |= *value ^ sweep->first;
	bpf_probe_read_kernel(to, sizeof(*to), from);
}

static inline void end(struct counts *seen, struct sweep *sweep)
{
	seen->sweeps++; // one CPU reads
	if (sweep->differ)
		seen->mixed++;
	if (sweep->first != seen->last)
		seen->generations++;
	seen->last = sweep->first;
}

int sweep_published(void *ctx)
{
	u32 zero = 0;
	struct counts *seen = counts.lookup(&zero);
	void *published = outer.lookup(&zero); // once: the whole sweep stays in this map
	struct sweep sweep = {};

	if (!seen || !published)
		return 0;
	for (u32 key = 0; key < KEYS; key++) {
		u32 place = key;

		note(&sweep, bpf_map_lookup_elem(published, &place), key);
	}
	end(seen, &sweep);
	return 0;
}

static inline int sweep_in_half(int compare)
{
	u32 zero = 0;
	struct counts *seen = counts.lookup(&zero);
	volatile u64 *generation = word.lookup(&zero);
	struct sweep sweep = {};
	u64 begun_in;

	if (!seen || !generation)
		return 0;
	begun_in = *generation; // once: the whole sweep stays in this half
	for (u32 key = 0; key < KEYS; key++) {
		u32 place = (begun_in & 1 ? KEYS : 0) + key;

		note(&sweep, halves.lookup(&place), key);
	}
	// The half is filled anew only after the word has moved.
	if (compare && *generation != begun_in) {
		seen->moved++;
		return 0;
	}
	end(seen, &sweep);
	return 0;
}

int sweep_half(void *ctx)
{
	return sweep_in_half(0);
}

int sweep_half_and_compare(void *ctx)
{
	return sweep_in_half(1);
}
