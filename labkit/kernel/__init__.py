"""All that touches the kernel; nothing in here imports the rooms above."""
