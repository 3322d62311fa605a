"""The experiments: each way that a map read goes wrong, on a real kernel."""
