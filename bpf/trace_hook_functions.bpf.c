// SPDX-License-Identifier: GPL-2.0
// Sees a map's changes inside the kernel's functions of its type, whoever calls them: the system call
// and every program's helper. Each program here fits the functions of one signature, and is loaded
// once for each of them: as fexit, or (BY_KPROBE) as a kprobe, which knows no return value.

#include <uapi/linux/ptrace.h>
#include "trace_hook.h"

#ifdef BY_KPROBE
#define CONTEXT struct pt_regs
#define FIRST(ctx) PT_REGS_PARM1(ctx)
#define SECOND(ctx) PT_REGS_PARM2(ctx)
#define THIRD(ctx) PT_REGS_PARM3(ctx)
#define FOURTH(ctx) PT_REGS_PARM4(ctx)
#define RESULT(ctx, arguments) 0
#else
#define CONTEXT u64
#define FIRST(ctx) ctx[0]
#define SECOND(ctx) ctx[1]
#define THIRD(ctx) ctx[2]
#define FOURTH(ctx) ctx[3]
#define RESULT(ctx, arguments) ((s32)ctx[arguments])
#endif

static inline bool watched(u64 map)
{
	u32 id = 0;

	bpf_probe_read_kernel(&id, sizeof(id), (void *)(map + MAP_ID_AT));
	return id == MAP_ID;
}

// (map, key, value, flags)
int on_update(CONTEXT *ctx)
{
	if (!RESULT(ctx, 4) && watched(FIRST(ctx)))
		emit(CHANGE_UPDATE, OF_KERNEL, SECOND(ctx), THIRD(ctx));
	return 0;
}

// (map, map_file, key, value, flags): the value is a descriptor of the writer's process
int on_update_fd(CONTEXT *ctx)
{
	if (!RESULT(ctx, 5) && watched(FIRST(ctx)))
		emit(CHANGE_UPDATE, OF_KERNEL, THIRD(ctx), FOURTH(ctx));
	return 0;
}

// (map, key)
int on_delete(CONTEXT *ctx)
{
	if (!RESULT(ctx, 2) && watched(FIRST(ctx)))
		emit(CHANGE_DELETE, OF_KERNEL, SECOND(ctx), 0);
	return 0;
}

#ifndef BY_KPROBE
// (map, key, value, flags): the value is filled in, so there is none when the function begins
int on_take(CONTEXT *ctx)
{
	if (!RESULT(ctx, 4) && watched(FIRST(ctx)))
		emit(CHANGE_DELETE, OF_KERNEL, SECOND(ctx), THIRD(ctx));
	return 0;
}

// (map, attr, user's attr): unlinks the elements itself, and fills in keys, values and their count
int on_take_batch(CONTEXT *ctx)
{
	s32 result = RESULT(ctx, 3);
	u64 keys = 0, values = 0;
	u32 count = 0;

	if (!watched(FIRST(ctx)) || result == -ENOSPC)
		return 0;
	bpf_probe_read_kernel(&keys, sizeof(keys), (void *)(SECOND(ctx) + 16));
	bpf_probe_read_kernel(&values, sizeof(values), (void *)(SECOND(ctx) + 24));
	if (!result || result == -ENOENT) {
		if (!bpf_probe_read_user(&count, sizeof(count), (void *)(THIRD(ctx) + 32))) {
			emit_batch(CHANGE_DELETE, keys, values, count);
			return 0;
		}
	}
	count_dropped(1);
	return 0;
}
#endif
