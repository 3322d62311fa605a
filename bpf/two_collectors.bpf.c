// SPDX-License-Identifier: GPL-2.0
// Tells of each connect() of one load, into a hash that is polled or into a ring buffer.

struct entered {
	u64 common;
	u64 number;
	u64 arguments[6];
};

// What user space hands to connect(). The kernel ignores the last eight bytes of an IPv4 address,
// and the load writes into them when it wanted the call.
struct destination {
	u16 family;
	u16 port;
	u32 address;
	u64 intended_ns;
};

struct connection {
	u64 intended_ns;
	u64 entered_ns;
	u32 pid;
	u32 address;
	u32 port;
	u32 number;
};

struct account {
	u64 produced;  // delivered + dropped
	u64 dropped;   // no room
};

BPF_ARRAY(account, struct account, 1);
#if RING
BPF_RINGBUF_OUTPUT(events, PAGES);
#else
BPF_TABLE("hash", u64, struct connection, connections, ENTRIES);
#endif

int on_connect(struct entered *entered)
{
	struct bpf_pidns_info who = {};
	struct destination to = {};
	struct connection *one;
	struct account *ours;
	int zero = 0;
	u64 number;

	if (bpf_probe_read_user(&to, sizeof(to), (void *)entered->arguments[1]))
		return 0;
	// Others on this machine connect as well; the load has an address of its own.
	if (to.address != ADDRESS_ID)
		return 0;
	// By the load's own numbers: in a container they are not those of the whole machine.
	if (bpf_get_ns_current_pid_tgid(NAMESPACE_DEVICE, NAMESPACE_INODE, &who, sizeof(who)))
		return 0;
	ours = account.lookup(&zero);
	if (!ours)
		return 0;
	number = __sync_fetch_and_add(&ours->produced, 1);
#if RING
	one = events.ringbuf_reserve(sizeof(*one));
	if (!one) {
		__sync_fetch_and_add(&ours->dropped, 1);
		return 0;
	}
#else
	struct connection kept = {};

	one = &kept;
#endif
	one->intended_ns = to.intended_ns;
	one->entered_ns = bpf_ktime_get_ns();
	one->pid = who.tgid;
	one->address = to.address;
	one->port = bpf_ntohs(to.port);
	one->number = number;
#if RING
	events.ringbuf_submit(one, 0);
#else
	// A connection is a key of its own, so that none hides another; a full map takes no more.
	if (connections.insert(&number, one))
		__sync_fetch_and_add(&ours->dropped, 1);
#endif
	return 0;
}
