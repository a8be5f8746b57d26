"""The loop: stages of a run, evaluation, metrics and the guards that stop it in time."""
