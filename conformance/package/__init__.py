"""Tests of the package itself: what is shipped, what importing it costs, how others plug in."""
