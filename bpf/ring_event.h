/* SPDX-License-Identifier: GPL-2.0 */
/* One event of the ring buffer benchmark; labkit.lab.bench_kernel.EVENT is the same layout. */
#ifndef RING_EVENT_H
#define RING_EVENT_H

struct event {
	unsigned long long seq;           // counts every event that was tried, dropped ones too
	unsigned long long intended_ns;   // when the schedule wanted it; 0 without a schedule
	unsigned long long committed_ns;  // when the record was about to be handed over
	unsigned long long value;         // what a consumer adds up, to prove that it read it
};

#endif
