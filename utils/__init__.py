"""Small, pure functions that the notebooks share: one module, one idea.

To read it, begin with what every function asks of its arguments (typed, checks), then heads,
prompts, metrics; interventions: edits, ablation, patching, paths; circuits: ioi, circuit,
selection; what is read off a run or off the weights: attribution, weights; training: toy,
power_law. Pictures: plotting, look, diagram. `engine` makes sweeps fast, `models` loads models;
`exercises`, `ledger`, `widgets` and `session` are what stands around the analysis.
"""
