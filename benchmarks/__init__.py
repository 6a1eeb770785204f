"""Measured claims, each one command; nothing imports them."""
