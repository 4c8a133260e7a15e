"""Evaluation of edits: tasks, scores, controls, damage, statistics, verdicts and tuning."""
