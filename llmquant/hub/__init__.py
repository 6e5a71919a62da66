"""Finished directories on the Hub."""
