// SPDX-License-Identifier: GPL-2.0
// A program that refers to a map which user space has made; that alone keeps the map alive.

int look_up(void *ctx)
{
	u32 key = 0;

	return bpf_map_lookup_elem_(bpf_pseudo_fd(1, TABLE_FD), &key) != NULL;
}
