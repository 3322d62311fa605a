// SPDX-License-Identifier: GPL-2.0
// A reader that looks key A up and uses the value a moment later, and a writer that deletes A and
// inserts other keys meanwhile. Every word of a value tells whose it is.

#define KEY_A 1
#define OTHERS 32
#define WORDS 6
#define TRIES 4

struct value {
#ifdef LOCKED
	struct bpf_spin_lock lock;
#endif
	u64 stamp; // key in the upper half, what belongs to it in the lower: one word, never torn
	u64 word[WORDS];
	u64 checksum;
};

struct counts {
	u64 absent;    // the lookup answered NULL
	u64 foreign;   // used, and not A's
	u64 rejected;  // found out by the reader's own check
	u64 caught;    // rejected by a second lookup, and not A's
	u64 given_up;  // rejected TRIES times in a row
};

BPF_F_TABLE(KIND, u32, struct value, table, 64, FLAGS);
BPF_ARRAY(counts, struct counts, 1);

static inline u64 stamp_of(u32 key)
{
	return (u64)key << 32 | (u32)(key * 2654435761U);
}

static inline u64 checksum_step(u64 sum, u64 word)
{
	return (sum ^ word) * 0x100000001b3ULL;
}

static inline void fill(struct value *value, u32 key)
{
	u64 sum = checksum_step(0xcbf29ce484222325ULL, stamp_of(key));

	value->stamp = stamp_of(key);
	for (int i = 0; i < WORDS; i++) {
		value->word[i] = stamp_of(key);
		sum = checksum_step(sum, stamp_of(key));
	}
	value->checksum = sum;
}

// What a program does between lookup and use: here it reads HOLD words.
static inline void hold(volatile struct value *value)
{
	for (u32 i = 0; i < HOLD; i++)
		value->checksum;
}

// Zero where every word is A's.
static inline u64 foreign_words(volatile struct value *value)
{
	u64 differ = value->stamp ^ stamp_of(KEY_A);

	for (int i = 0; i < WORDS; i++)
		differ |= value->word[i] ^ stamp_of(KEY_A);
	return differ;
}

#define COUNT(field) __sync_fetch_and_add(&seen->field, 1)

static inline struct counts *here(void)
{
	int zero = 0;

	return counts.lookup(&zero);
}

// A's value once it has been held for a while; NULL, and counted, where A is absent.
static inline struct value *look_up_and_hold(struct counts *seen)
{
	u32 a = KEY_A;
	struct value *value = table.lookup(&a);

	if (value)
		hold(value);
	else
		COUNT(absent);
	return value;
}

int delete_and_insert(void *ctx)
{
	struct value value = {};
	u32 other = KEY_A + 1 + bpf_get_prandom_u32() % OTHERS, a = KEY_A;

	table.delete(&a);
	fill(&value, other);
	table.update(&other, &value);
	table.delete(&other);
	fill(&value, KEY_A);
	table.update(&a, &value);
	return 0;
}

// The same for every key but A.
int spare_a(void *ctx)
{
	struct value value = {};
	u32 other = KEY_A + 1 + bpf_get_prandom_u32() % OTHERS;

	fill(&value, other);
	table.update(&other, &value);
	table.delete(&other);
	return 0;
}

int use_unchecked(void *ctx)
{
	struct counts *seen = here();
	struct value *value = seen ? look_up_and_hold(seen) : NULL;

	if (!value)
		return 0;
	if (foreign_words(value))
		COUNT(foreign);
	return 0;
}

#ifdef LOCKED
int use_under_lock(void *ctx)
{
	u64 differ;
	struct counts *seen = here();
	struct value *value = seen ? look_up_and_hold(seen) : NULL;

	if (!value)
		return 0;
	bpf_spin_lock(&value->lock);
	differ = foreign_words(value);
	bpf_spin_unlock(&value->lock);
	if (differ)
		COUNT(foreign);
	return 0;
}
#else
// Look A up once more after the use: is it still the same element?
int use_and_look_again(void *ctx)
{
	u64 differ;
	u32 a = KEY_A;
	struct counts *seen = here();
	struct value *value = seen ? look_up_and_hold(seen) : NULL;

	if (!value)
		return 0;
	differ = foreign_words(value);
	if (table.lookup(&a) == value) {
		if (differ)
			COUNT(foreign);
		return 0;
	}
	COUNT(rejected);
	if (differ)
		COUNT(caught);
	return 0;
}

// Key and content in one word, read once: either it is A's, or it is not used.
int use_one_word(void *ctx)
{
	u64 stamp;
	struct counts *seen = here();
	struct value *value = seen ? look_up_and_hold(seen) : NULL;

	if (!value)
		return 0;
	stamp = ((volatile struct value *)value)->stamp;
	if (stamp >> 32 != KEY_A)
		COUNT(rejected);
	else if (stamp != stamp_of(KEY_A))
		COUNT(foreign);
	return 0;
}

// Content of any size, with a checksum over it and the key: look up and read again until it fits.
int use_checksummed(void *ctx)
{
	u32 a = KEY_A;
	struct counts *seen = here();
	struct value *value = seen ? look_up_and_hold(seen) : NULL;

	if (!value)
		return 0;
	for (int try = 0; try < TRIES; try++) {
		volatile struct value *read = value;
		u64 stamp = read->stamp, differ = stamp ^ stamp_of(KEY_A);
		u64 sum = checksum_step(0xcbf29ce484222325ULL, stamp);

		for (int i = 0; i < WORDS; i++) {
			u64 word = read->word[i];

			differ |= word ^ stamp_of(KEY_A);
			sum = checksum_step(sum, word);
		}
		if (sum == read->checksum && stamp >> 32 == KEY_A) {
			if (differ)
				COUNT(foreign);
			return 0;
		}
		COUNT(rejected);
		value = table.lookup(&a);
		if (!value) {
			COUNT(absent);
			return 0;
		}
	}
	COUNT(given_up);
	return 0;
}
#endif
