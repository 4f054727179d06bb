"""One meaning, many spellings: modules that must be rewritten, and near misses that must not be."""
