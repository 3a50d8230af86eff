"""Pictures to learn from: emoji of several drawing styles, rendered from the npm packages that ship them."""
