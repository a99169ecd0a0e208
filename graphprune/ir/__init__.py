"""The graph IR: tracing a model into a Program, printing, checking and querying it."""
