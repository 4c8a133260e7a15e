"""Effects of an edit: scores, statistics, damage."""
