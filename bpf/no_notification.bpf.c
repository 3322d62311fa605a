// SPDX-License-Identifier: GPL-2.0
// Changes a map of each kind, and sends an event that tells of it.

struct event {
	u64 version;
	u64 sent_ns;
};

BPF_ARRAY(array, u64, 1);
BPF_HASH(hash, u32, u64, 8);
BPF_TABLE("lru_hash", u32, u64, lru_hash, 8);
BPF_PERCPU_ARRAY(percpu_array, u64, 1);
BPF_TABLE("percpu_hash", u32, u64, percpu_hash, 8);
BPF_ARRAY(versions, u64, 1);
BPF_RINGBUF_OUTPUT(events, 1);

int change(void *ctx)
{
	struct event event = {};
	u64 *version;
	u32 key = 0;

	version = versions.lookup(&key);
	if (!version)
		return 0;
	event.version = ++*version;
	array.update(&key, version);
	hash.update(&key, version);
	lru_hash.update(&key, version);
	percpu_array.update(&key, version);
	percpu_hash.update(&key, version);
	event.sent_ns = bpf_ktime_get_ns();
	events.ringbuf_output(&event, sizeof(event), 0);
	return 0;
}
