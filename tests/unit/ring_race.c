/* SPDX-License-Identifier: Apache-2.0 */
/* A producer thread that fills a ring as the kernel does (kernel/bpf/ringbuf.c), and native.c, which
 * reads it: for the thread sanitizer. With PLANTED the reader's loads acquire nothing: a race, which
 * the sanitizer must see.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#ifdef PLANTED
#define memory_order_acquire memory_order_relaxed
#endif
#include NATIVE

#define RECORDS 50000u
#define CAPACITY 4096u
/* Its slot divides the capacity, so that no record runs over the end; and gcc's sanitizer looks into
 * copies of a size that is not known to the compiler alone.
 */
#define WORDS 7u
#define PAYLOAD (8 * WORDS)

static _Atomic u64 consumer, producer;
static _Alignas(8) u8 data[CAPACITY];

static void *produce(void *unused)
{
	u64 at = 0;

	for (u64 i = 0; i < RECORDS; i++, at += slot_of(PAYLOAD)) {
		_Atomic u32 *header = (_Atomic u32 *)(data + at % CAPACITY);
		u64 *payload = (u64 *)(data + at % CAPACITY + HEADER);
		u32 state = i % 7 == 3 ? DISCARDED : 0;

		while (at + slot_of(PAYLOAD) - atomic_load(&consumer) >= CAPACITY)
			;
		atomic_store_explicit(header, PAYLOAD | BUSY, memory_order_relaxed);
		atomic_store_explicit(&producer, at + slot_of(PAYLOAD), memory_order_release);
		for (u64 word = 0; word < WORDS; word++)
			payload[word] = i;
		atomic_exchange(header, PAYLOAD | state);
	}
	return unused;
}

int main(void)
{
	struct ring ring = {
		.consumer = &consumer, .producer = &producer, .data = data, .capacity = CAPACITY, .fd = -1,
	};
	u64 taken = 0, sum = 0, wanted = 0, out[WORDS * 16];
	struct place places[16];
	pthread_t thread;

	for (u64 i = 0; i < RECORDS; i++)
		wanted += i % 7 == 3 ? 0 : WORDS * i;
	if (pthread_create(&thread, NULL, produce, NULL))
		return 2;
	for (u64 turn = 0; taken + ring.discarded < RECORDS; turn++) {
		i64 some;

		lab_ring_wait(&ring, 1000);
		if (turn % 3 == 0) {
			some = lab_ring_take(&ring, (u8 *)out, 16, PAYLOAD);
		} else if (turn % 3 == 1) {
			some = lab_ring_take_any(&ring, (u8 *)out, sizeof(out), places, 16);
		} else {
			some = lab_ring_ready(&ring, PAYLOAD, 16);
			for (i64 i = 0; i < some; i++)
				memcpy(out + WORDS * i,
				       record_at(&ring, ring.position + (u64)i * slot_of(PAYLOAD)) + HEADER,
				       PAYLOAD);
			if (lab_ring_hand_back(&ring, (u64)some * slot_of(PAYLOAD)))
				return 3;
		}
		if (some < 0)
			return 3;
		for (i64 i = 0; i < (i64)WORDS * some; i++)
			sum += out[i];
		taken += (u64)some;
	}
	pthread_join(thread, NULL);
	printf("%llu records\n", (unsigned long long)taken);
	return sum == wanted ? 0 : 4;
}
