"""Documents out of files: a module for each format, and one table of them all, `known`."""
