"""What a container asks itself."""
