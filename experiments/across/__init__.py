"""What is read from the runs of several experiments together."""
