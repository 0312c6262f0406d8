"""Where phase 3 starts: right answers, a program a query head, two passes over the pages, everything gathered on a CPU."""
