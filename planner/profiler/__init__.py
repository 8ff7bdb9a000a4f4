"""Tracing a training step on ``meta`` tensors: the one part of the planner that imports torch."""
