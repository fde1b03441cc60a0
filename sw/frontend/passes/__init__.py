"""The loader's passes: read -> lower -> fuse -> check, each of one file."""
