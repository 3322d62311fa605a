// SPDX-License-Identifier: GPL-2.0
// Readers that say whether a value is mixed of two writes, for every kind of map and every cure.
//
// The writer fills a payload of WORDS words with one byte, another one for each write. A read is
// torn when two bytes of it differ.

#define EVERY_BYTE 0x0101010101010101ULL
#define TRIES 4

struct value {
	u64 word[WORDS];
};

struct locked_value {
	struct bpf_spin_lock lock;
	u64 word[WORDS];
};

struct checked_value {
	u64 version;
	u64 word[WORDS];
	u64 checksum;
	u64 version_again;
};

struct counts {
	u64 torn;         // reads that the reader would have used, and that were mixed
	u64 rejected;     // reads that the reader's own check refused
	u64 given_up;     // no read passed the check in TRIES tries
	u64 equal_ends;   // mixed, though the versions at head and tail agree
	u64 absent;       // the lookup answered NULL
};

BPF_TABLE("array", u32, struct value, in_array, 1);
BPF_TABLE("hash", u32, struct value, in_hash, 4);
BPF_TABLE("percpu_array", u32, struct value, in_percpu_array, 1);
BPF_TABLE("percpu_hash", u32, struct value, in_percpu_hash, 4);
BPF_TABLE("array", u32, struct locked_value, locked_array, 1);
BPF_TABLE("hash", u32, struct locked_value, locked_hash, 4);
BPF_TABLE("array", u32, struct checked_value, checked_array, 1);
BPF_TABLE("array", u32, struct value, inner, 1);
// 6.1 takes no inner map without BTF where the template has it, though nothing else differs.
BPF_TABLE("array", u32, struct value, spare, 1);
BPF_ARRAY_OF_MAPS(outer, "inner", 1);
BPF_ARRAY(counts, struct counts, 1);

// Read every word once, in order, as a program does that uses the whole value. volatile: or the
// compiler may read a word twice, or not at all.
static inline u64 differing(volatile u64 *word)
{
	u64 first = word[0], differ = first ^ (first & 0xff) * EVERY_BYTE;

	for (u32 i = 1; i < WORDS; i++)
		differ |= word[i] ^ first;
	return differ;
}

static inline void count_torn(struct counts *seen, u64 differ)
{
	if (differ)
		__sync_fetch_and_add(&seen->torn, 1);
}

static inline int read(struct value *value)
{
	int zero = 0;
	struct counts *seen = counts.lookup(&zero);

	if (seen && value)
		count_torn(seen, differing(value->word));
	else if (seen)
		__sync_fetch_and_add(&seen->absent, 1);
	return 0;
}

static inline int read_locked(struct locked_value *value)
{
	int zero = 0;
	struct counts *seen = counts.lookup(&zero);
	u64 differ;

	if (!seen)
		return 0;
	if (!value) {
		__sync_fetch_and_add(&seen->absent, 1);
		return 0;
	}
	bpf_spin_lock(&value->lock);
	differ = differing(value->word);
	bpf_spin_unlock(&value->lock);
	count_torn(seen, differ);
	return 0;
}

int read_array(void *ctx)
{
	int zero = 0;

	return read(in_array.lookup(&zero));
}

int read_hash(void *ctx)
{
	int zero = 0;

	return read(in_hash.lookup(&zero));
}

int read_percpu_array(void *ctx)
{
	int zero = 0;

	return read(in_percpu_array.lookup(&zero));
}

int read_percpu_hash(void *ctx)
{
	int zero = 0;

	return read(in_percpu_hash.lookup(&zero));
}

int read_locked_array(void *ctx)
{
	int zero = 0;

	return read_locked(locked_array.lookup(&zero));
}

int read_locked_hash(void *ctx)
{
	int zero = 0;

	return read_locked(locked_hash.lookup(&zero));
}

// A version at each end, and a checksum (FNV-1a, word by word) over the first of them and the
// payload: the reader reads again until the checksum fits.
int read_checked_array(void *ctx)
{
	int zero = 0;
	struct counts *seen = counts.lookup(&zero);
	volatile struct checked_value *value = checked_array.lookup(&zero);

	if (!seen || !value)
		return 0;
	for (int try = 0; try < TRIES; try++) {
		u64 version = value->version;
		u64 sum = (0xcbf29ce484222325ULL ^ version) * 0x100000001b3ULL;
		u64 differ = version ^ (version & 0xff) * EVERY_BYTE;

		for (u32 i = 0; i < WORDS; i++) {
			u64 word = value->word[i];

			differ |= word ^ version;
			sum = (sum ^ word) * 0x100000001b3ULL;
		}
		sum ^= value->checksum;
		if (differ && version == value->version_again)
			__sync_fetch_and_add(&seen->equal_ends, 1);
		if (!sum) {
			count_torn(seen, differ);
			return 0;
		}
		__sync_fetch_and_add(&seen->rejected, 1);
	}
	__sync_fetch_and_add(&seen->given_up, 1);
	return 0;
}

int read_published(void *ctx)
{
	int zero = 0;
	void *published = outer.lookup(&zero);

	return published ? read(bpf_map_lookup_elem(published, &zero)) : 0;
}
