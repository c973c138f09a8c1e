"""The quick start's own: the text that it trains on, its mixture, and its last page."""
