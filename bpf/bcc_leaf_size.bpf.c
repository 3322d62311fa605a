// SPDX-License-Identifier: GPL-2.0
// Maps that user space writes with values and keys of other sizes than these; no program.

struct value {
	u8 bytes[VALUE_BYTES];
};

BPF_TABLE("hash", u32, struct value, values, 1);

// The same identifiers under a key that is too narrow for them, and under one that is not.
BPF_TABLE("hash", u32, u64, by_narrow_key, KEYS);
BPF_TABLE("hash", u64, u64, by_wide_key, KEYS);
