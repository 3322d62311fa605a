// SPDX-License-Identifier: GPL-2.0
// Two records of 32 bytes, then one of another size: what a RingReader refuses.

#define RING ((void *)bpf_pseudo_fd(1, RING_FD))

int emit(void *ctx)
{
	u64 record[8] = {};

	bpf_ringbuf_output(RING, record, 32, 0);
	bpf_ringbuf_output(RING, record, 32, 0);
	bpf_ringbuf_output(RING, record, OTHER_BYTES, 0);
	return 0;
}
