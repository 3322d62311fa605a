// SPDX-License-Identifier: GPL-2.0
// A hash whose values carry a spin lock: the kernel finds it by the map's BTF, which bcc makes.

struct locked_value {
	struct bpf_spin_lock lock;
	u32 spare;
	u64 version;
};

BPF_TABLE("hash", u64, struct locked_value, table, ENTRIES);

// bcc makes the BTF of a source's maps only where there is a program.
int nothing(void *ctx)
{
	return 0;
}
