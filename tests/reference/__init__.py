"""An independent reference of whole runs: plain torch and transformers, fp64, one row and one token at a time.

It is written from the formulas of the paper and from the documented order of data and random numbers. It imports
nothing of the project, so a mistake in the project cannot be in both.
"""
