"""What keeps numbers from the server, and what that is worth."""
