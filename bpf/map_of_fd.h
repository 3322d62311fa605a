/* SPDX-License-Identifier: GPL-2.0 */
#ifndef MAP_OF_FD_H
#define MAP_OF_FD_H

#define NR_BPF 321  // of x86-64; 32-bit processes enter by another number, and are not seen

/* Fields of union bpf_attr (include/uapi/linux/bpf.h). A caller may pass no more of it than its command
 * needs: of a batch, that is all in front of its flags.
 */
struct element_call {
	u32 map_fd;
	u32 padding;
	u64 key;
	u64 value;
};

struct batch_call {
	u64 in_batch;
	u64 out_batch;
	u64 keys;
	u64 values;
	u32 count;  // the kernel writes over it how many elements it went through, unless it never began
	u32 map_fd;
	u64 elem_flags;
	u64 flags;
};

#define BATCH_BYTES offsetof(struct batch_call, elem_flags)

/* What stands behind a descriptor of the current process, such as a struct bpf_map: what fget would
 * say. The offsets come from the kernel's own BTF. As far as the verifier knows the types, a plain load
 * does, for a fifth of what the helper costs.
 */
static inline u64 behind_fd(u32 fd)
{
	u64 at = (u64)bpf_get_current_task_btf();

	at = *(u64 *)(at + TASK_FILES_AT);
	at = *(u64 *)(at + FILES_TABLE_AT);
	at = *(u64 *)(at + TABLE_FILES_AT);
	bpf_probe_read_kernel(&at, sizeof(at), (void *)(at + 8 * (u64)fd));
	bpf_probe_read_kernel(&at, sizeof(at), (void *)(at + FILE_PRIVATE_AT));
	return at;
}

/* The id of the map behind a descriptor of the current process. */
static inline u32 map_id(u32 fd)
{
	u32 id = 0;

	bpf_probe_read_kernel(&id, sizeof(id), (void *)(behind_fd(fd) + MAP_ID_AT));
	return id;
}

#endif
