"""Files whose documents are token ids already, in the formats of other projects."""
