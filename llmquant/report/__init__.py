"""A finished run on one page that people can open, print and send: `report.html`, with nothing to fetch."""
