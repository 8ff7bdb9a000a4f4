"""Other trainers' configurations: read, simulated as those trainers would run them, corrected, and written."""
