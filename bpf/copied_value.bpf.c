// SPDX-License-Identifier: GPL-2.0
// Programs that run for long and read their policy many times, each by another way.

#define MOST_READS 256
#define MOST_STEPS 500 // bounds the loop for the verifier; the clock ends it earlier
#define PIECE_BYTES (1 << 22)

enum way {
	COPY,         // looked up once, copied to the stack
	POINTER,      // looked up once, read through the pointer
	LOOKUP,       // looked up for each read
	INNER_HELD,   // inner map looked up once, its element for each read
	INNER_LOOKUP, // inner map looked up for each read
};

struct read {
	u64 start_ns;
	u64 end_ns;
	u64 version;
};

struct course {
	u64 period_ns;  // between two reads
	u64 least_ns;   // how long to run
	u64 longest_ns; // and how long to wait for the update's return, at most
	u64 began_ns;
	u64 ended_ns;
	u64 reads;
};

struct piece {
	char bytes[PIECE_BYTES];
};

BPF_ARRAY(policy, u64, 1);
BPF_ARRAY(inner, u64, 1);
BPF_ARRAY_OF_MAPS(outer, "inner", 1);
BPF_ARRAY(reads, struct read, MOST_READS);
BPF_ARRAY(course, struct course, 1);
BPF_ARRAY(returned, u64, 1); // set by user space once its update has returned
BPF_ARRAY(work, struct piece, 2);

static inline int run_long(enum way way)
{
	u32 zero = 0, one = 1, number = 0;
	u64 began = bpf_ktime_get_ns(), now, next = began, copied = 0;
	u64 *value = NULL;
	void *map = NULL;
	struct course *plan = course.lookup(&zero);
	volatile u64 *update_returned = returned.lookup(&zero);
	struct piece *from = work.lookup(&zero), *to = work.lookup(&one);

	if (!plan || !update_returned || !from || !to)
		return 0;
	if (way == COPY || way == POINTER) {
		value = policy.lookup(&zero);
		if (!value)
			return 0;
		copied = *value;
	}
	if (way == INNER_HELD) {
		map = outer.lookup(&zero);
		if (!map)
			return 0;
	}
	plan->began_ns = began;
	for (int step = 0; step < MOST_STEPS; step++) {
		now = bpf_ktime_get_ns();
		if (now - began >= plan->least_ns &&
		    (*update_returned || now - began >= plan->longest_ns))
			break;
		if (now >= next && number < MOST_READS) {
			struct read *read = reads.lookup(&number);

			if (way == LOOKUP)
				value = policy.lookup(&zero);
			if (way == INNER_LOOKUP) {
				map = outer.lookup(&zero);
				if (!map)
					break;
			}
			if (way == INNER_HELD || way == INNER_LOOKUP)
				value = bpf_map_lookup_elem(map, &zero);
			if (!read || (way != COPY && !value))
				break;
			read->start_ns = now;
			// volatile: the compiler must not make a copy of what is read by pointer.
			read->version = way == COPY ? copied : *(volatile u64 *)value;
			read->end_ns = bpf_ktime_get_ns();
			number++;
			next += plan->period_ns;
		}
		// Work that takes a few ms, and that the verifier sees as no loop.
#pragma unroll
		for (int piece = 0; piece < 16; piece++)
			bpf_probe_read_kernel(to, sizeof(*to), from);
	}
	plan->reads = number;
	plan->ended_ns = bpf_ktime_get_ns();
	return 0;
}

int copy_held(void *ctx)
{
	return run_long(COPY);
}

int pointer_held(void *ctx)
{
	return run_long(POINTER);
}

int looked_up(void *ctx)
{
	return run_long(LOOKUP);
}

int inner_held(void *ctx)
{
	return run_long(INNER_HELD);
}

int inner_looked_up(void *ctx)
{
	return run_long(INNER_LOOKUP);
}
