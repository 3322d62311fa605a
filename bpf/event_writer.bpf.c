// SPDX-License-Identifier: GPL-2.0
// A writer that cooperates: it changes a map by a script, what is due and BURST operations a run at
// most, and emits each change from the same run. Map, ring and counters are made by others and
// named by their descriptors.

struct value {
	u64 word[VALUE_WORDS];  // each one is the version: a torn value shows
};

// Two programs that write one key at the same time must agree on an order: here the lock in the
// value gives it, and the number of the version too. Their events may still overtake each other.
struct locked_value {
	struct bpf_spin_lock lock;
	u32 spare;
	u64 version;
};

#define KEY u64
#define VALUE struct value
#define TABLE ((void *)bpf_pseudo_fd(1, TABLE_FD))
#define RING ((void *)bpf_pseudo_fd(1, RING_FD))
#define COUNTS ((void *)bpf_pseudo_fd(1, COUNTS_FD))
#define SCRIPT ((void *)bpf_pseudo_fd(1, SCRIPT_FD))
#define CONTROL ((void *)bpf_pseudo_fd(1, CONTROL_FD))

#include "change_event.h"

// labkit.load.event_writer.OPERATION is the same layout.
struct operation {
	u64 key;
	u64 version;
	u64 due_ns;    // after start_ns; 0: at once
	u64 start_ns;  // filled in, as the ones below
	u64 end_ns;
	u32 kind;
	s32 outcome;   // 0 or minus the errno
	u32 unread;    // WATCHED: bytes in the ring by then that nobody has read
	u32 dropped;   // WATCHED: changes of this program and CPU that found no room by then
};

// labkit.load.event_writer.CONTROL is the same layout.
struct control {
	u64 done;            // operations so far, all rounds together
	u64 limit;           // stop there
	u64 start_ns;
	u64 at;              // place in the script
	u64 round;           // how often the script was gone through
	u64 round_ns;        // the schedule's length
	u64 round_versions;  // what a round adds to every version
};

#ifdef LOCKED
static inline s32 write_locked(u64 *key, struct value *value, u64 *version)
{
	struct locked_value *there = bpf_map_lookup_elem_(TABLE, key);

	if (!there)
		return -2;  // ENOENT
	bpf_spin_lock(&there->lock);
	*version = ++there->version;
	bpf_spin_unlock(&there->lock);
	value->word[0] = 0;
	value->word[1] = *version;
	return 0;
}
#endif

// The event of one change; with LOSE_EVERY, each so many-th one finds no room, as in a full ring.
static inline void tell(struct control *control, u8 kind, u64 *key, struct value *value, u64 version)
{
#ifdef LOSE_EVERY
	if (control->done % LOSE_EVERY == LOSE_EVERY - 1) {
		count_dropped(1);
		return;
	}
#endif
	emit_change(kind, key, value, version);
}

#ifdef WATCHED
static inline void watch(struct operation *op)
{
	u32 program = PROGRAM;
	struct change_counts *counts = bpf_map_lookup_elem_(COUNTS, &program);

	op->unread = bpf_ringbuf_query(RING, BPF_RB_AVAIL_DATA);
	if (counts)
		op->dropped = counts->dropped;
}
#endif

BPF_PERCPU_ARRAY(scratch, struct value, 1);  // 1024 bytes are too many for a program's stack

// One operation, if it is due; answers whether it was.
static inline int write_one(struct control *control, struct value *value)
{
	struct operation *op;
	u64 now, version, key;
	u32 at;
	s32 outcome;

	if (control->done >= control->limit)
		return 0;
	at = control->at;
	op = bpf_map_lookup_elem_(SCRIPT, &at);
	if (!op)
		return 0;
	now = bpf_ktime_get_ns();
	if (op->due_ns && now < control->start_ns + control->round * control->round_ns + op->due_ns)
		return 0;
	op->start_ns = now;
	key = op->key;
	version = op->version + control->round * control->round_versions;
	if (op->kind == CHANGE_DELETE) {
		outcome = bpf_map_delete_elem_(TABLE, &key);
		if (!outcome)
			tell(control, CHANGE_DELETE, &key, NULL, version);
	} else {
#ifdef LOCKED
		outcome = write_locked(&key, value, &version);
		op->version = version;
#else
		for (int i = 0; i < VALUE_WORDS; i++)
			value->word[i] = version;
		outcome = bpf_map_update_elem_(TABLE, &key, value, BPF_ANY);
#endif
		if (!outcome)
			tell(control, CHANGE_UPDATE, &key, value, version);
	}
	op->outcome = outcome;
	op->end_ns = bpf_ktime_get_ns();
#ifdef WATCHED
	watch(op);
#endif
	control->at++;
	if (control->at == SCRIPT_OPERATIONS) {
		control->at = 0;
		control->round++;
	}
	control->done++;
	return 1;
}

int write_next(void *ctx)
{
	int zero = 0;
	struct control *control = bpf_map_lookup_elem_(CONTROL, &zero);
	struct value *value = scratch.lookup(&zero);

	if (!control || !value)
		return 0;
	for (int i = 0; i < BURST; i++)
		if (!write_one(control, value))
			break;
	return 0;
}
