"""Exercises: a learner's function is checked, told its mistakes by name, and used once right."""
