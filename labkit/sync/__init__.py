"""Ways to keep a copy of a map in sync, behind one interface, and the copy that they feed."""
