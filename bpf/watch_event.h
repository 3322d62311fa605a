/* SPDX-License-Identifier: GPL-2.0 */
/* What the programs of labkit.inspect.watch_hooks share: events that say who asked for which change of
 * which map, and what the kernel answered. Unlike trace_hook.h it tells of refused changes too, and of
 * several maps by one program.
 *
 * Constants: KEY_ROOM and VALUE_ROOM, bytes for the longest key and value of the watched maps (0: no
 * payload is told); RING_FD, COUNTS_FD; TARGETS_FD, a hash from map id to struct target, or ALL_MAPS.
 */
#ifndef WATCH_EVENT_H
#define WATCH_EVENT_H

#include <linux/errno.h>

#define RING ((void *)bpf_pseudo_fd(1, RING_FD))
#define COUNTS ((void *)bpf_pseudo_fd(1, COUNTS_FD))
#ifdef TARGETS_FD
#define TARGETS ((void *)bpf_pseudo_fd(1, TARGETS_FD))
#endif

#define WATCH_UPDATE 1
#define WATCH_DELETE 2

/* Bits of watch_event.lacks: what could not be read in the writer's memory, or was never there. */
#define LACKS_KEY 1
#define LACKS_VALUE 2

#define FRAMES 8
#define NOWHERE (1ULL << 63)  // no address of user space, nor are those that follow it

/* Whose memory the writer's key and value stand in. */
enum memory { OF_USER, OF_KERNEL };

/* What the elements of a map are for the caller of bpf(2). */
enum content { VALUES, MAP_DESCRIPTORS, PROGRAM_DESCRIPTORS };

/* labkit.inspect.watch_hooks.TARGET is the same layout. */
struct target {
	u32 key_size;
	u32 value_size;       // as a program hands it over
	u32 call_value_size;  // as bpf(2) takes it: a per-CPU map has a slot for each CPU
	u32 content;          // enum content
};

/* labkit.inspect.watch_hooks.event_dtype is the same layout. */
struct watch_event {
	u64 at_ns;       // when the kernel had answered
	u64 cgroup;      // of the thread in whose context it was done, and so are pid, tid and comm
	u32 map_id;
	u32 pid;
	u32 tid;
	s32 result;      // 0, or the negative errno
	u32 value_size;  // bytes of value that stand below
	u16 cpu;
	u8 kind;
	u8 lacks;
	char comm[16];
#ifdef WITH_STACK
	u64 frames[FRAMES];  // the kernel's return addresses, innermost first: they tell which program wrote
#endif
	u8 key[KEY_ROOM] __attribute__((aligned(8)));
	u8 value[VALUE_ROOM] __attribute__((aligned(8)));
};

/* Elements of COUNTS, a per-CPU array: of the events, and (dropped alone) of batches' elements that
 * nobody told of. The layout is that of struct change_counts (change_event.h).
 */
#define OF_EVENTS 0
#define OF_BATCHES 1

struct event_counts {
	u64 emitted;
	u64 dropped;
};

static inline void count_untold(u64 elements)
{
	u32 which = OF_BATCHES;
	struct event_counts *counts = bpf_map_lookup_elem_(COUNTS, &which);

	if (counts)
		__sync_fetch_and_add(&counts->dropped, elements);
}

/* Whether a map is watched, and if so how its elements are laid out. */
static inline bool watched(u32 id, struct target *of)
{
#ifdef TARGETS_FD
	struct target *found = bpf_map_lookup_elem_(TARGETS, &id);

	if (!found)
		return false;
	*of = *found;
#endif
	return true;
}

/* A size that never is more than the room; the verifier does not know it. Kernel 6.1 forgets what a
 * comparison told it of a number that the compiler has put aside before: so the same register is
 * compared and bounded, and whatever is put aside comes from there. The verifier goes on behind a
 * jump that is not taken first: there any size fits, so that it is done with the other way at once.
 */
static inline u64 bounded(u64 size, u32 room)
{
	asm volatile("if %[size] > %[room] goto +1\n"
		     "goto +1\n"
		     "%[size] = %[room]"
		     : [size] "+r"(size)
		     : [room] "i"(room));
	return size;
}

static inline long copy(enum memory memory, void *to, u64 size, u64 from)
{
	if (memory == OF_USER)
		return bpf_probe_read_user(to, size, (void *)from);
	return bpf_probe_read_kernel(to, size, (void *)from);
}

/* The id of what a descriptor of the current process means: programs and maps keep it elsewhere. */
static inline u32 id_of_content(enum content content, u32 fd)
{
	u64 at;
	u32 id = 0;

	if (content == MAP_DESCRIPTORS)
		return map_id(fd);
	at = behind_fd(fd);
	bpf_probe_read_kernel(&at, sizeof(at), (void *)(at + PROG_AUX_AT));
	bpf_probe_read_kernel(&id, sizeof(id), (void *)(at + AUX_ID_AT));
	return id;
}

/* One change that somebody asked for, with the kernel's answer. key and value may be NOWHERE:
 * not known, as nothing can be read there. The verifier walks through this for each element of a batch, so it has
 * as few branches as can be.
 */
static inline void tell_counted(struct event_counts *counts, void *ctx, enum content content, u32 id,
				u8 kind, enum memory memory, u64 key, u64 key_size, u64 value,
				u64 value_size, s64 result)
{
	struct watch_event *event = bpf_ringbuf_reserve(RING, sizeof(*event), 0);
	u64 who = bpf_get_current_pid_tgid(), failed;

	if (!event) {
		__sync_fetch_and_add(&counts->dropped, 1);
		return;
	}
	event->at_ns = bpf_ktime_get_ns();
	event->cgroup = bpf_get_current_cgroup_id();
	event->map_id = id;
	event->pid = who >> 32;
	event->tid = who;
	event->result = result;
	event->value_size = 0;
	event->cpu = bpf_get_smp_processor_id();
	event->kind = kind;
	event->lacks = 0;
	bpf_get_current_comm(event->comm, sizeof(event->comm));
#ifdef WITH_STACK
	bpf_probe_read_kernel(event->frames, sizeof(event->frames), NULL);  // zeros
	bpf_get_stack(ctx, event->frames, sizeof(event->frames), 0);
#endif
#if KEY_ROOM
	failed = copy(memory, event->key, key_size, key);
	event->lacks |= LACKS_KEY & failed >> 32;
#endif
#if VALUE_ROOM
	failed = copy(memory, event->value, value_size, value);
	event->lacks |= LACKS_VALUE & failed >> 32;
	event->value_size = value_size & ~(failed >> 32);
#if VALUE_ROOM >= 4
	if (content != VALUES) {
		u32 number = 0;

		copy(memory, &number, sizeof(number), value);
		number = id_of_content(content, number);
		bpf_probe_read_kernel(event->value, sizeof(number), &number);
	}
#endif
#endif
	__sync_fetch_and_add(&counts->emitted, 1);
	bpf_ringbuf_submit(event, 0);
}

static inline void tell(void *ctx, struct target *of, u32 id, u8 kind, enum memory memory, u64 key,
			u64 value, u32 value_size, s64 result)
{
	u32 which = OF_EVENTS;
	struct event_counts *counts = bpf_map_lookup_elem_(COUNTS, &which);

	if (counts)
		tell_counted(counts, ctx, of->content, id, kind, memory, key,
			     bounded(of->key_size, KEY_ROOM), value,
			     bounded(value_size, VALUE_ROOM), result);
}

/* A batch of user space, and how far we are: the arrays of keys and values are in user memory. */
struct batch {
	struct target of;
	u32 id;
	u32 kind;
	u64 keys;
	u64 values;  // where there are none, an address that nobody can read from on
	u32 count;  // of the elements that were changed
	u32 told;
};

#define BATCH_STEP 128  // elements that one run of a program walks through

/* Tell of the next elements of a batch. */
static inline void tell_next(void *ctx, struct batch *batch)
{
	u32 which = OF_EVENTS, first = batch->told, left = batch->count - first;
	struct event_counts *counts = bpf_map_lookup_elem_(COUNTS, &which);
	u64 keys = batch->keys, values = batch->values;
	u64 key_size = bounded(batch->of.key_size, KEY_ROOM);
	u64 value_size = bounded(batch->of.call_value_size, VALUE_ROOM);

	if (!counts)
		return;
	for (u32 i = 0; i < BATCH_STEP; i++) {
		u64 at = first + i;

		if (i >= left)
			break;
		// Where there are no values, what stands at these addresses cannot be read.
		tell_counted(counts, ctx, batch->of.content, batch->id, batch->kind, OF_USER,
			     keys + at * key_size, key_size, values + at * value_size, value_size,
			     0);
	}
	batch->told = first + (left < BATCH_STEP ? left : BATCH_STEP);
}

#endif
