// SPDX-License-Identifier: GPL-2.0
// A build that takes its map from a pin, as bcc does it: whatever is pinned there.

#include "pinned_layout.h"

BPF_TABLE_PINNED("hash", u32, struct policy, policies, ENTRIES, PIN);

int read_limit(void *ctx)
{
	struct policy *policy;
	u32 key = 0;

	policy = policies.lookup(&key);
	return policy ? policy->limit : 0;
}

#if LAYOUT == GROWN
int read_expires(void *ctx)
{
	struct policy *policy;
	u32 key = 0;

	policy = policies.lookup(&key);
	return policy ? policy->expires : 0;
}
#endif
