"""How a result looks: figures, and pages of one file."""
