"""Exercise 03."""
