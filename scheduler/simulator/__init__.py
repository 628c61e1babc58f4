"""Discrete events around a real `Board`: other people's days replayed, policies side by side.

No wall clock and no randomness but that of a seed: the same workload and seed give the same report, byte for
byte.
"""
