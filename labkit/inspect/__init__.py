"""Looks at maps of the user's own."""
