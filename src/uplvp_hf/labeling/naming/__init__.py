"""Namers: what the masks are called."""
