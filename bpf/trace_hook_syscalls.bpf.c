// SPDX-License-Identifier: GPL-2.0
// Sees every change of a map that any process of the machine makes by bpf(2), when the call returns.
//
// Only the return is hooked. The registers that the kernel kept still name the call's arguments, and
// the memory that they point to was touched by the kernel a moment ago, so it can be read without a
// page fault; at the entry it might not have been paged in, and nobody would know yet of success.
// The window: another thread of the writer may change that memory, or put another map under the
// descriptor, before this program reads it. Changes that programs make pass no system call.

#include <uapi/linux/ptrace.h>
#include "trace_hook.h"
#include "map_of_fd.h"

static inline void element_changed(u32 command, u64 attr, s64 result)
{
	struct element_call call = {};
	// A caller may pass no more of the union than its command needs.
	u32 size = command == BPF_MAP_DELETE_ELEM ? 16 : sizeof(call);

	if (result || bpf_probe_read_user(&call, size, (void *)attr) || map_id(call.map_fd) != MAP_ID)
		return;
	if (command == BPF_MAP_UPDATE_ELEM)
		emit(CHANGE_UPDATE, OF_USER, call.key, call.value);
	else
		emit(CHANGE_DELETE, OF_USER, call.key, call.value);
}

static inline void batch_changed(u32 command, u64 attr, s64 result)
{
	struct batch_call call = {};
	u8 kind = command == BPF_MAP_UPDATE_BATCH ? CHANGE_UPDATE : CHANGE_DELETE;

	if (bpf_probe_read_user(&call, BATCH_BYTES, (void *)attr) || map_id(call.map_fd) != MAP_ID)
		return;
	if (command == BPF_MAP_DELETE_BATCH)
		call.values = 0;
	if (command == BPF_MAP_LOOKUP_AND_DELETE_BATCH && result == -ENOSPC)
		return;  // nothing was taken
	if (command == BPF_MAP_LOOKUP_AND_DELETE_BATCH && result == -ENOENT)
		result = 0;  // the end of the map was reached, and the count is good
	if (!result)
		emit_batch(kind, call.keys, call.values, call.count);
	else
		// It stopped after count elements, or it never began and the count is the caller's own.
		// Nothing here tells the two apart: the map has to be read.
		count_dropped(call.count < MAP_ENTRIES ? call.count : MAP_ENTRIES);
}

int on_return(u64 *ctx)
{
	struct pt_regs *regs = (void *)ctx[0];
	u32 command;

	if (regs->orig_ax != NR_BPF)
		return 0;
	command = regs->di;
	switch (command) {
	case BPF_MAP_UPDATE_ELEM:
	case BPF_MAP_DELETE_ELEM:
	case BPF_MAP_LOOKUP_AND_DELETE_ELEM:
		element_changed(command, regs->si, ctx[1]);
		break;
	case BPF_MAP_UPDATE_BATCH:
	case BPF_MAP_DELETE_BATCH:
	case BPF_MAP_LOOKUP_AND_DELETE_BATCH:
		batch_changed(command, regs->si, ctx[1]);
		break;
	}
	return 0;
}
