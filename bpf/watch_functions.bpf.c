// SPDX-License-Identifier: GPL-2.0
// Tells of every change of the watched maps inside the kernel's functions of their types, whoever asks:
// the system call and every program's helper. Each program here fits the functions of one signature,
// and is loaded once for each of them, as fexit: it has the arguments and the answer.

#include "map_of_fd.h"
#include "watch_event.h"

static inline u32 id_of(u64 map)
{
	u32 id = 0;

	bpf_probe_read_kernel(&id, sizeof(id), (void *)(map + MAP_ID_AT));
	return id;
}

// What bpf(2) calls for a map of maps calls the function of a plain hash in turn.
static inline bool holds_maps(u64 map)
{
	u32 type = 0;

	bpf_probe_read_kernel(&type, sizeof(type), (void *)(map + MAP_TYPE_AT));
	return type == BPF_MAP_TYPE_ARRAY_OF_MAPS || type == BPF_MAP_TYPE_HASH_OF_MAPS;
}

// (map, key, value, flags): one value, also for a per-CPU map, whose program writes its own CPU's
int on_update(u64 *ctx)
{
	struct target of = {};
	u32 id = id_of(ctx[0]);

	if (watched(id, &of) && !holds_maps(ctx[0]))
		tell(ctx, &of, id, WATCH_UPDATE, OF_KERNEL, ctx[1], ctx[2], of.value_size,
		     (s32)ctx[4]);
	return 0;
}

// (map, key, value, flags): what bpf(2) calls for a per-CPU map, with a slot for each CPU
int on_update_slots(u64 *ctx)
{
	struct target of = {};
	u32 id = id_of(ctx[0]);

	if (watched(id, &of))
		tell(ctx, &of, id, WATCH_UPDATE, OF_KERNEL, ctx[1], ctx[2], of.call_value_size,
		     (s32)ctx[4]);
	return 0;
}

// (map, map_file, key, value, flags): the value is a descriptor of the writer's process
int on_update_fd(u64 *ctx)
{
	struct target of = {};
	u32 id = id_of(ctx[0]);

	if (watched(id, &of))
		tell(ctx, &of, id, WATCH_UPDATE, OF_KERNEL, ctx[2], ctx[3], of.value_size,
		     (s32)ctx[5]);
	return 0;
}

// (map, key)
int on_delete(u64 *ctx)
{
	struct target of = {};
	u32 id = id_of(ctx[0]);

	if (watched(id, &of))
		tell(ctx, &of, id, WATCH_DELETE, OF_KERNEL, ctx[1], NOWHERE, 0,
		     (s32)ctx[2]);
	return 0;
}

// (map, key, value, flags): the value is filled in where there was one
int on_take(u64 *ctx)
{
	struct target of = {};
	u32 id = id_of(ctx[0]);

	if (watched(id, &of))
		tell(ctx, &of, id, WATCH_DELETE, OF_KERNEL, ctx[1], (s32)ctx[4] ? NOWHERE : ctx[2],
		     of.call_value_size, (s32)ctx[4]);
	return 0;
}

// (map, value, flags) and (map, value): queues and stacks have no keys
int on_push(u64 *ctx)
{
	struct target of = {};
	u32 id = id_of(ctx[0]);

	if (watched(id, &of))
		tell(ctx, &of, id, WATCH_UPDATE, OF_KERNEL, NOWHERE, ctx[1], of.value_size, (s32)ctx[3]);
	return 0;
}

int on_pop(u64 *ctx)
{
	struct target of = {};
	u32 id = id_of(ctx[0]);

	if (watched(id, &of))
		tell(ctx, &of, id, WATCH_DELETE, OF_KERNEL, NOWHERE, (s32)ctx[2] ? NOWHERE : ctx[1],
		     of.value_size, (s32)ctx[2]);
	return 0;
}

// (map, attr, user's attr): unlinks the elements itself, and fills in keys, values and their count
int on_take_batch(u64 *ctx)
{
	struct batch batch = {.id = id_of(ctx[0]), .kind = WATCH_DELETE};
	s32 result = ctx[3];

	if (!watched(batch.id, &batch.of))
		return 0;
	bpf_probe_read_kernel(&batch.keys, sizeof(batch.keys), (void *)(ctx[1] + 16));
	bpf_probe_read_kernel(&batch.values, sizeof(batch.values), (void *)(ctx[1] + 24));
	if ((result && result != -ENOENT) ||
	    bpf_probe_read_user(&batch.count, sizeof(batch.count), (void *)(ctx[2] + 32))) {
		tell(ctx, &batch.of, batch.id, WATCH_DELETE, OF_USER, NOWHERE, NOWHERE, 0, result);
		return 0;
	}
	tell_next(ctx, &batch);
	if (batch.count > batch.told)
		count_untold(batch.count - batch.told);
	return 0;
}
