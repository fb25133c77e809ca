"""What a quantized weight is, in any format: `W ≈ values[index] ⊙ S + Z` (`qat.quant.formats`).

Shape suffixes used throughout: N layers solved together, O outputs, I inputs, R rank, K values.
"""
