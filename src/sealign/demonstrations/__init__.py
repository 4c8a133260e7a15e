"""Demonstrations: prompts with a wanted and an unwanted completion, and where they come from."""
