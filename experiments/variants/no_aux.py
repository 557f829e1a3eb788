"""The shipped recipe without the auxiliary loss; so are the variants of its fade and its merges."""
