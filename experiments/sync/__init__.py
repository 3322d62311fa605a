"""Experiments on the ways to keep a copy in sync: they use the strategies themselves."""
