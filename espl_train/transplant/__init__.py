"""Whose weights need whose prompt: every combination of them on the same problems, with the same random draws."""
