// SPDX-License-Identifier: GPL-2.0
// Tells of every change of the watched maps that a process asks for by bpf(2), with the kernel's
// answer. Changes that programs make pass no system call.
//
// An element is read when the call returns: the kernel touched that memory a moment ago, so there is
// no page fault (trace_hook_syscalls.bpf.c has the window). The entry is not hooked: that would cost
// every system call of the machine another 50 ns.

#include <uapi/linux/ptrace.h>
#include "map_of_fd.h"
#include "watch_event.h"

BPF_HASH(batches, u64, struct batch, 4096);  // by thread: the batch that is being told of
BPF_PROG_ARRAY(next, 1);                   // on_batch

static inline bool is_batch(u32 command)
{
	return command == BPF_MAP_UPDATE_BATCH || command == BPF_MAP_DELETE_BATCH ||
	       command == BPF_MAP_LOOKUP_AND_DELETE_BATCH;
}

static inline void element_changed(u64 *ctx, u32 command, u64 attr, s64 result)
{
	struct element_call call = {};
	struct target of = {};
	// A caller may pass no more of the union than its command needs.
	u32 size = command == BPF_MAP_DELETE_ELEM ? 16 : sizeof(call), id;
	u8 kind = command == BPF_MAP_UPDATE_ELEM ? WATCH_UPDATE : WATCH_DELETE;

	if (bpf_probe_read_user(&call, size, (void *)attr))
		return;
	id = map_id(call.map_fd);
	if (!id || !watched(id, &of))
		return;
	if (kind == WATCH_DELETE && result)
		call.value = NOWHERE;  // nothing was taken
	tell(ctx, &of, id, kind, OF_USER, call.key, call.value, of.call_value_size, result);
}

// Tells of some elements, and calls itself for the rest: the kernel allows 33 calls. What is left
// then is counted.
int on_batch(u64 *ctx)
{
	u64 thread = bpf_get_current_pid_tgid();
	struct batch *batch = batches.lookup(&thread);

	if (!batch)
		return 0;
	tell_next(ctx, batch);
	if (batch->told < batch->count)
		next.call(ctx, 0);
	if (batch->told < batch->count)
		count_untold(batch->count - batch->told);
	batches.delete(&thread);
	return 0;
}

// Whether a batch that failed had begun, so that its count is the kernel's: the answer tells.
static inline bool had_begun(u64 size, s64 result)
{
	return size <= sizeof(union bpf_attr) &&
	       (result == -E2BIG || result == -ENOENT || result == -EEXIST || result == -EBUSY ||
		result == -EFAULT || result == -ENOSPC);
}

static inline bool had_not_begun(struct batch_call *call, s64 result)
{
	return result == -EPERM || result == -EACCES || result == -ENOTSUPP || call->flags ||
	       call->elem_flags & ~BPF_F_LOCK;
}

static inline void batch_changed(u64 *ctx, u32 command, struct pt_regs *regs, s64 result)
{
	struct batch_call call = {};
	struct batch batch = {};
	u64 thread = bpf_get_current_pid_tgid(), key = NOWHERE, value = NOWHERE;
	bool begun;

	if (bpf_probe_read_user(&call, BATCH_BYTES, (void *)regs->si))
		return;
	batch.id = map_id(call.map_fd);
	if (!batch.id || !watched(batch.id, &batch.of))
		return;
	if (command == BPF_MAP_LOOKUP_AND_DELETE_BATCH && result == -ENOENT)
		result = 0;  // the end of the map was reached, and the count is good
	batch.kind = command == BPF_MAP_UPDATE_BATCH ? WATCH_UPDATE : WATCH_DELETE;
	batch.keys = call.keys;
	batch.values = command == BPF_MAP_DELETE_BATCH ? NOWHERE : call.values;
	if (result)
		bpf_probe_read_user(&call.elem_flags, sizeof(call) - BATCH_BYTES,
				    (void *)(regs->si + BATCH_BYTES));
	begun = !result || had_begun(regs->dx, result);
	if (begun)
		batch.count = call.count;
	else if (!had_not_begun(&call, result)) {
		count_untold(call.count);  // so many at the most: nobody can tell
		call.keys = call.values = NOWHERE;
	}
	if (result) {
		// Told before those that were done, which another program tells of.
		if (command != BPF_MAP_LOOKUP_AND_DELETE_BATCH)
			key = call.keys + (u64)batch.count * batch.of.key_size;
		if (command == BPF_MAP_UPDATE_BATCH)
			value = call.values + (u64)batch.count * batch.of.call_value_size;
		tell(ctx, &batch.of, batch.id, batch.kind, OF_USER, key, value,
		     batch.of.call_value_size, result);
	}
	if (!batch.count)
		return;
	batches.update(&thread, &batch);
	next.call(ctx, 0);
	count_untold(batch.count);
}

int on_return(u64 *ctx)
{
	struct pt_regs *regs = (void *)ctx[0];
	u32 command;

	if (regs->orig_ax != NR_BPF)
		return 0;
	command = regs->di;
	if (command == BPF_MAP_UPDATE_ELEM || command == BPF_MAP_DELETE_ELEM ||
	    command == BPF_MAP_LOOKUP_AND_DELETE_ELEM)
		element_changed(ctx, command, regs->si, ctx[1]);
	else if (is_batch(command))
		batch_changed(ctx, command, regs, ctx[1]);
	return 0;
}
