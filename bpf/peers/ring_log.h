/* SPDX-License-Identifier: GPL-2.0 */
/* Memory that a peer shares with who gives it orders; experiments.bench.peers has the same layout. */
#ifndef RING_LOG_H
#define RING_LOG_H

struct ring_log {
	unsigned long long stop;  // set by the other side: end once the ring is empty
	unsigned long long taken; // rows so far
	unsigned long long room;
	struct log_row {
		unsigned long long seq;         // of the event; its key where a replica is kept
		unsigned long long intended_ns; // of the event; its version where a replica is kept
		unsigned long long seen_ns;     // CLOCK_MONOTONIC: when it had been taken, or applied
	} row[];
};

#endif
