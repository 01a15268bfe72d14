"""Figures that answer: what a slider or a button shows, and what each answer is computed by."""
