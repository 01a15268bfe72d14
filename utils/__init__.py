"""Small, pure functions that the notebooks share: one module, one idea.

`docs/api.md` lists them in the order to read them. `engine` makes sweeps fast, `models` loads
models; `exercises`, `ledger`, `widgets` and `session` are what stands around the analysis.
"""
