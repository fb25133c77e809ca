"""Distillation: the student's codebooks and scales learn to imitate the cached teacher."""
