"""The parts of `scripts/ablate.py`: the arms, the worlds they run in, the runs, and the report of them."""
