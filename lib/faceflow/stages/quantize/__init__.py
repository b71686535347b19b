"""Stage 2: the search plan, the similarity threshold, the coarse quantizer and each face's cells."""
