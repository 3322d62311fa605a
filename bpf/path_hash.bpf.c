// SPDX-License-Identifier: GPL-2.0
// A socket filter that drops the datagrams whose path is denied; a path is all that is in them, and
// zeros behind it.

#define MOST_BYTES 64

struct path {
	u8 text[MOST_BYTES];
};

struct denied {
#ifdef COMPARED
	struct path path;
#else
	u32 unused;
#endif
};

#ifdef BY_PATH
BPF_TABLE("hash", struct path, struct denied, policies, POLICIES);
#else
BPF_TABLE("hash", u32, struct denied, policies, POLICIES);
#endif

static inline u32 fnv1a(const struct path *path)
{
	u32 hashed = 0x811c9dc5;

	for (int i = 0; i < MOST_BYTES && path->text[i]; i++)
		hashed = (hashed ^ path->text[i]) * 0x01000193;
	return hashed;
}

int guard(struct __sk_buff *packet)
{
	struct path path;
	struct denied *denied;

	if (bpf_skb_load_bytes(packet, 0, &path, sizeof(path)))
		return 0;
#ifdef BY_PATH
	denied = policies.lookup(&path);
#else
	u32 key = fnv1a(&path);

	denied = policies.lookup(&key);
#endif
#ifdef COMPARED
	// Another path's policy is none of this one's.
	for (int i = 0; denied && i < MOST_BYTES / 8; i++)
		if (((u64 *)&denied->path)[i] != ((u64 *)&path)[i])
			denied = 0;
#endif
	return denied ? 0 : packet->len;
}
