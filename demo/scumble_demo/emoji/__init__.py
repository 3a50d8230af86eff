"""Training data: emoji in several drawing styles, rendered from npm packages."""
