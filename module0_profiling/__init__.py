"""Measure, never guess: hardware peaks, timing, rooflines, results, and the learner's machinery."""

__version__ = "0.1.0"
