"""What the Inductor target is made of: integer forms, compilation, and the package that comes out of it."""
