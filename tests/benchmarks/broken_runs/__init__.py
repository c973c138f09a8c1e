"""The rooms of chaos.py: a run that is broken again and again, and what is known of it."""
