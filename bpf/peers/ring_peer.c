// SPDX-License-Identifier: GPL-2.0
// libbpf's consumer: what a C program gets from a ring. ring_peer.go does the same.
// Its argument is the descriptor of a struct ring_log. Takes orders on standard input, one a line,
// and answers each with "ready" where it waits for events, and in the end with
//   records sum nanoseconds nanoseconds-of-CPU
//
//   drain RING add|copy           take what is in the ring; add up a field, or copy each record
//   follow RING                   take what comes until told to stop, and add up a field
//   take RING TIMER read|replica  the same, and log each event; wake up after TIMER microseconds
//                                 at least, or never sleep if it is 0
//   lookup MAP ENTRIES TIMES      read a whole hash by batch, again and again; adds up the values
//   update MAP ENTRIES TIMES      write keys from 0 on, each with three times itself, by batch
//
// RING and MAP are ids; a hash has keys of 4 and values of 8 bytes. Ends with its input.

#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <bpf/bpf.h>
#include <bpf/libbpf.h>
#include <linux/types.h>

#include "../ring_event.h"
#include "ring_log.h"

#define CHANGE_DELETE 2

// struct change_event of ../change_event.h, with a key and a value of 8 bytes.
struct change {
	__u64 seq, version, committed_ns;
	__u8 kind, program;
	__u16 cpu;
	__u32 dropped;
	__u64 key, value;
};

// The replica: open addressing, so many slots at most half of which are used.
#define SLOTS (1u << 16)

static struct slot {
	__u64 key, version, value, seen_ns;
	__u8 known, present;
} slots[SLOTS];

static struct ring_log *logged;
static unsigned long long sum;
static struct event *copies;  // as large as the largest ring that is drained
static size_t copied;

static unsigned long long clock_ns(clockid_t which)
{
	struct timespec t;

	clock_gettime(which, &t);
	return t.tv_sec * 1000000000ULL + t.tv_nsec;
}

static int add(void *ctx, void *data, size_t size)
{
	sum += ((struct event *)data)->value;
	return 0;
}

static int copy(void *ctx, void *data, size_t size)
{
	memcpy(&copies[copied++], data, size);
	return 0;
}

static void note(__u64 seq, __u64 intended_ns, __u64 seen_ns)
{
	if (logged->taken < logged->room)
		logged->row[logged->taken++] = (struct log_row){ seq, intended_ns, seen_ns };
}

static int read_one(void *ctx, void *data, size_t size)
{
	struct event *event = data;

	sum += event->value;
	note(event->seq, event->intended_ns, clock_ns(CLOCK_MONOTONIC));
	return 0;
}

static int apply_one(void *ctx, void *data, size_t size)
{
	struct change *change = data;
	__u32 at = (change->key * 0x9E3779B97F4A7C15ull >> 32) % SLOTS;
	struct slot *slot;

	while (slots[at].known && slots[at].key != change->key)
		at = (at + 1) % SLOTS;
	slot = &slots[at];
	if (!slot->known || change->version > slot->version) {
		slot->known = 1;
		slot->present = change->kind != CHANGE_DELETE;
		slot->key = change->key;
		slot->version = change->version;
		slot->value = change->value;
		slot->seen_ns = clock_ns(CLOCK_MONOTONIC);
		note(change->key, change->version, slot->seen_ns);
	}
	return 0;
}

static int stopped(void)
{
	return __atomic_load_n(&logged->stop, __ATOMIC_ACQUIRE);
}

static long long follow(struct ring_buffer *ring)
{
	long long records = 0;
	int took, last;

	do {
		last = stopped();
		took = ring_buffer__consume(ring);
		records += took;
		if (!took && !last)
			usleep(500);
	} while (took || !last);
	return records;
}

static long long take(struct ring_buffer *ring, int timer_us)
{
	long long records = 0;
	int took = 0, last;

	do {
		last = stopped();
		if (timer_us && !last)
			took = ring_buffer__poll(ring, timer_us < 1000 ? 1 : timer_us / 1000);
		// Whom nobody wakes finds what there is by looking.
		if (!took)
			took = ring_buffer__consume(ring);
		records += took;
		last = last && !took;
		took = 0;
	} while (!last);
	return records;
}

static long long handle_map(int fd, int reads, __u32 entries, unsigned times,
			    unsigned long long *ns)
{
	__u32 *keys = malloc(entries * sizeof(*keys)), at, count;
	__u64 *values = malloc(entries * sizeof(*values));
	long long records = 0;
	int failed = !keys || !values;

	for (at = 0; !failed && at < entries; at++)
		values[at] = 3 * (keys[at] = at);
	*ns = clock_ns(CLOCK_MONOTONIC);
	while (!failed && times--) {
		__u32 batch, more = 0;
		int ended = 0;

		count = entries;
		if (!reads) {
			failed = bpf_map_update_batch(fd, keys, values, &count, NULL);
			records += count;
			continue;
		}
		for (at = 0; !ended && at < entries; at += count, more = 1) {
			count = entries - at;
			ended = bpf_map_lookup_batch(fd, more ? &batch : NULL, &batch, keys + at, values + at,
						     &count, NULL);
		}
		records += at;
	}
	*ns = clock_ns(CLOCK_MONOTONIC) - *ns;
	if (reads)
		for (at = 0; !failed && at < entries; at++)
			sum += values[at] * (records / entries);
	free(keys);
	free(values);
	return failed ? -1 : records;
}

static struct ring_log *shared(const char *descriptor)
{
	int fd = atoi(descriptor);
	struct stat told;
	void *at = MAP_FAILED;

	if (!fstat(fd, &told))
		at = mmap(NULL, told.st_size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, 0);
	return at == MAP_FAILED ? NULL : at;
}

static ring_buffer_sample_fn callback_of(const char *how)
{
	if (!strcmp(how, "copy"))
		return copy;
	if (!strcmp(how, "read"))
		return read_one;
	return strcmp(how, "replica") ? add : apply_one;
}

int main(int argc, char **argv)
{
	char line[64], order[16], how[16];
	unsigned ring_id, timer_us, entries, times;

	logged = argc == 2 ? shared(argv[1]) : NULL;
	if (!logged) {
		fprintf(stderr, "ring_peer: needs the descriptor of a log\n");
		return 2;
	}
	while (fgets(line, sizeof(line), stdin)) {
		unsigned long long begun, cpu;
		struct ring_buffer *ring;
		long long records;
		int fd;

		*how = timer_us = sum = copied = 0;
		if (sscanf(line, "lookup %u %u %u", &ring_id, &entries, &times) == 3 ||
		    sscanf(line, "update %u %u %u", &ring_id, &entries, &times) == 3) {
			fd = bpf_map_get_fd_by_id(ring_id);
			records = handle_map(fd, *line == 'l', entries, times, &begun);
			printf("%lld %llu %llu 0\n", records, sum, begun);
			fflush(stdout);
			close(fd);
			continue;
		}
		if (sscanf(line, "drain %u %15s", &ring_id, how) == 2)
			strcpy(order, "drain");
		else if (sscanf(line, "take %u %u %15s", &ring_id, &timer_us, how) == 3)
			strcpy(order, "take");
		else if (sscanf(line, "follow %u", &ring_id) == 1)
			strcpy(order, "follow");
		else
			return 2;
		fd = bpf_map_get_fd_by_id(ring_id);
		ring = fd < 0 ? NULL : ring_buffer__new(fd, callback_of(how), NULL, NULL);
		if (!ring) {
			fprintf(stderr, "ring_peer: there is no ring %u\n", ring_id);
			return 2;
		}
		if (!strcmp(how, "copy") && !copies) {
			// Touched, so that no drain pays for fresh pages.
			size_t bytes = 1 << 26;

			copies = malloc(bytes);
			memset(copies, 1, bytes);
		}
		memset(slots, 0, *order == 't' ? sizeof(slots) : 0);
		if (*order != 'd') {
			puts("ready");
			fflush(stdout);
		}
		begun = clock_ns(CLOCK_MONOTONIC);
		cpu = clock_ns(CLOCK_PROCESS_CPUTIME_ID);
		if (*order == 'd')
			records = ring_buffer__consume(ring);
		else
			records = *order == 't' ? take(ring, timer_us) : follow(ring);
		cpu = clock_ns(CLOCK_PROCESS_CPUTIME_ID) - cpu;
		begun = clock_ns(CLOCK_MONOTONIC) - begun;
		for (size_t i = 0; i < copied; i++)
			sum += copies[i].value;
		printf("%lld %llu %llu %llu\n", records, sum, begun, cpu);
		fflush(stdout);
		ring_buffer__free(ring);
		close(fd);
	}
	return 0;
}
