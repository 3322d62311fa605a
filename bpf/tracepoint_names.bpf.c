// SPDX-License-Identifier: GPL-2.0
// Counts retransmissions by the port that they go to.

BPF_HASH(seen, u16, u64, 4096);

int on_retransmit(void *event)
{
	u64 one = 1, *count;
	u16 port = 0;

	// Where the field stands differs between kernels; the event's format file tells.
	bpf_probe_read_kernel(&port, sizeof(port), event + PORT_OFFSET);
	count = seen.lookup(&port);
	if (count)
		__sync_fetch_and_add(count, 1);
	else
		seen.insert(&port, &one);
	return 0;
}
