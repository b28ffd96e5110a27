"""Decoded weights in memory that all processes of a host share."""
