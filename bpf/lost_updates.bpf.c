// SPDX-License-Identifier: GPL-2.0
// One counter, incremented in every way that a program has. Two CPUs run the same function at
// once; what the counter lacks afterwards was lost.

struct locked_counter {
	struct bpf_spin_lock lock;
	u64 count;
};

BPF_ARRAY(counter, u64, 1);
BPF_PERCPU_ARRAY(counter_per_cpu, u64, 1);
BPF_ARRAY(counter_locked, struct locked_counter, 1);

// Every function looks the counter up for each increment, as a program does that counts one
// event, and does so INCREMENTS times a run, so that the cost of starting a run fades.

// The floor: the lookup and the loop alone.
int look_up_only(void *ctx)
{
	u64 seen = 0;
	int zero = 0;

	for (u32 i = 0; i < INCREMENTS; i++) {
		volatile u64 *count = counter.lookup(&zero);

		if (!count)
			return 0;
		seen += *count;
	}
	return seen & 1;
}

// volatile: or the compiler would add INCREMENTS at once, which is another program.
int plain_increment(void *ctx)
{
	int zero = 0;

	for (u32 i = 0; i < INCREMENTS; i++) {
		volatile u64 *count = counter.lookup(&zero);

		if (!count)
			return 0;
		*count += 1; // load, add, store: the other CPU's store in between is overwritten
	}
	return 0;
}

int look_up_and_update(void *ctx)
{
	int zero = 0;

	for (u32 i = 0; i < INCREMENTS; i++) {
		u64 *count = counter.lookup(&zero), next;

		if (!count)
			return 0;
		next = *count + 1;
		counter.update(&zero, &next);
	}
	return 0;
}

int atomic_add(void *ctx)
{
	int zero = 0;

	for (u32 i = 0; i < INCREMENTS; i++) {
		u64 *count = counter.lookup(&zero);

		if (!count)
			return 0;
		__sync_fetch_and_add(count, 1);
	}
	return 0;
}

int per_cpu_increment(void *ctx)
{
	int zero = 0;

	for (u32 i = 0; i < INCREMENTS; i++) {
		volatile u64 *count = counter_per_cpu.lookup(&zero);

		if (!count)
			return 0;
		*count += 1;
	}
	return 0;
}

int locked_increment(void *ctx)
{
	int zero = 0;

	for (u32 i = 0; i < INCREMENTS; i++) {
		struct locked_counter *counter = counter_locked.lookup(&zero);

		if (!counter)
			return 0;
		bpf_spin_lock(&counter->lock);
		counter->count++;
		bpf_spin_unlock(&counter->lock);
	}
	return 0;
}

// For processes that would rather not read, add and write back themselves.
int add_one(void *ctx)
{
	int zero = 0;
	u64 *count = counter.lookup(&zero);

	if (count)
		__sync_fetch_and_add(count, 1);
	return 0;
}
