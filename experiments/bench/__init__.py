"""Benchmarks of the lab's own speed, held against bars."""
