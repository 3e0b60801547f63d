"""One module per step of the workflow, and the few things that steps share.

Importing the package imports neither torch nor Ray.
"""
