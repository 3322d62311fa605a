// SPDX-License-Identifier: GPL-2.0
// Looks one slot of an outer map up, as programs do.

int look(void *ctx)
{
	u32 zero = 0;

	return bpf_map_lookup_elem_(bpf_pseudo_fd(1, OUTER_FD), &zero) != 0;
}
