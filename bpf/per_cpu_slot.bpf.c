// SPDX-License-Identifier: GPL-2.0
// Writes, reads and counts in a map that has one value, or one value for each CPU.

BPF_TABLE(KIND, u32, u64, versions, 1);
BPF_TABLE(KIND, u32, u64, counts, 1);

// Two programs that user space runs on a CPU of its choice; the argument goes in and out.
int write_version(u64 *version)
{
	u32 zero = 0;
	u64 *here = versions.lookup(&zero);

	// In a per-CPU map this is the slot of the CPU that runs the program, and no other.
	if (here)
		*here = *version;
	return 0;
}

int read_version(u64 *version)
{
	u32 zero = 0;
	u64 *here = versions.lookup(&zero);

	if (here)
		*version = *here;
	return 0;
}

int count_here(u64 *argument)
{
	u32 zero = 0;
	u64 *here = counts.lookup(&zero);

	if (here)
		__sync_fetch_and_add(here, 1);
	return 0;
}

// The same count at kernel speed, as an event source.
int count_event(void *ctx)
{
	u32 zero = 0;
	u64 *here = counts.lookup(&zero);

	if (here)
		__sync_fetch_and_add(here, 1);
	return 0;
}
