"""How weights come back, and what they are worth."""
