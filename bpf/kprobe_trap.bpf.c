// SPDX-License-Identifier: GPL-2.0
// Programs that watch the update of a hash from several places, and programs that make one.

#include <uapi/linux/ptrace.h>

enum watcher { BY_KPROBE, BY_FENTRY, WATCHERS };
enum writer { ON_KPROBE, ON_TRACEPOINT, ON_RAW_TRACEPOINT, ON_PACKET, WRITERS };

#define TABLE bpf_pseudo_fd(1, TABLE_FD)

BPF_ARRAY(seen, u64, WATCHERS);
BPF_ARRAY(written, u64, WRITERS);

static inline bool ours(void)
{
	return bpf_get_current_pid_tgid() >> 32 == PROCESS;
}

static inline void see(u32 watcher, u64 map)
{
	u32 id = 0;
	u64 *count;

	bpf_probe_read_kernel(&id, sizeof(id), (void *)(map + MAP_ID_AT));
	if (id != MAP_ID)
		return;
	count = seen.lookup(&watcher);
	if (count)
		__sync_fetch_and_add(count, 1);
}

static inline void write_one(u32 writer)
{
	u64 value = writer;
	u32 key = 0;
	u64 *count = written.lookup(&writer);

	if (count && !bpf_map_update_elem_(TABLE, &key, &value, BPF_ANY))
		__sync_fetch_and_add(count, 1);
}

int watch_by_kprobe(struct pt_regs *ctx)
{
	see(BY_KPROBE, PT_REGS_PARM1(ctx));
	return 0;
}

int watch_by_fentry(u64 *ctx)
{
	see(BY_FENTRY, ctx[0]);
	return 0;
}

int write_on_kprobe(struct pt_regs *ctx)
{
	if (ours())
		write_one(ON_KPROBE);
	return 0;
}

int write_on_tracepoint(void *ctx)
{
	if (ours())
		write_one(ON_TRACEPOINT);
	return 0;
}

// (registers, number of the system call)
int write_on_raw_tracepoint(u64 *ctx)
{
	if (ctx[1] == NR_GETPPID && ours())
		write_one(ON_RAW_TRACEPOINT);
	return 0;
}

int write_on_packet(struct __sk_buff *skb)
{
	write_one(ON_PACKET);
	return skb->len;
}
