// SPDX-License-Identifier: GPL-2.0
// Prints what user space asks for; the programs return what the helper answered.

struct order {
	u32 format_bytes;  // with the NUL that ends it, if it has one
	u32 argument_bytes;
	u64 arguments[ARGUMENTS];
	char format[TEXT_BYTES];
	char text[TEXT_BYTES];
};

BPF_ARRAY(orders, struct order, 1);

// 1 to TEXT_BYTES, a power of two. Two comparisons would say it as well, but the compiler folds
// them into one that the verifier does not understand.
static inline u32 bounded(u32 size)
{
	return ((size - 1) & (TEXT_BYTES - 1)) + 1;
}

int print(void *ctx)
{
	struct order *order;
	int zero = 0;
	u32 size;

	order = orders.lookup(&zero);
	if (!order)
		return 0;
	size = bounded(order->format_bytes);
	return bpf_trace_printk_(order->format, size, order->arguments[0], order->arguments[1],
				 order->arguments[2]);
}

int print_text(void *ctx)
{
	struct order *order;
	int zero = 0;
	u32 size;

	order = orders.lookup(&zero);
	if (!order)
		return 0;
	size = bounded(order->format_bytes);
	return bpf_trace_printk_(order->format, size, order->text);
}

int print_array(void *ctx)
{
	struct order *order;
	u32 size, arguments;
	int zero = 0;

	order = orders.lookup(&zero);
	if (!order)
		return 0;
	size = bounded(order->format_bytes);
	arguments = order->argument_bytes;
	if (arguments > sizeof(order->arguments))
		return 0;
	return bpf_trace_vprintk(order->format, size, order->arguments, arguments);
}
