"""Training and scoring: the loop that every method shares, and the evaluation of its maps."""
