// SPDX-License-Identifier: GPL-2.0
// Stores one key more in each run, and writes down what the store answered: many programs drop it.

BPF_ARRAY(next, u32, 1);
BPF_ARRAY(answers, s64, KEYS);

int store(struct __sk_buff *packet)
{
	u32 zero = 0, key, *following = next.lookup(&zero);
	s64 *answer;
	u64 value;

	if (!following)
		return 0;
	key = (*following)++;
	value = key;
	answer = answers.lookup(&key);
	if (answer)
		*answer = bpf_map_update_elem_(bpf_pseudo_fd(1, TABLE_FD), &key, &value, BPF_ANY);
	return 0;
}
