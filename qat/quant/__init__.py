"""Weights as codebooks with low-rank scales: `W ≈ codebook[indices] ⊙ (A·g) @ B`.

Shape suffixes used throughout: N layers solved together, O outputs, I inputs, R rank, K codebook entries.
"""
