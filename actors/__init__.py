"""Ray actors: the shell around the functional core."""
