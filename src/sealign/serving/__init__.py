"""Serving edits with vLLM: its own server, and an edit for each request."""
