// SPDX-License-Identifier: GPL-2.0
// A ring for changes in the way of bcc's own examples, so that a follower can be put upon bcc's own
// consumer and compared.

#define KEY u32
#define VALUE u64
#define WAKEUP WAKEUP_DEFAULT
#define PROGRAM 0

BPF_RINGBUF_OUTPUT(events, PAGES);

#define RING ((void *)0)
#define COUNTS ((void *)0)
#include "change_event.h"

// bcc learns the layout of an event, for events.event(data) in Python, from a call such as this.
int announce(void *ctx)
{
	struct change_event event = {};

	events.ringbuf_output(&event, sizeof(event), 0);
	return 0;
}
