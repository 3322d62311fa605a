// SPDX-License-Identifier: GPL-2.0
// A ring buffer in the way of bcc's own examples, so that bcc's own consumer can be measured.

#include "ring_event.h"

BPF_RINGBUF_OUTPUT(events, PAGES);

// bcc learns the layout of an event, for events.event(data) in Python, from a call such as this.
int announce(void *ctx)
{
	struct event event = {};

	events.ringbuf_output(&event, sizeof(event), 0);
	return 0;
}
