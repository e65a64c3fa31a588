"""From a configuration to what the trainer needs, and what is known before and about a step."""
