"""Edits: the record, the edit of a layer and its operator, files, attaching to a model."""
