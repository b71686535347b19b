"""Stage 6: modules -> cluster ids, label files, events and quality."""
