// SPDX-License-Identifier: GPL-2.0
// A writer that inserts keys into a hash without preallocation, and a tracer that is called in the
// middle of such an insertion, under the lock of the bucket: there the allocator of elements asks
// for more of them by an interrupt to itself. The tracer counts its calls, in one of several ways.
//
// BUCKETS is a power of two, and as many elements have room. The seed of the hash is zero, so that
// a program can tell the bucket of a key.

#include <linux/jhash.h>

#define OF_TRACER (1U << 31) // the writer's keys are below
#define ERRNOS 256
#define SELF_IPI 0x83f // the register by which an x2APIC interrupts its own CPU

struct state {
	u32 next;    // key that the writer inserts
	u32 writing; // it is at it
	u64 calls;   // of the tracer meanwhile
	u64 ns;      // that its counting took
};

BPF_F_TABLE("hash", u32, u64, table, BUCKETS, FLAGS);
BPF_F_TABLE("hash", u32, u64, beside, BUCKETS, FLAGS);
BPF_ARRAY(in_array, u64, BUCKETS);
BPF_ARRAY(tracer_key, u32, BUCKETS); // one for each bucket
BPF_ARRAY(state, struct state, 1);
BPF_ARRAY(answers, u64, ERRNOS); // how often the tracer's update was answered so

static inline u32 bucket_of(u32 key)
{
	return jhash2(&key, 1, 0) & (BUCKETS - 1);
}

// Each run tries one key.
int find_tracer_key(struct __sk_buff *packet)
{
	u32 zero = 0, key, bucket;
	struct state *now = state.lookup(&zero);

	if (!now)
		return 0;
	key = OF_TRACER | now->next++;
	bucket = bucket_of(key);
	tracer_key.update(&bucket, &key);
	return 0;
}

static inline u32 tracer_key_in(u32 bucket)
{
	u32 *key = tracer_key.lookup(&bucket);

	return key ? *key : 0;
}

int insert(struct __sk_buff *packet)
{
	u64 value = 1, none = 0;
	u32 zero = 0, key, tracers;
	struct state *now = state.lookup(&zero);

	if (!now)
		return 0;
	key = now->next++;
	tracers = tracer_key_in(bucket_of(key));
	table.insert(&tracers, &none); // for the tracer that adds in place
	now->writing = 1;
	table.update(&key, &value);
	now->writing = 0;
	return 0;
}

static inline void answered(long answer)
{
	u32 number = -answer;
	u64 *times = answers.lookup(&number);

	if (times)
		(*times)++;
}

static inline void add_in_array(u32 bucket)
{
	u64 *count = in_array.lookup(&bucket);

	if (count)
		(*count)++;
}

#ifdef BY_MSR // (register, value, failed)
static inline bool elsewhere(u64 *ctx)
{
	return (u32)ctx[0] != SELF_IPI;
}
#else // every call of arch_irq_work_raise() by the writer is one
static inline bool elsewhere(u64 *ctx)
{
	return false;
}
#endif

// The state, with the call counted and its time begun, if the writer is at an insertion.
static inline struct state *called(u64 *ctx)
{
	u32 zero = 0;
	struct state *now;

	if (bpf_get_current_pid_tgid() >> 32 != PROCESS || elsewhere(ctx))
		return NULL;
	now = state.lookup(&zero);
	if (!now || !now->writing)
		return NULL;
	now->calls++;
	now->ns -= bpf_ktime_get_ns();
	return now;
}

static inline int counted(struct state *now)
{
	now->ns += bpf_ktime_get_ns();
	return 0;
}

// The bucket of the key that is being inserted, or one after it.
static inline u32 bucket_in_use(struct state *now, u32 further)
{
	return (bucket_of(now->next - 1) + further) & (BUCKETS - 1);
}

static inline long add_by_update(u32 key)
{
	u64 *count = table.lookup(&key), more = count ? *count + 1 : 1;

	return table.update(&key, &more);
}

int in_the_same_bucket(u64 *ctx)
{
	struct state *now = called(ctx);

	if (!now)
		return 0;
	answered(add_by_update(tracer_key_in(bucket_in_use(now, 0))));
	return counted(now);
}

int eight_buckets_on(u64 *ctx)
{
	struct state *now = called(ctx);

	if (!now)
		return 0;
	answered(add_by_update(tracer_key_in(bucket_in_use(now, 8))));
	return counted(now);
}

int in_the_next_bucket(u64 *ctx)
{
	struct state *now = called(ctx);

	if (!now)
		return 0;
	answered(add_by_update(tracer_key_in(bucket_in_use(now, 1))));
	return counted(now);
}

int in_another_map(u64 *ctx)
{
	u64 *count, more;
	u32 key;
	struct state *now = called(ctx);

	if (!now)
		return 0;
	key = bucket_in_use(now, 0);
	count = beside.lookup(&key);
	more = count ? *count + 1 : 1;
	answered(beside.update(&key, &more));
	return counted(now);
}

// A lookup takes no lock, nor does an addition in place.
int in_place(u64 *ctx)
{
	u64 *count;
	u32 key;
	struct state *now = called(ctx);

	if (!now)
		return 0;
	key = tracer_key_in(bucket_in_use(now, 0));
	count = table.lookup(&key);
	if (count)
		__sync_fetch_and_add(count, 1);
	return counted(now);
}

int in_an_array(u64 *ctx)
{
	struct state *now = called(ctx);

	if (!now)
		return 0;
	add_in_array(bucket_in_use(now, 0));
	return counted(now);
}

// What was refused goes where no lock is taken, and is added by whoever reads the counts.
int refusals_aside(u64 *ctx)
{
	u32 bucket;
	long answer;
	struct state *now = called(ctx);

	if (!now)
		return 0;
	bucket = bucket_in_use(now, 0);
	answer = add_by_update(tracer_key_in(bucket));
	answered(answer);
	if (answer)
		add_in_array(bucket);
	return counted(now);
}
