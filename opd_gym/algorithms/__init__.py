"""Algorithms: on-policy distillation and what it is compared with."""
