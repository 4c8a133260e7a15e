"""Models: loading, structure, sites, prompts, batches, generation and hooks."""
