// SPDX-License-Identifier: GPL-2.0
// Produces events into any ring buffer, at full speed or on a schedule, and counts them exactly.

#include "ring_event.h"

// The ring is made by others and named by its descriptor: several consumers are compared on one
// ring, and bpf_ringbuf_query() needs the map itself, which bcc's table methods do not give.
#define RING ((void *)bpf_pseudo_fd(1, RING_FD))

#include "wakeup.h"

struct control {
	u64 produced;     // tried: delivered + dropped
	u64 dropped;      // no room in the ring
	u64 discarded;    // reserved, then given back
	u64 target;       // stop when so many were produced
	u64 start_ns;     // schedule: the first event
	u64 interval_ns;  // schedule: distance of two events
};

BPF_ARRAY(control, struct control, 1);

static void emit(struct control *c, u64 intended_ns, u64 committed_ns)
{
	u64 seq = c->produced++;
	struct event *event = bpf_ringbuf_reserve(RING, sizeof(struct event), 0);

	if (!event) {
		c->dropped++;
		return;
	}
	event->seq = seq;
	event->intended_ns = intended_ns;
	event->committed_ns = committed_ns;
	event->value = seq & 0xff;
#ifdef DISCARD_EVERY
	if (seq % DISCARD_EVERY == DISCARD_EVERY - 1) {
		c->discarded++;
		bpf_ringbuf_discard(event, BPF_RB_NO_WAKEUP);
		return;
	}
#endif
	bpf_ringbuf_submit(event, wakeup(seq));
}

// As fast as it goes: BURST events a run, so that the run itself costs little. Each carries its
// time, as events of a real program do.
int produce(void *ctx)
{
	int zero = 0;
	struct control *c = control.lookup(&zero);

	if (!c)
		return 0;
	for (int i = 0; i < BURST && c->produced < c->target; i++)
		emit(c, 0, bpf_ktime_get_ns());
	return 0;
}

// One event each time that the schedule is due. Open loop: an event that comes late, because the
// producer was kept from its CPU, keeps the time at which it was wanted.
int produce_on_schedule(void *ctx)
{
	u64 now = bpf_ktime_get_ns(), due;
	int zero = 0;
	struct control *c = control.lookup(&zero);

	if (!c || c->produced >= c->target)
		return 0;
	due = c->start_ns + c->produced * c->interval_ns;
	if (now >= due)
		emit(c, due, now);
	return 0;
}
