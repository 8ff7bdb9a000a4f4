"""Unsloth: its scripts are read as all others are; a script for a T4, written."""
