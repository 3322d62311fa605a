// SPDX-License-Identifier: GPL-2.0
// A writer that cooperates, as fast as one CPU can: it stores into the elements of an array map in
// turns what is due by its rate, BURST changes a run at most, and emits each one. Unlike
// event_writer.bpf.c it follows no script and takes down no times of single changes: both cost more
// than the change.

#define KEY u32
#define VALUE u64
#define TABLE ((void *)bpf_pseudo_fd(1, TABLE_FD))
#define RING ((void *)bpf_pseudo_fd(1, RING_FD))
#define COUNTS ((void *)bpf_pseudo_fd(1, COUNTS_FD))
#define CONTROL ((void *)bpf_pseudo_fd(1, CONTROL_FD))
#define PROGRAM 0
#define WAKEUP WAKEUP_NEVER

#include "change_event.h"

#define SECOND_NS 1000000000ULL

// labkit.load.steady_writer.CONTROL is the same layout.
struct control {
	u64 done;        // changes since start_ns
	u64 limit;       // stop there
	u64 per_second;  // from start_ns on
	u64 start_ns;
	u64 end_ns;      // when the last one was made
	u64 version;     // of the elements from key on
	u64 key;         // the next one
};

static inline int write_one(struct control *control)
{
	u32 key = control->key;
	u64 version = control->version + 1, *value = bpf_map_lookup_elem_(TABLE, &key);

	if (!value)
		return 0;
	*value = version;
	emit_change(CHANGE_UPDATE, &key, value, version);
	control->done++;
	control->key++;
	if (control->key == KEYS) {
		control->key = 0;
		control->version = version;
	}
	return 1;
}

int write_due(void *ctx)
{
	int zero = 0;
	struct control *control = bpf_map_lookup_elem_(CONTROL, &zero);
	u64 now = bpf_ktime_get_ns(), due;

	if (!control || now < control->start_ns || control->done >= control->limit)
		return 0;
	due = 1 + (now - control->start_ns) * control->per_second / SECOND_NS;
	if (due > control->limit)
		due = control->limit;
	for (int i = 0; i < BURST && control->done < due; i++)
		if (!write_one(control))
			return 0;
	if (control->done == control->limit)
		control->end_ns = bpf_ktime_get_ns();
	return 0;
}
