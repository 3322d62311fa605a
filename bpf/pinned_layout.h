/* SPDX-License-Identifier: GPL-2.0 */
/* One struct as four builds of its owner know it; LAYOUT names the build. */

#define KEPT 1
#define GROWN 2
#define SHRUNK 3
#define REORDERED 4

struct policy {
#if LAYOUT == KEPT || LAYOUT == GROWN
	unsigned long long packets;
	unsigned int limit;
	unsigned int action;
#endif
#if LAYOUT == GROWN
	unsigned long long burst;
	unsigned long long expires;
#endif
#if LAYOUT == SHRUNK
	unsigned int limit;
	unsigned int action;
#endif
#if LAYOUT == REORDERED
	unsigned int action;
	unsigned int limit;
	unsigned long long packets;
#endif
};
