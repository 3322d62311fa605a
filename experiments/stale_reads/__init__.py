"""Experiments in which a reader gets an old value, or none."""
