"""Methods: how an edit is fitted, and the methods that edits are compared with."""
