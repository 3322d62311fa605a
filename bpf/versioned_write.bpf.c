// SPDX-License-Identifier: GPL-2.0
// A writer that cooperates: it changes the map and emits the change in the same run.

struct change {
	u64 version;
	u64 committed_ns;
};

struct counts {
	u64 produced;
	u64 dropped;
};

BPF_ARRAY(current, struct change, 1);
BPF_ARRAY(counts, struct counts, 1);
BPF_RINGBUF_OUTPUT(changes, 16);

int write_version(u64 *version)
{
	struct change *slot, *event;
	struct counts *seen;
	int zero = 0;

	slot = current.lookup(&zero);
	seen = counts.lookup(&zero);
	if (!slot || !seen)
		return 1;
	slot->committed_ns = bpf_ktime_get_ns();
	// The version last: an eight-byte store is never torn, and who sees it may use it.
	slot->version = *version;
	seen->produced++;
	event = changes.ringbuf_reserve(sizeof(struct change));
	if (!event) {
		seen->dropped++;
		return 0;
	}
	event->version = slot->version;
	event->committed_ns = slot->committed_ns;
	changes.ringbuf_submit(event, 0);
	return 0;
}
