// SPDX-License-Identifier: GPL-2.0
// A hash of bcc's, so that bcc's own ways to read and write it can be measured beside ours.

BPF_HASH(table, u32, u64, ENTRIES);
