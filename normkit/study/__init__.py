"""The study: every claim of the documents about why batch normalization works, tried on real data."""
