"""Distillation: the student's tables and scales learn to imitate the cached teacher."""
