// SPDX-License-Identifier: GPL-2.0
// Holds a record back while the one behind it is already handed over: a reader on another CPU
// meets a busy record in the middle of the ring, as with two producers of which one is slow.

#include "ring_event.h"

#define RING ((void *)bpf_pseudo_fd(1, RING_FD))

struct state {
	u64 seq;
	u64 dropped;
};

BPF_ARRAY(state, struct state, 1);

int hold(void *ctx)
{
	struct event *first, *second;
	int zero = 0;
	struct state *s = state.lookup(&zero);

	if (!s)
		return 0;
	first = bpf_ringbuf_reserve(RING, sizeof(struct event), 0);
	if (!first) {
		s->dropped += 1;
		return 0;
	}
	first->seq = s->seq++;
	first->intended_ns = 0;
	second = bpf_ringbuf_reserve(RING, sizeof(struct event), 0);
	if (second) {
		second->seq = s->seq++;
		second->intended_ns = 1;
		bpf_ringbuf_submit(second, 0);
	}
	for (int i = 0; i < HELD_FOR; i++)
		first->committed_ns = bpf_ktime_get_ns();
	first->value = HELD_FOR;  // written last: a reader that takes a busy record does not see it
	bpf_ringbuf_submit(first, 0);
	return 0;
}
