"""Decisions: from facts and profiles to a plan; pure but for the profiler."""
