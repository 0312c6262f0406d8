"""Attention over pages in Triton: a ladder of decodes, the family that the engine runs, and what they cost."""
