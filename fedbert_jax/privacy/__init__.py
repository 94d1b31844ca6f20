"""What keeps numbers from the server or from those who get the model, and what that amounts to."""
