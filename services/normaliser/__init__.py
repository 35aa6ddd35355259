"""The normaliser without a recorder: computes from a journal that somebody else writes, or has written."""
