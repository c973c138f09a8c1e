"""Documents out of files, a format each; `corpus` has them all."""
