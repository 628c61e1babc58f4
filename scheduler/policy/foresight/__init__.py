"""When will it start, and what if it were otherwise? A copy of the board, rolled forward."""
