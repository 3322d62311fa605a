// SPDX-License-Identifier: GPL-2.0
// Readers of a whole table whose keys all get a new generation at once, or should.

struct sweep {
	u64 start_ns;
	u64 end_ns;
	u64 generation[KEYS];
};

struct counts {
	u64 sweeps;
	u64 mixed;  // sweeps that saw more than one generation
};

BPF_ARRAY(table, u64, KEYS);
BPF_ARRAY(halves, u64, 2 * KEYS); // two tables in one map ...
BPF_ARRAY(active, u32, 1);        // ... and which of them counts
BPF_ARRAY(inner, u64, KEYS);
BPF_ARRAY_OF_MAPS(outer, "inner", 1);
BPF_ARRAY(counts, struct counts, 1);
// Some sweeps are kept whole, the last slot takes those that are not.
BPF_ARRAY(samples, struct sweep, SAMPLES + 1);

// What a program does with each value: here it asks for the time, PAUSE times.
static inline void work(void)
{
	for (int i = 0; i < PAUSE; i++)
		bpf_ktime_get_ns();
}

static inline void note(struct sweep *sweep, u32 key, u64 generation, u64 *differ)
{
	sweep->generation[key] = generation;
	*differ |= generation ^ sweep->generation[0];
	work();
}

static inline void end(struct counts *seen, struct sweep *sweep, u64 differ)
{
	sweep->end_ns = bpf_ktime_get_ns();
	seen->sweeps++; // one CPU reads
	if (differ)
		seen->mixed++;
}

static inline u32 slot(struct counts *seen)
{
	return seen->sweeps % EVERY ? SAMPLES : seen->sweeps / EVERY % SAMPLES;
}

int sweep_table(void *ctx)
{
	int zero = 0;
	struct counts *seen = counts.lookup(&zero);
	u32 at = seen ? slot(seen) : 0;
	struct sweep *sweep = samples.lookup(&at);
	u64 differ = 0;

	if (!seen || !sweep)
		return 0;
	sweep->start_ns = bpf_ktime_get_ns();
	for (u32 key = 0; key < KEYS; key++) {
		u32 place = key;
		u64 *generation = table.lookup(&place);

		if (generation)
			note(sweep, key, *generation, &differ);
	}
	end(seen, sweep, differ);
	return 0;
}

int sweep_active_half(void *ctx)
{
	int zero = 0;
	struct counts *seen = counts.lookup(&zero);
	u32 at = seen ? slot(seen) : 0, *half = active.lookup(&zero);
	struct sweep *sweep = samples.lookup(&at);
	u64 differ = 0;
	u32 first;

	if (!seen || !sweep || !half)
		return 0;
	first = *half ? KEYS : 0; // read once: the whole sweep stays in this half
	sweep->start_ns = bpf_ktime_get_ns();
	for (u32 key = 0; key < KEYS; key++) {
		u32 place = first + key;
		u64 *generation = halves.lookup(&place);

		if (generation)
			note(sweep, key, *generation, &differ);
	}
	end(seen, sweep, differ);
	return 0;
}

int sweep_published(void *ctx)
{
	int zero = 0;
	struct counts *seen = counts.lookup(&zero);
	u32 at = seen ? slot(seen) : 0;
	struct sweep *sweep = samples.lookup(&at);
	void *published = outer.lookup(&zero); // once: the whole sweep stays in this map
	u64 differ = 0;

	if (!seen || !sweep || !published)
		return 0;
	sweep->start_ns = bpf_ktime_get_ns();
	for (u32 key = 0; key < KEYS; key++) {
		u32 place = key;
		u64 *generation = bpf_map_lookup_elem(published, &place);

		if (generation)
			note(sweep, key, *generation, &differ);
	}
	end(seen, sweep, differ);
	return 0;
}
