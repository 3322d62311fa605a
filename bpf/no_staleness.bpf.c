// SPDX-License-Identifier: GPL-2.0
// Readers of one policy: when user space asks for a run, and when a packet comes in.
//
// The policy's value is its version. Odd versions drop packets, even ones let them pass.

#define LAB_PROTOCOL 0x88b5

enum way {
	LOOKUP, // the policy is looked up each time
	COPY,   // it was looked up once, and copied
	RENEWED // the copy is renewed when the writer has said that there is something newer
};

struct copy {
	u64 generation;
	u64 version;
};

struct read {
	u64 start_ns;
	u64 end_ns;
	u64 version;
};

struct frame {
	u8 addresses[12];
	u16 protocol;
	u32 number;
} __attribute__((packed));

BPF_HASH(policy, u32, u64, 64);
BPF_ARRAY(generation, u64, 1);
BPF_ARRAY(copies, struct copy, 1);
BPF_ARRAY(seen, struct read, PACKETS); // by the number in the packet

static inline u64 version_by(enum way way)
{
	u32 zero = 0;
	u64 *version, *newest;
	struct copy *kept;

	if (way != LOOKUP) {
		kept = copies.lookup(&zero);
		newest = generation.lookup(&zero);
		if (!kept || !newest)
			return 0;
		// Read before the policy is: a change after this will show in the next run.
		u64 now = *(volatile u64 *)newest;
		if (kept->version && (way == COPY || kept->generation == now))
			return kept->version;
		version = policy.lookup(&zero);
		if (!version)
			return 0;
		kept->version = *version;
		kept->generation = now;
		return kept->version;
	}
	version = policy.lookup(&zero);
	return version ? *version : 0;
}

int read_by_lookup(void *ctx)
{
	return version_by(LOOKUP);
}

int read_by_copy(void *ctx)
{
	return version_by(COPY);
}

int read_by_renewed(void *ctx)
{
	return version_by(RENEWED);
}

static inline int police(struct xdp_md *ctx, enum way way)
{
	struct frame *frame = (void *)(long)ctx->data;
	u64 start = bpf_ktime_get_ns(), version;
	struct read *read;
	u32 number;

	if ((void *)(frame + 1) > (void *)(long)ctx->data_end ||
	    frame->protocol != bpf_htons(LAB_PROTOCOL))
		return XDP_PASS;
	number = frame->number;
	version = version_by(way);
	read = seen.lookup(&number);
	if (read) {
		read->start_ns = start;
		read->end_ns = bpf_ktime_get_ns();
		read->version = version;
	}
	return version % 2 ? XDP_DROP : XDP_PASS;
}

int police_by_lookup(struct xdp_md *ctx)
{
	return police(ctx, LOOKUP);
}

int police_by_copy(struct xdp_md *ctx)
{
	return police(ctx, COPY);
}

int police_by_renewed(struct xdp_md *ctx)
{
	return police(ctx, RENEWED);
}
