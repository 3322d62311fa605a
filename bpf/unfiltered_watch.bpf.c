// SPDX-License-Identifier: GPL-2.0
// The peer of labkit.inspect.watch_hooks in the benchmark: updates of maps told as Asphaltt/mad does it.
// A function of the kernel's map type is hooked on its exit, and no filter stands in front: every map's
// update is told, in two records, key and value. Each is put together in scratch memory of the CPU,
// with what the kernel knows of the map's types, and copied into the ring.
//
// Where the kernel lets nobody hook its functions, on_return does the same at the return of bpf(2).
//
// Constants: RING_FD; where struct bpf_map and struct btf have their fields; those of map_of_fd.h.

#include <uapi/linux/ptrace.h>
#include "map_of_fd.h"

#define RING ((void *)bpf_pseudo_fd(1, RING_FD))
#define DATA_BYTES 2008

struct record {
	s32 result;
	u32 pid;
	char comm[16];
	u32 map_id;
	u32 map_btf_id;
	u32 btf_id;
	u16 flags;
	u16 bytes;
	u8 data[DATA_BYTES];
};

BPF_PERCPU_ARRAY(scratch, struct record, 1);

static inline u32 field(u64 at)
{
	u32 value = 0;

	bpf_probe_read_kernel(&value, sizeof(value), (void *)at);
	return value;
}

static inline void tell_half(struct record *record, u64 from, u64 size, u32 btf_id, bool of_user)
{
	long failed;

	asm volatile("" : "+r"(size));
	if (size > DATA_BYTES)
		return;
	failed = of_user ? bpf_probe_read_user(record->data, size, (void *)from)
			 : bpf_probe_read_kernel(record->data, size, (void *)from);
	if (failed)
		return;
	record->btf_id = btf_id;
	record->bytes = size;
	bpf_ringbuf_output(RING, record, offsetof(struct record, data) + size, 0);
}

static inline void told(u64 map, u64 key, u64 value, s32 result, bool of_user)
{
	u32 first = 0, value_btf_id, of_kernel;
	u32 key_size = field(map + KEY_SIZE_AT), value_size = field(map + VALUE_SIZE_AT);
	u64 btf = 0;
	struct record *record = scratch.lookup(&first);

	if (!record)
		return;
	bpf_probe_read_kernel(&btf, sizeof(btf), (void *)(map + BTF_AT));
	value_btf_id = field(map + VALUE_BTF_ID_AT);
	of_kernel = field(map + KERNEL_VALUE_BTF_ID_AT);
	record->result = result;
	record->pid = bpf_get_current_pid_tgid() >> 32;
	bpf_get_current_comm(record->comm, sizeof(record->comm));
	record->map_id = field(map + MAP_ID_AT);
	record->map_btf_id = btf ? field(btf + BTF_ID_AT) : 0;
	record->flags = of_kernel ? 4 : 0;
	tell_half(record, key, key_size, field(map + KEY_BTF_ID_AT), of_user);
	record->flags |= 1;
	tell_half(record, value, value_size, value_btf_id, of_user);
}

// (map, key, value, flags)
int on_update(u64 *ctx)
{
	told(ctx[0], ctx[1], ctx[2], ctx[4], false);
	return 0;
}

int on_return(u64 *ctx)
{
	struct pt_regs *regs = (void *)ctx[0];
	struct element_call call = {};

	if (regs->orig_ax != NR_BPF || regs->di != BPF_MAP_UPDATE_ELEM ||
	    bpf_probe_read_user(&call, sizeof(call), (void *)regs->si))
		return 0;
	told(behind_fd(call.map_fd), call.key, call.value, ctx[1], true);
	return 0;
}
