"""Arrays in, arrays out. No I/O, no Ray, no logging, no config objects."""
