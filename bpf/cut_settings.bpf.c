// SPDX-License-Identifier: GPL-2.0
// The settings map as two builds of its owner make it: values of 1,024 and of 512 bytes.

struct before {
	char text[OLD_BYTES];
};

struct rebuilt {
	char text[NEW_BYTES];
};

BPF_TABLE("array", u32, struct before, settings_v1, 1);
BPF_TABLE("array", u32, struct rebuilt, settings_v2, 1);
