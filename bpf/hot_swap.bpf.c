// SPDX-License-Identifier: GPL-2.0
// Notes how often each numbered event is seen, whichever version of a program sees it.

#define NUMBER_IN_FRAME 14     // behind the Ethernet header
#define ADDRESS_IN_DATAGRAM 16 // the destination, in the IPv4 header
#define NUMBER_IN_DATAGRAM 28  // behind the headers of IPv4 and UDP

struct frame {
	u8 addresses[12];
	u16 protocol;
	u32 number;
} __attribute__((packed));

struct entered {
	u64 common;
	u64 number;
	u64 arguments[6];
};

BPF_ARRAY(seen, u32, EVENTS);
BPF_PROG_ARRAY(slot, 1);

static inline void see(u32 number)
{
	u32 *times = seen.lookup(&number);

	if (times)
		__sync_fetch_and_add(times, 1);
}

int on_xdp(struct xdp_md *packet)
{
	struct frame *frame = (void *)(long)packet->data;

	if ((void *)(frame + 1) <= (void *)(long)packet->data_end &&
	    frame->protocol == bpf_htons(PROTOCOL))
		see(frame->number);
	return XDP_PASS;
}

int on_tcx(struct __sk_buff *packet)
{
	u32 number;

	if (packet->protocol == bpf_htons(PROTOCOL) &&
	    !bpf_skb_load_bytes(packet, NUMBER_IN_FRAME, &number, sizeof(number)))
		see(number);
	return -1; // the next program's turn
}

int on_cgroup(struct __sk_buff *packet)
{
	u32 address, number;

	// All that leaves this machine comes by here; ours goes to an address of its own.
	if (!bpf_skb_load_bytes(packet, ADDRESS_IN_DATAGRAM, &address, sizeof(address)) &&
	    address == ADDRESS_ID &&
	    !bpf_skb_load_bytes(packet, NUMBER_IN_DATAGRAM, &number, sizeof(number)))
		see(number);
	return 1;
}

// close() of descriptors that nobody has: the number of the event is what is above FIRST_ID.
int on_trace(struct entered *entered)
{
	see((u32)entered->arguments[0] - FIRST_ID);
	return 0;
}

// What stays attached where the version behind it is exchanged.
int on_slot(struct entered *entered)
{
	slot.call(entered, 0);
	return 0;
}

// A new version that the verifier refuses: it does not look whether the element is there. (Of an
// array's element under a constant key newer kernels know that.)
int unsafe(struct xdp_md *packet)
{
	u32 any = bpf_get_prandom_u32(), *times = seen.lookup(&any);

	return *times;
}
