"""A decode step's work on a CPU in C++: products, what lies between them, attention to pages where they lie."""
