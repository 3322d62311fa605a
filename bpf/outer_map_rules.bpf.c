// SPDX-License-Identifier: GPL-2.0
// Tries to put an inner map into an outer one from a program, as user space does.

int replace(void *ctx)
{
	u32 slot = 0, inner = 0;

	return bpf_map_update_elem_(bpf_pseudo_fd(1, OUTER_FD), &slot, &inner, 0);
}

// The same call on a map that holds values.
int write_value(void *ctx)
{
	u32 slot = 0, value = 7;

	return bpf_map_update_elem_(bpf_pseudo_fd(1, TABLE_FD), &slot, &value, 0);
}
