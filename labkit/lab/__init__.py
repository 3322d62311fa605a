"""The driver of experiments, and the faces of the lab."""
