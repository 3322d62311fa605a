// SPDX-License-Identifier: GPL-2.0
// The ways in which a program writes a map that user space made: by helper, and by a store.

enum way { UPDATE, DELETE, STORE };

struct call {
	u64 way;
	u64 key;
	u64 version;
	s64 answer;  // 0 or minus the errno
};

#define TABLE ((void *)bpf_pseudo_fd(1, TABLE_FD))

int write_map(struct call *call)
{
	u32 key = call->key;
	u64 version = call->version;
	u64 *value;

	if (call->way == UPDATE) {
		call->answer = bpf_map_update_elem_(TABLE, &key, &version, BPF_ANY);
	} else if (call->way == DELETE) {
		call->answer = bpf_map_delete_elem_(TABLE, &key);
	} else {
		value = bpf_map_lookup_elem_(TABLE, &key);
		call->answer = value ? 0 : -2;  // -ENOENT
		if (value)
			*value = version;
	}
	return 0;
}
