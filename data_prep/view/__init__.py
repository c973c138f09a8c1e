"""What `show` and a finished build say of a data set: its figures, and the text that tells them."""
