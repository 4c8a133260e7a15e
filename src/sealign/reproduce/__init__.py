"""The tables and figures of the paper, reproduced for any model, and the demo."""
