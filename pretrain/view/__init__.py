"""What is shown: progress, dry runs, the templates of what commands print."""
