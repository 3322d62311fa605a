// SPDX-License-Identifier: GPL-2.0
// Calls connect() on a schedule that waits for nobody, in a network namespace of its own.
//
//     connect_load ADDRESS RATE SECONDS WORKERS FAIL_AFTER PARENT
//
// ADDRESS is a number in network order, RATE is of all WORKERS together. Each of them has a port of
// its own, and sockets of UDP: connect() only notes the destination there, so that neither a server
// nor the number of ports limits the rate. After FAIL_AFTER seconds (0: never) one worker begins to
// connect to a port that is nobody's. Prints the calls that were made, the calls that the schedule
// had, and the process that fails.

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <net/if.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { FIRST_PORT = 20000, WRONG_PORT = 9, SPIN_NS = 60000, START_NS = 50000000 };

struct destination {
	uint16_t family, port;
	uint32_t address;
	uint64_t intended_ns;
};

static uint64_t now(void)
{
	struct timespec at;

	clock_gettime(CLOCK_MONOTONIC, &at);
	return at.tv_sec * 1000000000ull + at.tv_nsec;
}

static void die(const char *doing)
{
	perror(doing);
	exit(1);
}

static void die_with(pid_t parent)
{
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	if (getppid() != parent)
		exit(1);
}

// A new namespace has a loopback that is down, and no address that could be reached.
static void enter_own_network(void)
{
	struct ifreq lo = {.ifr_name = "lo", .ifr_flags = IFF_UP};
	int any;

	if (unshare(CLONE_NEWNET))
		die("a network namespace");
	any = socket(AF_INET, SOCK_DGRAM, 0);
	if (any < 0 || ioctl(any, SIOCSIFFLAGS, &lo))
		die("the loopback");
	close(any);
}

static void work(struct destination to, uint64_t first, uint64_t gap, uint64_t end, uint64_t wrong,
		 uint64_t *made)
{
	int udp = socket(AF_INET, SOCK_DGRAM, 0);

	if (udp < 0)
		die("a socket");
	for (uint64_t due = first; due < end; due += gap) {
		uint64_t at = now();

		if (at >= end)
			return; // what is not made by now is missing from the count
		if (due > at + SPIN_NS) {
			uint64_t until = due - SPIN_NS / 2;
			struct timespec wake = {until / 1000000000, until % 1000000000};

			clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &wake, NULL);
		}
		while (now() < due)
			;
		if (wrong && due >= wrong)
			to.port = htons(WRONG_PORT);
		to.intended_ns = due;
		if (connect(udp, (struct sockaddr *)&to, sizeof(to)))
			die("connect");
		++*made;
	}
}

int main(int count, char **words)
{
	if (count != 7)
		return 2;
	double rate = atof(words[2]), seconds = atof(words[3]), fail_after = atof(words[5]);
	int workers = atoi(words[4]), failing = workers / 2, status, worst = 0;
	uint64_t *made = mmap(NULL, workers * sizeof(*made), PROT_READ | PROT_WRITE,
			      MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	uint64_t start, end, total = 0, planned = 0, gap = workers * 1e9 / rate;
	pid_t guilty = 0, self = getpid();

	die_with(atoi(words[6]));
	if (made == MAP_FAILED)
		die("memory");
	enter_own_network();
	start = now() + START_NS;
	end = start + seconds * 1e9;
	for (int i = 0; i < workers; i++) {
		struct destination to = {AF_INET, htons(FIRST_PORT + i), strtoul(words[1], NULL, 10), 0};
		uint64_t first = start + i * (gap / workers);
		uint64_t wrong = fail_after && i == failing ? start + fail_after * 1e9 : 0;
		pid_t child;

		if (first < end)
			planned += (end - first + gap - 1) / gap;
		child = fork();
		if (child < 0)
			die("a process");
		if (!child) {
			die_with(self);
			work(to, first, gap, end, wrong, &made[i]);
			_exit(0);
		}
		if (i == failing)
			guilty = child;
	}
	while (wait(&status) > 0)
		worst |= status;
	for (int i = 0; i < workers; i++)
		total += made[i];
	printf("%llu %llu %d\n", (unsigned long long)total, (unsigned long long)planned, guilty);
	return worst != 0;
}
