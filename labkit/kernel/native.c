/* SPDX-License-Identifier: Apache-2.0 */
/* The event path without an interpreter in its way: it waits for records of a ring, takes them,
 * follows their numbers, and applies changes to the rows of a replica.
 *
 * labkit/kernel/native.py compiles and loads it. All memory belongs to NumPy arrays of the caller;
 * nothing is allocated or remembered here. Each function says which Python code does the same: that
 * runs where this cannot be compiled, and the tests hold the two against each other.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <time.h>

typedef int64_t i64;
typedef uint32_t u32;
typedef uint64_t u64;
typedef uint8_t u8;

static u64 now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (u64)now.tv_sec * 1000000000 + (u64)now.tv_nsec;
}

/* -- a ring: labkit.kernel.ringbuf, kernel/bpf/ringbuf.c --------------------------------------- */

#define BUSY 0x80000000u
#define DISCARDED 0x40000000u
#define LENGTH (DISCARDED - 1)
#define HEADER 8u
#define BUSY_PAUSE_NS 50000
/* So often, in bytes, the producer gets room back. */
#define PIECE (1u << 16)

struct ring {
	_Atomic u64 *consumer;
	_Atomic u64 *producer;
	u8 *data;      // twice in a row
	u64 capacity;  // a power of two
	u64 position;  // where we read on
	u64 discarded;
	i64 refused;   // size of the record that ended the last batch since it is another one; or -1
	i64 fd;
};

static u64 slot_of(u64 payload)
{
	return (HEADER + payload + 7) & ~7ull;
}

/* Whatever somebody else wrote there as position: within the data, and aligned. */
static u8 *record_at(const struct ring *ring, u64 position)
{
	return ring->data + (position & (ring->capacity - 1) & ~7ull);
}

static u32 header_of(u8 *record)
{
	/* Acquires: what the producer wrote before it cleared the busy bit is seen after it. */
	return atomic_load_explicit((_Atomic u32 *)record, memory_order_acquire);
}

static int is_ready(struct ring *ring, int *busy)
{
	u64 position = atomic_load_explicit(ring->consumer, memory_order_relaxed);

	*busy = position != atomic_load_explicit(ring->producer, memory_order_acquire);
	return *busy && !(header_of(record_at(ring, position)) & BUSY);
}

/* The interpreter's lock, where the caller holds it: given back while nothing is touched. */
struct lock {
	void *(*give_back)(void);  // PyEval_SaveThread
	void (*take)(void *);      // PyEval_RestoreThread
};

/* 1 with a record, 0 without one in time, a negative error number after a signal. */
static int wait_until(struct ring *ring, u64 deadline, const struct lock *lock)
{
	struct pollfd asked = { .fd = (int)ring->fd, .events = POLLIN };
	int busy, answer;

	while (!is_ready(ring, &busy)) {
		i64 left = (i64)(deadline - now_ns());
		struct timespec sleep;
		void *held = NULL;

		if (left <= 0)
			return is_ready(ring, &busy);
		/* A record that is being written is data for the kernel, which would not sleep. */
		if (busy && left > BUSY_PAUSE_NS)
			left = BUSY_PAUSE_NS;
		sleep = (struct timespec){ .tv_sec = left / 1000000000, .tv_nsec = left % 1000000000 };
		/* Our last store of the position comes before the kernel's look at the ring. */
		atomic_thread_fence(memory_order_seq_cst);
		asked.revents = 0;
		if (lock)
			held = lock->give_back();
		answer = ppoll(&asked, !busy, &sleep, NULL) < 0 ? -errno : 0;
		if (lock)
			lock->take(held);
		if (answer)
			return answer;
		if (asked.revents & (POLLERR | POLLNVAL))
			return -EBADF;
	}
	return 1;
}

/* RingReader.wait. */
int lab_ring_wait(struct ring *ring, i64 timeout_ns)
{
	return wait_until(ring, now_ns() + (u64)timeout_ns, NULL);
}

/* Hands the room behind us back; -1 where somebody else has moved the consumer's position. */
static int hand_back(struct ring *ring, u64 position)
{
	if (atomic_load_explicit(ring->consumer, memory_order_relaxed) != ring->position)
		return -1;
	/* Releases: the copies are done when the producer sees it. A store takes the line from it. */
	if (position != ring->position)
		atomic_store_explicit(ring->consumer, position, memory_order_release);
	ring->position = position;
	return 0;
}

static inline u64 least(u64 one, u64 other)
{
	return one < other ? one : other;
}

/* What is larger has left the caches next to the CPU before anybody reads its copy. */
#ifndef NEAR
#define NEAR (1u << 20)
#endif

/* Stores past the caches, which need not fetch first what stood there: words where words stand. */
static inline void stream(u8 *to, const u8 *from, u64 size)
{
	for (u64 at = 0, word; at < size; at += 8) {
		memcpy(&word, from + at, 8);
#ifdef __clang__
		__builtin_nontemporal_store(word, (u64 *)(to + at));
#else
		memcpy(to + at, &word, 8);  // gcc compiles this for its sanitizers only
#endif
	}
}

/* Records of one size that stand ready in a row, so many at most, and to the end of the ring: how
 * many; each is copied a step behind the one before it, where there is a place for it.
 */
static inline u64 row_of(const struct ring *ring, u64 position, u64 size, u64 most, u8 *out,
			 u64 step, int far)
{
	const u64 slot = slot_of(size);
	u8 *record = record_at(ring, position);
	u64 done = 0;

	most = least(most, ((u64)(ring->data + ring->capacity - record) + slot - 1) / slot);
	/* One comparison tells that a record has this size, and is neither busy nor given back. */
	for (; done < most && header_of(record) == size; done++, record += slot, out += step)
		if (far)
			stream(out, record + HEADER, size);
		else if (step)
			memcpy(out, record + HEADER, size);
	return done;
}

/* The same; sizes that the compiler knows take no call. */
static u64 copy_row(const struct ring *ring, u64 position, u64 size, u64 most, u8 *out, u64 step,
		    int far)
{
	switch (size) {
	case 8: return row_of(ring, position, 8, most, out, step, far);
	case 16: return row_of(ring, position, 16, most, out, step, far);
	case 24: return row_of(ring, position, 24, most, out, step, far);
	case 32: return row_of(ring, position, 32, most, out, step, far);
	case 48: return row_of(ring, position, 48, most, out, step, far);
	default: return row_of(ring, position, size, most, out, step, far);
	}
}

/* Where a record of any size stands in the array that it was copied to. */
struct place {
	u32 start;
	u32 size;
};

/* Takes so many records at most. They all have one size; or, with room for their places, any, and
 * each begins where every type is aligned. A busy record ends the batch.
 */
static i64 take(struct ring *ring, u8 *out, u64 room, u64 most, u64 size, struct place *places)
{
	u64 end, position = ring->position, taken = 0, used = 0;
	int far;

	ring->refused = -1;
	if (hand_back(ring, position))
		return -1;
	end = atomic_load_explicit(ring->producer, memory_order_acquire);
	far = least(room, end - position) > NEAR && !((uintptr_t)out & 7);
	while (taken < most && position < end) {
		u32 header = header_of(record_at(ring, position));
		u64 length = header & LENGTH, slot = slot_of(length);
		u64 step = places ? slot - HEADER : size, row;
		int fits = places ? step <= room - used : length == size;

		if (slot > ring->capacity || !(fits || (places && (header & DISCARDED)))) {
			ring->refused = (i64)length;
			break;
		}
		if ((header & BUSY) || slot > end - position)
			break;
		if (header & DISCARDED) {
			ring->discarded++;
			position += slot;
		} else {
			row = least(end - position, PIECE + slot) / slot;
			row = least(row, least(most - taken, step ? (room - used) / step : most));
			row = copy_row(ring, position, length, row, out + used, step,
				       far && !(length & 7));
			for (u64 i = 0; places && i < row; i++) {
				struct place place = { (u32)(used + i * step), (u32)length };

				if (far)
					stream((u8 *)&places[taken + i], (u8 *)&place, sizeof(place));
				else
					places[taken + i] = place;
			}
			taken += row;
			used += row * step;
			position += row * slot;
		}
		if (position - ring->position >= PIECE && hand_back(ring, position))
			return -1;
	}
	if (far)
		atomic_thread_fence(memory_order_seq_cst);  // streams are in no order with other stores
	return hand_back(ring, position) ? -1 : (i64)taken;
}

/* RingReader.read: how many records were taken; -1: somebody else reads the ring. */
i64 lab_ring_take(struct ring *ring, u8 *out, u64 most, u64 size)
{
	return take(ring, out, most * size, most, size, NULL);
}

/* RingReader.in_place: how many records of this size stand ready in a row, so many at most; those
 * that were given back are passed in front of them, and end the row.
 */
i64 lab_ring_ready(struct ring *ring, u64 size, u64 most)
{
	u64 end, position = ring->position, slot = slot_of(size), ready = 0;

	ring->refused = -1;
	end = atomic_load_explicit(ring->producer, memory_order_acquire);
	for (; position < end; position += slot) {
		u32 header = header_of(record_at(ring, position));

		if ((header & LENGTH) != size) {
			ring->refused = header & LENGTH;
			break;
		}
		if ((header & BUSY) || slot > end - position)
			break;
		if (!(header & DISCARDED)) {
			most = least(most, (end - position) / slot);
			ready = row_of(ring, position, size, most, NULL, 0, 0);
			break;
		}
		ring->discarded++;
	}
	return hand_back(ring, position) ? -1 : (i64)ready;
}

/* Behind RingReader.in_place: gives so many bytes back; -1: somebody else reads the ring. */
int lab_ring_hand_back(struct ring *ring, u64 bytes)
{
	return hand_back(ring, ring->position + bytes);
}

/* RingReader.each: calls a function for what stands in the ring now; how many records there were. */
i64 lab_ring_each(struct ring *ring, u64 size, void (*each)(const u8 *record, void *state),
		  void *state)
{
	u64 end = atomic_load_explicit(ring->producer, memory_order_acquire), slot = slot_of(size);
	i64 some = 0, done = 0;

	while (ring->position < end && (some = lab_ring_ready(ring, size, PIECE / slot + 1)) > 0) {
		for (i64 i = 0; i < some; i++)
			each(record_at(ring, ring->position + (u64)i * slot) + HEADER, state);
		if (lab_ring_hand_back(ring, (u64)some * slot))
			return -1;
		done += some;
	}
	return some < 0 ? -1 : done;
}

/* RingReader.read_any. */
i64 lab_ring_take_any(struct ring *ring, u8 *out, u64 room, struct place *places, u64 most)
{
	return take(ring, out, room, most, 0, places);
}

/* -- a replica: labkit.sync.replica ------------------------------------------------------------ */

#define EMPTY (-1)
#define MIX 0x9E3779B97F4A7C15ull
#define DELETE 2
/* So many keys are looked for at once: their slots and rows come from memory side by side. */
#define BLOCK 64u

struct row {
	u64 version;
	u64 seen_ns;
	u64 missing_ns;
	u8 known;
	u8 present;
	u8 unused[6];
	u64 key[];  // whole words, the rest zero; behind it the value
};

/* A slot tells more of the key than its place does, so that rows of other keys are not looked at. */
struct slot {
	int32_t row;
	u32 tag;
};

struct table {
	u8 *rows;
	struct slot *slots;
	u64 mask;  // number of slots - 1
	u64 room;  // rows, half as many as slots at most
	u64 used;
	u64 live;
	u64 complete_ns;
	u64 row_bytes;
	u64 key_bytes;
	u64 words;
	u64 value_at;
	u64 value_bytes;
};

/* labkit.sync.changes.change_dtype; the value stands behind the key. */
struct change {
	u64 seen_ns;
	u64 version;
	u64 committed_ns;
	u8 kind;
	u8 unused[7];
	u8 key[];
};

/* A key, and where it is looked for. */
struct sought {
	const u8 *raw;
	u64 slot;
	u32 tag;
};

static inline struct row *row_at(const struct table *table, u64 at)
{
	return (struct row *)(table->rows + at * table->row_bytes);
}

/* Word of a key that is no whole number of them long, perhaps. */
static inline u64 word_of(const struct table *table, const u8 *key, u64 at)
{
	u64 word = 0, left = table->key_bytes - 8 * at;

	if (left >= 8)
		memcpy(&word, key + 8 * at, 8);
	else if (left == 4)
		memcpy(&word, key + 8 * at, 4);
	else
		memcpy(&word, key + 8 * at, left);
	return word;
}

/* Replica._first_slots */
static inline struct sought hashed(const struct table *table, const u8 *key)
{
	u64 mixed = word_of(table, key, 0) * MIX;

	for (u64 at = 1; at < table->words; at++)
		mixed = (mixed ^ (mixed >> 29) ^ word_of(table, key, at)) * MIX;
	return (struct sought){ key, (mixed >> 32) & table->mask, (u32)mixed };
}

static inline int is_key(const struct table *table, const struct row *row, const u8 *key)
{
	for (u64 at = 0; at < table->words; at++)
		if (row->key[at] != word_of(table, key, at))
			return 0;
	return 1;
}

/* The next slot that is free or has the tag; half of them are free. */
static inline struct slot next(const struct table *table, struct sought *sought)
{
	for (;; sought->slot = (sought->slot + 1) & table->mask) {
		struct slot slot = table->slots[sought->slot];

		if (slot.row == EMPTY || slot.tag == sought->tag)
			return slot;
	}
}

/* Row of a key; or -1, and the slot where it belongs. */
static inline i64 find(const struct table *table, struct sought *sought)
{
	for (;; sought->slot = (sought->slot + 1) & table->mask) {
		i64 at = next(table, sought).row;

		if (at == EMPTY || is_key(table, row_at(table, (u64)at), sought->raw))
			return at;
	}
}

/* Row of a key, made where there is none; -1: there is no room for it. */
static inline i64 find_or_add(struct table *table, struct sought *sought)
{
	i64 at = find(table, sought);
	struct row *row;

	if (at != EMPTY || table->used == table->room)
		return at;
	at = (i64)table->used++;
	row = row_at(table, (u64)at);
	memset(row, 0, table->row_bytes);
	row->missing_ns = table->complete_ns;
	for (u64 word = 0; word < table->words; word++)
		row->key[word] = word_of(table, sought->raw, word);
	table->slots[sought->slot] = (struct slot){ (int32_t)at, sought->tag };
	return at;
}

/* Has memory bring what a block of keys needs. */
static inline void fetch(const struct table *table, struct sought *sought, const u8 *first,
			 i64 stride, u64 count)
{
	for (u64 i = 0; i < count; i++) {
		sought[i] = hashed(table, first + (i64)i * stride);
		__builtin_prefetch(&table->slots[sought[i].slot]);
	}
	for (u64 i = 0; i < count; i++) {
		i64 at = next(table, &sought[i]).row;

		if (at == EMPTY)
			continue;
		__builtin_prefetch(row_at(table, (u64)at), 1);
		__builtin_prefetch((u8 *)row_at(table, (u64)at) + table->value_at, 1);
	}
}

static inline void copy(u8 *to, const u8 *from, u64 size)
{
	/* Sizes that the compiler knows take no call. */
	switch (size) {
	case 8: memcpy(to, from, 8); break;
	case 16: memcpy(to, from, 16); break;
	default: memcpy(to, from, size);
	}
}

/* Replica._find: the row of each key, or -1. */
void lab_table_find(const struct table *table, const u8 *key, i64 stride, u64 count, i64 *found)
{
	struct sought sought[BLOCK];

	for (u64 done = 0; done < count; done += BLOCK) {
		u64 some = least(count - done, BLOCK);

		fetch(table, sought, key + (i64)done * stride, stride, some);
		for (u64 i = 0; i < some; i++)
			found[done + i] = find(table, &sought[i]);
	}
}

/* Replica._index: gives slots to the rows from here on; none of their keys has one. */
void lab_table_index(struct table *table, u64 from)
{
	struct sought sought[BLOCK];

	for (u64 done = from; done < table->used; done += BLOCK) {
		u64 some = least(table->used - done, BLOCK);

		fetch(table, sought, (u8 *)row_at(table, done)->key, (i64)table->row_bytes, some);
		for (u64 i = 0; i < some; i++) {
			u64 at = sought[i].slot;

			while (table->slots[at].row != EMPTY)
				at = (at + 1) & table->mask;
			table->slots[at] = (struct slot){ (int32_t)(done + i), sought[i].tag };
		}
	}
}

/* Whether a change is newer than what its row knows; a delete that names no version is told one. */
static inline int is_news(const struct row *row, struct change *change)
{
	int delete = change->kind == DELETE, untold = delete && !change->version;

	if (untold)
		change->version = row->known ? row->version : 0;
	/* What was committed before the key was found missing is older than that. */
	if (change->committed_ns && change->committed_ns < row->missing_ns)
		return 0;
	if (!row->known)
		return !untold;
	return change->version > row->version ||
	       (delete && row->present && change->version == row->version);
}

/* Replica.apply: how many changes were applied; fewer than given where the rows are used up. */
u64 lab_table_apply(struct table *table, u8 *first, i64 stride, u64 value_at, u64 count, u8 *fresh)
{
	struct sought sought[BLOCK];
	u64 rows[BLOCK];

	for (u64 done = 0; done < count; done += BLOCK) {
		u64 some = least(count - done, BLOCK), i, now;

		fetch(table, sought, first + (i64)done * stride + offsetof(struct change, key), stride,
		      some);
		for (i = 0; i < some; i++) {
			struct change *change = (struct change *)(first + (i64)(done + i) * stride);
			i64 at = find_or_add(table, &sought[i]);
			struct row *row;

			if (at < 0)
				break;
			row = row_at(table, rows[i] = (u64)at);
			fresh[done + i] = (u8)is_news(row, change);
			if (!fresh[done + i])
				continue;
			table->live += (u64)(change->kind != DELETE) - row->present;
			row->known = 1;
			row->present = change->kind != DELETE;
			row->version = change->version;
			copy((u8 *)row + table->value_at, (u8 *)change + value_at, table->value_bytes);
		}
		some = i;
		now = now_ns();
		for (i = 0; i < some; i++) {
			((struct change *)(first + (i64)(done + i) * stride))->seen_ns = now;
			if (fresh[done + i])
				row_at(table, rows[i])->seen_ns = now;
		}
		if (some < least(count - done, BLOCK))
			return done + some;
	}
	return count;
}

/* What a snapshot changed so far. */
struct diff {
	const u8 *keys;
	const u8 *values;
	const u64 *versions;
	u64 count;
	u64 done;
	u64 started_ns;
	i64 *rows;   // of each entry
	i64 *newer;  // the entries that were news
	u64 news;
	u64 steps;
};

/* Replica.resync, its entries; it ends early where the rows are used up. */
void lab_table_diff(struct table *table, struct diff *diff)
{
	i64 key_bytes = (i64)table->key_bytes;
	struct sought sought[BLOCK];

	while (diff->done < diff->count) {
		u64 some = least(diff->count - diff->done, BLOCK);

		fetch(table, sought, diff->keys + (i64)diff->done * key_bytes, key_bytes, some);
		for (u64 i = 0; i < some; i++, diff->done++) {
			u64 entry = diff->done, version = diff->versions[entry];
			i64 at = find_or_add(table, &sought[i]);
			struct row *row;
			u64 step;

			if (at < 0)
				return;
			diff->rows[entry] = at;
			row = row_at(table, (u64)at);
			/* A delete that named no version may have been that of an older one. */
			if (row->known && version <= row->version &&
			    !(version == row->version && !row->present && row->seen_ns < diff->started_ns))
				continue;
			step = version - (row->known ? row->version : 0);
			/* A delete that was inferred is counted already when the key comes back. */
			step -= row->known && !row->present && row->missing_ns;
			diff->steps += (i64)step > 1 ? step : 1;
			diff->newer[diff->news++] = (i64)entry;
			table->live += !row->present;
			row->known = row->present = 1;
			row->version = version;
			copy((u8 *)row + table->value_at, diff->values + entry * table->value_bytes,
			     table->value_bytes);
		}
	}
}

/* -- numbers of events: labkit.sync.ring_events ------------------------------------------------- */

/* labkit.sync.changes.event_dtype, up to the key. */
struct event {
	u64 seq;
	u64 version;
	u64 committed_ns;
	u8 kind;
	u8 program;
	uint16_t cpu;
	u32 dropped;
};

/* RingEvents._number: whether a number is missing; -1: an event of a source that there is not. */
int lab_events_number(const u8 *first, u64 event_bytes, u64 count, u64 cpus, u64 sources,
		      i64 *expected, i64 *produced_before, i64 *dropped_before)
{
	int gap = 0;

	for (u64 i = 0; i < count; i++) {
		const struct event *event = (const struct event *)(first + i * event_bytes);
		u64 source = event->program * cpus + event->cpu;
		i64 seq = (i64)event->seq;

		if (event->cpu >= cpus || source >= sources)
			return -1;
		if (expected[source] < 0) {
			expected[source] = produced_before[source];
			if (seq < expected[source]) {
				dropped_before[source] -= (u32)dropped_before[source] - event->dropped;
				produced_before[source] = expected[source] = seq;
			}
		}
		gap |= seq != expected[source];
		expected[source] = (i64)(event->seq + 1);
	}
	return gap;
}

/* -- all of it at once -------------------------------------------------------------------------- */

struct follow {
	struct ring *ring;
	struct table *table;
	u8 *events;  // so many of so many bytes; as changes their values stand at the same place
	u64 most;
	u64 event_bytes;
	u64 value_at;
	u8 *fresh;
	u64 cpus;
	u64 sources;
	i64 *expected;
	i64 *produced_before;
	i64 *dropped_before;
	struct lock lock;
	u64 gather_ns;  // so long from the first event on, others are taken as they come
	u64 timer_ns;   // the longest sleep between two looks at the ring
	u64 unread;     // the most bytes that stood in the ring before a look
	u64 applied;    // fewer than were taken where the rows are used up
	i64 gap;        // as lab_events_number answers, of any of them
};

/* One look at the ring: how many events were taken; -1: somebody else reads the ring. */
static i64 follow_once(struct follow *follow, u64 done)
{
	u8 *events = follow->events + done * follow->event_bytes;
	u64 unread = atomic_load_explicit(follow->ring->producer, memory_order_relaxed) -
		     follow->ring->position;
	i64 taken;
	int gap;

	if (unread > follow->unread)
		follow->unread = unread;
	taken = lab_ring_take(follow->ring, events, follow->most - done, follow->event_bytes);
	if (taken <= 0)
		return taken;
	gap = lab_events_number(events, follow->event_bytes, (u64)taken, follow->cpus, follow->sources,
				follow->expected, follow->produced_before, follow->dropped_before);
	follow->gap = gap ? gap : follow->gap;
	if (gap >= 0)
		follow->applied += lab_table_apply(follow->table, events, (i64)follow->event_bytes,
						   follow->value_at, (u64)taken, follow->fresh + done);
	return taken;
}

/* RingEvents._take: how many events were taken; -1: somebody else reads the ring. What is unusual
 * ends it early: missing numbers, used up rows, records of another size, a signal.
 */
i64 lab_follow(struct follow *follow)
{
	u64 done = 0, end = 0;

	follow->unread = follow->applied = 0;
	follow->gap = 0;
	for (;;) {
		i64 taken = follow_once(follow, done);
		u64 now;

		if (taken < 0)
			return taken;
		done += (u64)taken;
		if (!done || !follow->gather_ns || done == follow->most || follow->applied < done ||
		    follow->gap || follow->ring->refused >= 0)
			return (i64)done;
		now = now_ns();
		end = end ? end : now + follow->gather_ns;
		if (now >= end ||
		    wait_until(follow->ring, least(end, now + follow->timer_ns), &follow->lock) < 0)
			return (i64)done;
	}
}
