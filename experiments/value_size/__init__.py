"""Experiments in which the size of a value is not what a side believes."""
