"""A page that explains a run, or several."""
