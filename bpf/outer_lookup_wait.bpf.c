// SPDX-License-Identifier: GPL-2.0
// Looks one slot of an outer map up, as programs do; and reads a function of the kernel.

BPF_ARRAY(code, u64, WORDS);

int look(void *ctx)
{
	u32 zero = 0;

	return bpf_map_lookup_elem_(bpf_pseudo_fd(1, OUTER_FD), &zero) != 0;
}

// Copies the function's machine code; answers how many words could be read.
int read_code(void *ctx)
{
	for (u32 i = 0; i < WORDS; i++) {
		u32 at = i;
		u64 *word = code.lookup(&at), from = (s64)START + 8 * (u64)i;

		if (!word || bpf_probe_read_kernel(word, sizeof(*word), (void *)from))
			return i;
	}
	return WORDS;
}
