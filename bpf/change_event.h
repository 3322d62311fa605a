/* SPDX-License-Identifier: GPL-2.0 */
/* How a program tells followers of a change that it made: labkit.sync.ring_events reads this. */
/* Before including it define KEY and VALUE, the types of the map, and, as maps, RING and COUNTS; */
/* WAKEUP as in wakeup.h, and PROGRAM, a number from 0 on that no other program of COUNTS has. */
#ifndef CHANGE_EVENT_H
#define CHANGE_EVENT_H

#include "wakeup.h"

#define CHANGE_UPDATE 1
#define CHANGE_DELETE 2

/* labkit.sync.changes.event_dtype is the same layout. */
struct change_event {
	u64 seq;           // how many changes this program had produced on this CPU before
	u64 version;       // of the key; a delete has one of its own
	u64 committed_ns;  // when the map had taken the change
	u8 kind;
	u8 program;
	u16 cpu;
	u32 dropped;       // how many of those that it had produced before found no room
	KEY key __attribute__((aligned(8)));
	VALUE value __attribute__((aligned(8)));
};

/* An element of COUNTS, a per-CPU array: produced = emitted + dropped, at any moment. */
struct change_counts {
	u64 emitted;
	u64 dropped;
};

/* Changes that no event tells of: the follower sees the count move, and reads the map instead. */
static inline void count_dropped(u64 changes)
{
	u32 program = PROGRAM;
	struct change_counts *counts = bpf_map_lookup_elem_(COUNTS, &program);

	if (counts)
		__sync_fetch_and_add(&counts->dropped, changes);
}

/* An event of which all but key and value stands; NULL, and counted, where it finds no room. */
static inline struct change_event *begin_change(struct change_counts *counts, u8 kind, u64 version)
{
	struct change_event *event = bpf_ringbuf_reserve(RING, sizeof(*event), 0);

	if (!event) {
		__sync_fetch_and_add(&counts->dropped, 1);
		return NULL;
	}
	event->seq = counts->emitted + counts->dropped;
	event->version = version;
	event->committed_ns = bpf_ktime_get_ns();
	event->kind = kind;
	event->program = PROGRAM;
	event->cpu = bpf_get_smp_processor_id();
	event->dropped = counts->dropped;
	return event;
}

static inline void end_change(struct change_counts *counts, struct change_event *event)
{
	u64 seq = event->seq;

	__sync_fetch_and_add(&counts->emitted, 1);
	bpf_ringbuf_submit(event, wakeup(seq));
}

/* Call it once the map has taken the change; value is NULL for a delete. Dropped is what finds no
 * room: the follower sees the count move, and reads the map instead.
 */
static inline void emit_change(u8 kind, KEY *key, VALUE *value, u64 version)
{
	u32 program = PROGRAM;
	struct change_counts *counts = bpf_map_lookup_elem_(COUNTS, &program);
	struct change_event *event;

	if (!counts)
		return;
	event = begin_change(counts, kind, version);
	if (!event)
		return;
	event->key = *key;
	if (value)
		event->value = *value;
	else
		__builtin_memset(&event->value, 0, sizeof(event->value));
	end_change(counts, event);
}

#endif
