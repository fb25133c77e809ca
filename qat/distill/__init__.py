"""Distillation: the student's codebooks, scales and shifts learn to imitate the cached teacher."""
