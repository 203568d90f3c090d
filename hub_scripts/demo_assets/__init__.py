"""What makes the assets of the bundled demo: the language model and its card, the SAEs, and what they are worth."""
