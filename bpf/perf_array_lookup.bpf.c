// SPDX-License-Identifier: GPL-2.0
// Sends the same event through a perf event array and a ring buffer, and keeps the newest in an
// array.

struct event {
	u64 seq;
	u64 value;
};

BPF_PERF_OUTPUT(perf);
BPF_RINGBUF_OUTPUT(ring, 16);
BPF_ARRAY(newest, u64, 1);

int send(struct __sk_buff *packet)
{
	struct event event = {};
	u32 zero = 0;
	u64 *seq = newest.lookup(&zero);

	if (!seq)
		return 0;
	event.seq = ++*seq;
	event.value = event.seq * 3;
	perf.perf_submit(packet, &event, sizeof(event));
	ring.ringbuf_output(&event, sizeof(event), 0);
	return 0;
}
