// SPDX-License-Identifier: GPL-2.0
// Looks at one key of a map at each tick of a clock, as a program that uses the map would, and tells
// of each version that differs from the one before.

struct key {
	u8 bytes[KEY_SIZE];
};

// labkit.inspect.canary.SIGHTING is the same layout.
struct sighting {
	u64 version;
	u64 seen_ns;
};

#define TABLE ((void *)bpf_pseudo_fd(1, TABLE_FD))

#if VERSION_SIZE == 1
#define VERSION u8
#elif VERSION_SIZE == 2
#define VERSION u16
#elif VERSION_SIZE == 4
#define VERSION u32
#else
#define VERSION u64
#endif

BPF_ARRAY(wanted, struct key, 1);
BPF_ARRAY(newest, struct sighting, 1);
BPF_RINGBUF_OUTPUT(sightings, 16);

int look(void *ctx)
{
	u32 zero = 0;
	struct key *key = wanted.lookup(&zero);
	struct sighting *last = newest.lookup(&zero);
	struct sighting now;
	void *value;

	if (!key || !last)
		return 0;
	value = bpf_map_lookup_elem_(TABLE, key);
	if (!value)
		return 0;
	now.version = *(VERSION *)(value + VERSION_AT);
	now.seen_ns = bpf_ktime_get_ns();
	// What finds no room is told at the next tick.
	if (now.version != last->version && !sightings.ringbuf_output(&now, sizeof(now), 0))
		*last = now;
	return 0;
}
