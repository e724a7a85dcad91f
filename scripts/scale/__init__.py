"""What grows with the size of a round, measured piece by piece. `scripts/bench_scale.py` calls each of the pieces."""
