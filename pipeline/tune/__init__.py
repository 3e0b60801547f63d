"""The search for a better schedule: short trainings that are proposed, scored and compared.

| module | what |
|---|---|
| `space` | a choice as `--set` overrides, and whether it makes a schedule at all |
| `proposer` | ask and tell, over Optuna |
| `records` | what is kept of an experiment, so that the same command continues it |
| `trial` | one short training, scored on its way |
| `scheduling` | Ray Tune: which trial runs where, and which is ended early |
| `verdict` | which finalist is best, if any can be told apart |
| `experiment` | the step `tune` |
"""
