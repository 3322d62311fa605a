/* SPDX-License-Identifier: GPL-2.0 */
/* How a program tells followers of a change that it made: labkit.sync.ring_events reads this.
 *
 * For bcc's dialect of C, and for libbpf: there include <linux/bpf.h> (or vmlinux.h) and
 * <bpf/bpf_helpers.h> before it. Its types are those of the kernel's user space headers (__u64), so
 * that it needs no typedef of yours. Before including it define
 *
 *   KEY, VALUE    types of the map
 *   RING, COUNTS  the ring buffer, and a per-CPU array of struct change_counts, as bpf_* calls take
 *                 them: &changes, &counts with libbpf
 *   PROGRAM       a number from 0 on that no other program of COUNTS has
 *   WAKEUP        as in wakeup.h; without it the kernel's own rule
 *
 * What is local here begins with ce_: RING, COUNTS and PROGRAM may name anything else of yours.
 */
#ifndef CHANGE_EVENT_H
#define CHANGE_EVENT_H

#include "wakeup.h"

#define CHANGE_UPDATE 1
#define CHANGE_DELETE 2

#ifdef __BPF_HELPERS__  // the guard of <bpf/bpf_helpers.h>
#define ce_lookup bpf_map_lookup_elem
#else
#define ce_lookup bpf_map_lookup_elem_
#endif

/* labkit.sync.changes.event_dtype is the same layout. In words of C, as bcc's event(data) knows no __u64. */
struct change_event {
	unsigned long long seq;          // how many changes this program had produced on this CPU before
	unsigned long long version;      // of the key; a delete has one of its own
	unsigned long long committed_ns; // when the map had taken the change
	unsigned char kind;
	unsigned char program;
	unsigned short cpu;
	unsigned int dropped;            // how many of those that it had produced before found no room
	KEY key __attribute__((aligned(8)));
	VALUE value __attribute__((aligned(8)));
};

/* An element of COUNTS, a per-CPU array: produced = emitted + dropped, at any moment. */
struct change_counts {
	__u64 emitted;
	__u64 dropped;
};

/* Changes that no event tells of: the follower sees the count move, and reads the map instead. */
static inline void count_dropped(__u64 ce_changes)
{
	__u32 ce_program = PROGRAM;
	struct change_counts *ce_counts = ce_lookup(COUNTS, &ce_program);

	if (ce_counts)
		__sync_fetch_and_add(&ce_counts->dropped, ce_changes);
}

/* An event of which all but key and value stands; NULL, and counted, where it finds no room. */
static inline struct change_event *begin_change(struct change_counts *ce_counts, __u8 ce_kind,
						__u64 ce_version)
{
	struct change_event *ce_event = bpf_ringbuf_reserve(RING, sizeof(*ce_event), 0);

	if (!ce_event) {
		__sync_fetch_and_add(&ce_counts->dropped, 1);
		return (void *)0;
	}
	ce_event->seq = ce_counts->emitted + ce_counts->dropped;
	ce_event->version = ce_version;
	ce_event->committed_ns = bpf_ktime_get_ns();
	ce_event->kind = ce_kind;
	ce_event->program = PROGRAM;
	ce_event->cpu = bpf_get_smp_processor_id();
	ce_event->dropped = ce_counts->dropped;
	return ce_event;
}

static inline void end_change(struct change_counts *ce_counts, struct change_event *ce_event)
{
	__u64 ce_seq = ce_event->seq;

	__sync_fetch_and_add(&ce_counts->emitted, 1);
	bpf_ringbuf_submit(ce_event, wakeup(ce_seq));
}

/* Call it once the map has taken the change; ce_value is NULL for a delete. Dropped is what finds no
 * room: the follower sees the count move, and reads the map instead.
 */
static inline void emit_change(__u8 ce_kind, KEY *ce_key, VALUE *ce_value, __u64 ce_version)
{
	__u32 ce_program = PROGRAM;
	struct change_counts *ce_counts = ce_lookup(COUNTS, &ce_program);
	struct change_event *ce_event;

	if (!ce_counts)
		return;
	ce_event = begin_change(ce_counts, ce_kind, ce_version);
	if (!ce_event)
		return;
	ce_event->key = *ce_key;
	if (ce_value)
		ce_event->value = *ce_value;
	else
		__builtin_memset(&ce_event->value, 0, sizeof(ce_event->value));
	end_change(ce_counts, ce_event);
}

#endif
