"""Weights as lookup tables with low-rank scales: `W ≈ LUT[indices] ⊙ (A·g) @ B`.

Shape suffixes used throughout: N layers solved together, O outputs, I inputs, R rank, K table entries.
"""
