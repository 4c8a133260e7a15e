"""Demonstrations: prompts with a positive and a negative completion, and their sources."""
