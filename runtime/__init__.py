"""Actions: build, train, evaluate, measure and record what a plan says."""
