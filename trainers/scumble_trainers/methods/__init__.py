"""One module per adapter method: pictures become a record."""
