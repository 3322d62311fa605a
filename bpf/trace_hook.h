/* SPDX-License-Identifier: GPL-2.0 */
/* What the programs of labkit.sync.trace_hook share: events of changes that others made. */
#ifndef TRACE_HOOK_H
#define TRACE_HOOK_H

#include <linux/errno.h>

struct key {
	u8 bytes[KEY_SIZE];
};

struct value {
	u8 bytes[VALUE_SIZE];
};

#define KEY struct key
#define VALUE struct value
#define PROGRAM 0
#define RING ((void *)bpf_pseudo_fd(1, RING_FD))
#define COUNTS ((void *)bpf_pseudo_fd(1, COUNTS_FD))

#include "change_event.h"

#define BATCH_MOST 512  // elements of a batch that one run of a program walks through

/* Whose memory the writer's key and value stand in. */
enum memory { OF_USER, OF_KERNEL };

static inline long copy(enum memory memory, void *to, u32 size, u64 from)
{
	if (memory == OF_USER)
		return bpf_probe_read_user(to, size, (void *)from);
	return bpf_probe_read_kernel(to, size, (void *)from);
}

/* A change that somebody else made. The version stands in the value; a delete that gives no value
 * back (value is 0) has version 0: none is known.
 */
static inline void emit(u8 kind, enum memory memory, u64 key, u64 value)
{
	u32 program = PROGRAM;
	struct change_counts *counts = bpf_map_lookup_elem_(COUNTS, &program);
	struct change_event *event;

	if (!counts)
		return;
	event = begin_change(counts, kind, 0);
	if (!event)
		return;
	if (copy(memory, &event->key, sizeof(event->key), key) ||
	    (kind == CHANGE_UPDATE && copy(memory, &event->value, sizeof(event->value), value))) {
		// The writer's memory is gone already, or another thread of it has changed it.
		__sync_fetch_and_add(&counts->dropped, 1);
		bpf_ringbuf_discard(event, BPF_RB_NO_WAKEUP);
		return;
	}
	if (kind == CHANGE_DELETE)
		// A read that fails leaves zeros, of any size; memset is a call that bpf does not have.
		bpf_probe_read_kernel(&event->value, sizeof(event->value), NULL);
	if (value)
		copy(memory, &event->version, VERSION_SIZE, value + VERSION_AT);
	end_change(counts, event);
}

/* Arrays of keys and values in user memory, as the batch calls take them; values may be 0. */
static inline void emit_batch(u8 kind, u64 keys, u64 values, u32 count)
{
	for (u32 i = 0; i < BATCH_MOST; i++) {
		if (i >= count)
			return;
		emit(kind, OF_USER, keys + i * KEY_SIZE, values ? values + i * USER_VALUE_SIZE : 0);
	}
	if (count > BATCH_MOST)
		count_dropped(count - BATCH_MOST);
}

#endif
