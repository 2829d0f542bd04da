"""Images in: sources of any kind, one policy of decoding, and the packed form training reads."""
