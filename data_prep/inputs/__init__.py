"""Which files a source names, here, on servers, on the hub, and how their bytes are read."""
