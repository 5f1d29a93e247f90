"""What every test shares: one thread a process, no display, and helpers for commands and tiny models."""

import os

# Set before NumPy and torch are imported: the tests run in parallel processes.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
