"""What `scripts/damage.py` does to a run folder, and how it sees what comes of it."""
