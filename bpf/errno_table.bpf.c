// SPDX-License-Identifier: GPL-2.0
// What a program's own update and delete answer. The helpers return minus the errno.
//
// The map is made by user space, which passes its descriptor: bcc's update() takes no flags.

struct call {
	u64 deletes; // 1: delete the key, 0: update it
	u64 flags;
	u64 key;
	s64 answer;
};

int ask(struct call *call)
{
	u64 value = 1;
	u32 key = call->key;

	if (call->deletes)
		call->answer = bpf_map_delete_elem_(bpf_pseudo_fd(1, TABLE_FD), &key);
	else
		call->answer =
			bpf_map_update_elem_(bpf_pseudo_fd(1, TABLE_FD), &key, &value, call->flags);
	return 0;
}
