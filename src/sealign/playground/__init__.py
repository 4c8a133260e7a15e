"""The playground: conversations with edited models."""
