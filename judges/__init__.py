"""Rules that judge answers. A run loads the one that --answers names, when it evaluates."""
