"""What is measured of this phase: cases of its benchmark, and the servers that they start."""
