"""One module per adapter method: a normalised record becomes what a row carries."""
