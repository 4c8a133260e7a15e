"""Edits in a serving engine: vLLM's own server with an edit for each request."""
