"""What each tenant may have of this instance, and what it has."""
