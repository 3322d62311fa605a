"""Experiments in which updates are lost, values torn, keys skipped."""
