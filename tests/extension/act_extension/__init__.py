"""Parts for act from another package: each module adds one, in one function."""
