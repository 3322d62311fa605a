// SPDX-License-Identifier: GPL-2.0
// Sends records of any size with any wakeup flag, and writes down what the buffer answered.

#define RING ((void *)bpf_pseudo_fd(1, RING_FD))

struct control {
	u64 bytes; // of a record, below 128
	u64 flags; // of the wakeup
	u64 sent;
	u64 refused; // the only count of losses that there is: our own
	s64 refusal; // the last one
};

// bpf_ringbuf_query() takes 0 to 3; what stands behind them is asked as well.
struct state {
	u64 answers[QUERIES];
};

// bcc asks for a struct where its own buffers are used.
struct event {
	u64 seq;
	u64 rest[7];
};

BPF_ARRAY(control, struct control, 1);
BPF_ARRAY(state, struct state, 1);
BPF_RINGBUF_OUTPUT(ring, PAGES);
BPF_PERF_OUTPUT(perf);

static void note(struct control *c, s64 answer)
{
	c->sent++;
	if (answer < 0) {
		c->refused++;
		c->refusal = answer;
	}
}

int send_ring(struct __sk_buff *packet)
{
	u64 record[16] = {};
	u32 zero = 0;
	struct control *c = control.lookup(&zero);

	if (!c)
		return 0;
	record[0] = c->sent;
	note(c, bpf_ringbuf_output(RING, record, c->bytes & (sizeof(record) - 1), c->flags));
	return 0;
}

int send_bcc_ring(struct __sk_buff *packet)
{
	struct event event = {};
	u32 zero = 0;
	struct control *c = control.lookup(&zero);

	if (!c)
		return 0;
	event.seq = c->sent;
	note(c, ring.ringbuf_output(&event, sizeof(event), 0));
	return 0;
}

int send_perf(struct __sk_buff *packet)
{
	struct event event = {};
	u32 zero = 0;
	struct control *c = control.lookup(&zero);

	if (!c)
		return 0;
	event.seq = c->sent;
	note(c, perf.perf_submit(packet, &event, sizeof(event)));
	return 0;
}

int query(struct __sk_buff *packet)
{
	u32 zero = 0;
	struct state *s = state.lookup(&zero);

	if (!s)
		return 0;
	for (int i = 0; i < QUERIES; i++)
		s->answers[i] = bpf_ringbuf_query(RING, i);
	return 0;
}
