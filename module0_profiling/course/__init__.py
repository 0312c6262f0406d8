"""The learner's machinery: three homes for a part, gates that grade it, hints, progress, and proofs that it all holds.

A phase takes part by having `framework/`, `gates.toml`, `hints.toml`, `checks.py` and `planted.toml`; nothing here
names a phase. Read in this order: parts.py, workspace.py, gates.py, grade.py, hints.py, progress.py, then prove.py.
"""
