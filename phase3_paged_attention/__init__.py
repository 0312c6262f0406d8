"""Phase 3: attention where the cache lies."""
