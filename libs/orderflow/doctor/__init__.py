"""What `orderflow doctor` looks at: this machine, the broker and the registry, the exchange. Nothing here changes anything."""
