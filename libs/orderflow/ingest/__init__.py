"""The recorder: where frames come from and how they reach the journal."""
