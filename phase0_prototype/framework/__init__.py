"""Where phase 0 starts: right answers, slowly. `make start-phase0` copies these files into your workspace."""
