"""Where the learner begins: this phase's parts, right and slow."""
