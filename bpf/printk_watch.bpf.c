// SPDX-License-Identifier: GPL-2.0
// Updates a map, and prints a line that an observer takes for the sign of an update.

struct counts {
	u64 calls;
	u64 changed; // updates that answered 0
	u64 exists;  // updates that answered EEXIST
	u64 printed; // lines, by the answer of the helper
};

BPF_TABLE("hash", u32, u64, table, ENTRIES);
BPF_ARRAY(counts, struct counts, 1);

static inline int update_and_print(bool one_key, bool overwrite, bool print_changes_alone)
{
	struct counts *seen;
	int zero = 0, answer;
	u64 value;
	u32 key;

	seen = counts.lookup(&zero);
	if (!seen)
		return 0;
	value = ++seen->calls;
	key = one_key ? 0 : value;
	if (overwrite)
		answer = table.update(&key, &value);
	else
		answer = table.insert(&key, &value); // BPF_NOEXIST
	if (answer == 0)
		seen->changed++;
	else if (answer == -17)
		seen->exists++;
	if (answer && print_changes_alone)
		return 0;
	if (bpf_trace_printk("MAP_UPD %d %d", OWNER_ID, value) > 0)
		seen->printed++;
	return 0;
}

// As in the article: the line stands behind the update, and nobody looks at what that answered.
int print_calls(void *ctx)
{
	return update_and_print(true, false, false);
}

int print_calls_on_new_keys(void *ctx)
{
	return update_and_print(false, false, false);
}

int print_changes(void *ctx)
{
	return update_and_print(true, false, true);
}

int overwrite_and_print_changes(void *ctx)
{
	return update_and_print(true, true, true);
}
