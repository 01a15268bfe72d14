"""Running again only what an intervention can change: what makes a sweep fast.

Words: an *intervention* is a list of edits; a *copy* is all prompts run once more under it; a
*pack* is copies that run at once, one after the other along the first axis. A *position* counts
a prompt's tokens: a run again begins at `start`, and the metric reads at the positions `read`.

What a sweep holds: the recorded run (the stream, keys and values of every block), one pack (as
much as `packs.rows_that_fit` allows), and the logits that the metric reads (`readout`).
"""
