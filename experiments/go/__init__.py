"""Experiments in Go: the article's own code, and what a control plane in Go meets."""
