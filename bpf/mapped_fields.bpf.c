// SPDX-License-Identifier: GPL-2.0
// Reads two fields that user space stores through a mapping of the array.
//
// The array is made by user space (BPF_F_MMAPABLE), which passes its descriptor.

struct fields {
	u64 data;
	u64 flag; // stored behind the data by a careful writer
};

struct order {
	u64 reads;
	u64 violations;
};

BPF_ARRAY(order, struct order, 1);

// Flag first, then data: whoever sees a flag must see data at least as new.
int check_order(void *ctx)
{
	volatile struct fields *both;
	struct order *seen;
	int zero = 0;

	seen = order.lookup(&zero);
	both = (volatile struct fields *)bpf_map_lookup_elem_(bpf_pseudo_fd(1, TABLE_FD), &zero);
	if (!seen || !both)
		return 0;
	for (int i = 0; i < READS; i++) {
		u64 flag = both->flag;

		if (both->data < flag)
			seen->violations++;
	}
	seen->reads += READS;
	return 0;
}

int read_data(u64 *data)
{
	volatile struct fields *both;
	int zero = 0;

	both = (volatile struct fields *)bpf_map_lookup_elem_(bpf_pseudo_fd(1, TABLE_FD), &zero);
	if (both)
		*data = both->data;
	return 0;
}
