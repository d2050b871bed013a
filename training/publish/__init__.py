"""What others are told of a model: its card, its release, the Hub."""
