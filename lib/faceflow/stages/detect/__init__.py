"""Stage 5: graph -> modules; then capped modules, singletons and constraints."""
