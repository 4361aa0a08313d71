"""What a command found, as a page for a browser."""
