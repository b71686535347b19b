"""Local and S3 files: where everything lies, how it is written whole or not at all. No algorithms."""
