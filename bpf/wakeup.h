/* SPDX-License-Identifier: GPL-2.0 */
/* Who is woken, and when, is the choice of the program that fills a ring: WAKEUP. */
/* Define RING before, the map; labkit.kernel.ringbuf.WAKEUPS has the numbers by name. */
#ifndef WAKEUP_H
#define WAKEUP_H

#define WAKEUP_DEFAULT 0   // the kernel's rule: wake when the reader stands at this very record
#define WAKEUP_ALWAYS 1    // wake for every record
#define WAKEUP_EVERY_N 2   // wake for every WAKEUP_AT-th record
#define WAKEUP_ADAPTIVE 3  // wake once WAKEUP_AT bytes stand unread
#define WAKEUP_NEVER 4     // the reader looks by its own timer

static __u64 wakeup(__u64 ce_seq)
{
#if WAKEUP == WAKEUP_ALWAYS
	return BPF_RB_FORCE_WAKEUP;
#elif WAKEUP == WAKEUP_EVERY_N
	return ce_seq % WAKEUP_AT == WAKEUP_AT - 1 ? BPF_RB_FORCE_WAKEUP : BPF_RB_NO_WAKEUP;
#elif WAKEUP == WAKEUP_ADAPTIVE
	return bpf_ringbuf_query(RING, BPF_RB_AVAIL_DATA) >= WAKEUP_AT ? BPF_RB_FORCE_WAKEUP
								       : BPF_RB_NO_WAKEUP;
#elif WAKEUP == WAKEUP_NEVER
	return BPF_RB_NO_WAKEUP;
#else
	return 0;
#endif
}

#endif
