"""Stage 1: Parquet -> checked, unit-length vectors and ids, in parts."""
