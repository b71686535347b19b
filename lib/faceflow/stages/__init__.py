"""ingest -> quantize -> search -> link -> detect -> publish. Stages meet only through the files named in storage."""
