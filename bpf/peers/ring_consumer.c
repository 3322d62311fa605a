// SPDX-License-Identifier: GPL-2.0
// libbpf's consumer with a one-line callback: what a C program gets from the ring at its best.
// Takes orders on standard input, one a line, and answers each with one line:
//   drain   take what is in the ring                         -> records sum nanoseconds
//   follow  take what comes until a line "stop" and a quiet ring -> records sum nanoseconds
// Ends with its input.

#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include <bpf/bpf.h>
#include <bpf/libbpf.h>

#include "../ring_event.h"

static unsigned long long sum;

static int add(void *ctx, void *data, size_t size)
{
	sum += ((struct event *)data)->value;
	return 0;
}

static long long now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000LL + t.tv_nsec;
}

int main(int argc, char **argv)
{
	struct pollfd orders = { .fd = 0, .events = POLLIN };
	struct ring_buffer *ring;
	char line[32];
	int fd;

	// Orders are polled for, so none may hide in a buffer of stdio.
	setvbuf(stdin, NULL, _IONBF, 0);
	fd = argc == 2 ? bpf_map_get_fd_by_id(atoi(argv[1])) : -1;
	ring = fd < 0 ? NULL : ring_buffer__new(fd, add, NULL, NULL);
	if (!ring) {
		fprintf(stderr, "ring_consumer: needs the id of a ring buffer map\n");
		return 2;
	}
	while (fgets(line, sizeof(line), stdin)) {
		long long begun = now_ns(), records = 0;
		int took;

		sum = 0;
		if (!strncmp(line, "follow", 6)) {
			while ((took = ring_buffer__consume(ring)) > 0 || !poll(&orders, 1, 0)) {
				records += took;
				if (!took)
					usleep(500);
			}
			if (!fgets(line, sizeof(line), stdin))
				break;
		}
		records += ring_buffer__consume(ring);
		printf("%lld %llu %lld\n", records, sum, now_ns() - begun);
		fflush(stdout);
	}
	ring_buffer__free(ring);
	return 0;
}
