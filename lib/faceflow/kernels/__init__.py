"""Arrays in, arrays out: no I/O of data, no Ray, no logging, no settings."""
