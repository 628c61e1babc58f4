"""Was it fair? Replays a journal of what the board was told, and holds each promise of the policy against it.

It trusts the journal alone, and takes nothing of the policy but its formulas.
"""
