"""The similarity threshold from a sample of pairs, without labels."""
