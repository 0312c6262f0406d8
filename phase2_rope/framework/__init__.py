"""Where phase 2 starts: right answers, one thread an element, every cached token expanded again at every step."""
